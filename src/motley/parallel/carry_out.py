"""What pretraining and fine-tuning share: the crew that the settings ask for, and the run from its start to its end."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.fleet.probe import Machine
from motley.model import ModelConfig, Transformer
from motley.parallel.build import Emulation, employ, meet
from motley.parallel.communicator import Communicator
from motley.parallel.elastic.agent import Memory, Own, Result, live
from motley.progress import note
from motley.train.allocator import keep_freed_memory
from motley.train.config import TrainingConfig
from motley.train.ngram_targets import counts_of
from motley.train.run_folder import Run, claimed
from motley.train.trainer import train


def with_crew(config: TrainingConfig, own: Own, work: Callable[[Communicator, Memory], Result]) -> Result:
    """`work` of this process with the others of its job, the run folder held meanwhile.

    own: what this worker's own --data and --model come to, beside the prepared data in use.
    """
    if config.live:
        return live(config, own, work)
    comm = meet(config)
    try:
        with ExitStack() as held:
            comm.led(lambda: held.enter_context(claimed(config.out)))
            return work(comm, Memory(own))
    finally:
        comm.leave()


def carry_out(
    config: TrainingConfig,
    shape: ModelConfig,
    comm: Communicator,
    memory: Memory,
    run: Run,
    data: Path,
    machine: Machine | None,
    weights: Callable[[torch.device], Transformer],
    tokenizer: Tokenizer,
    title: str,
    emulation: Emulation | None = None,
) -> dict[str, Any] | None:
    """Train to the end and write down what the run amounts to, which worker 0 returns; None elsewhere.

    Args:
        config: settings of the stage.
        shape: of the model.
        crew: all workers.
        memory: what this worker keeps from crew to crew.
        run: the opened run folder.
        data: the prepared data.
        machine: what was measured before, if anything.
        weights: makes the whole model on a device, where the crew has no state to go on from.
        tokenizer: of the model.
        title: of the progress bar.
        emulation: makes the workers unequal, where the settings ask for it.
    """
    goes_on = memory.serves(comm)
    if not goes_on and not comm.alone:  # who joined a crew at work was compared with it at the door
        comm.agree(memory.own(config, data))
    keep_freed_memory()
    island = employ(config, shape, comm, run, data, machine, None if goes_on else weights, emulation)
    rows = TokenStream(data, "train", config.seq_len, config.seed)
    if config.ngram_share():
        if comm.leads and memory.ngrams is None:
            note("counting how often what follows two tokens in the text")
        if island.worker.place.last:
            memory.ngrams = memory.ngrams or counts_of(rows, shape.vocab_size, comm.device)
            island.worker.learn_ngrams(memory.ngrams)
    held_out = TokenStream(data, "valid", config.seq_len, shuffle=False)
    at = train(island, memory.course(island, data), rows, held_out, tokenizer, title)
    result = comm.led(lambda: run.finish(asdict(at)))
    return result if comm.leads else None
