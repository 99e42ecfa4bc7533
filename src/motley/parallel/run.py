"""A training stage on many ranks: `motley pretrain` and `motley sft` under torchrun, with a plan, islands or --elastic.

torchrun --nproc-per-node 4 -m motley pretrain ...

rank 0   opens the run folder, prepares data, loads or draws the weights     ──▶ shares what it found
others   wait, then check that they see the same code, data and settings     ◀──
"""

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from motley.fleet.probe import Machine
from motley.parallel.build import Emulation, as_planned, build_strategy, meet, plan_of
from motley.parallel.communicator import Communicator
from motley.parallel.rank import Ranks
from motley.progress import note
from motley.train import pretrain as pretraining
from motley.train import sft as fine_tuning
from motley.train.allocator import keep_freed_memory
from motley.train.checkpoint import resume
from motley.train.config import PretrainConfig, SftConfig, TrainingConfig
from motley.train.job import Job, Stage
from motley.train.ngram_targets import counts_of
from motley.train.run_folder import as_begun, claimed, kept_speed
from motley.train.trainer import train

if TYPE_CHECKING:
    from motley.parallel.elastic.agent import Carried


def pretrain(
    config: PretrainConfig, machine: Machine | None = None, emulation: Emulation | None = None
) -> dict[str, Any] | None:
    """`motley.train.pretrain.pretrain` on many ranks. Returns what the run amounts to; None on ranks but the first."""
    return _run(pretraining.STAGE, config, machine, emulation)


def sft(config: SftConfig, machine: Machine | None = None, emulation: Emulation | None = None) -> dict[str, Any] | None:
    """`motley.train.sft.sft` on many ranks. Returns what the run amounts to; None on ranks but the first."""
    return _run(fine_tuning.STAGE, config, machine, emulation)


def _run(
    stage: Stage, config: TrainingConfig, machine: Machine | None, emulation: Emulation | None
) -> dict[str, Any] | None:
    def work(comm: Communicator, carried: "Carried | None") -> dict[str, Any] | None:
        return _train(stage, config, comm, machine, emulation, carried)

    if config.elastic:
        from motley.parallel.elastic.agent import run_elastic

        return run_elastic(config, stage.own_inputs, work)
    comm = meet(config)
    try:
        with ExitStack() as held:
            comm.led(lambda: held.enter_context(claimed(config.out)))
            return work(comm, None)
    finally:
        comm.leave()


def _train(
    stage: Stage,
    config: TrainingConfig,
    comm: Communicator,
    machine: Machine | None,
    emulation: Emulation | None,
    carried: "Carried | None",
) -> dict[str, Any] | None:
    """Train to the end with these ranks.

    carried: what this rank keeps when elastic ranks regroup.
    """
    config = as_begun(config, comm.led(lambda: kept_speed(config.out)))
    trained = stage.trained_shape(config) if stage.trained_shape else None
    config = as_planned(config, comm.led(lambda: plan_of(config)), comm.leads, trained)
    prepared: Job[Any] = comm.led(lambda: stage.prepare(config, carried.data if carried else None))
    job = Job(config, prepared.shape, prepared.data, prepared.run, prepared.tokenizer_folder, prepared.title)
    if job.run.finished is not None:
        return job.run.finished
    has_state = carried is not None and carried.serves(comm)
    if not has_state and not comm.alone:  # a rank that joins a running job was compared with it before
        comm.agree(stage.own_inputs(config, job.data))
    keep_freed_memory()
    weights = None if has_state else (lambda device: stage.weights(job, device))
    strategy = build_strategy(job, comm, machine, weights, emulation)
    inputs = job.inputs()
    if config.ngram_share():
        known = carried.ngrams if carried else None
        if comm.leads and known is None:
            note("counting how often what follows two tokens in the text")
        if strategy.holds_head:
            known = known or counts_of(inputs.train, job.shape.vocab_size, comm.device)
            strategy.learn_ngrams(known)
        if carried:
            carried.ngrams = known
    if carried:
        assert isinstance(strategy, Ranks)
        state = carried.resume(strategy, job.data)
    else:
        state = resume(strategy)
    at = train(strategy, state, inputs)
    result = comm.led(lambda: job.run.finish(asdict(at)))
    return result if comm.leads else None
