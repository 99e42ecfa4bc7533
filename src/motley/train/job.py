"""What a stage trains on what, once its settings are checked and its data is prepared; and one process that does it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from motley.data.tokenizer import Tokenizer
from motley.fleet.device import choose_device
from motley.fleet.probe import Machine
from motley.model import ModelConfig, Transformer
from motley.progress import note
from motley.train.allocator import keep_freed_memory
from motley.train.config import TrainingConfig
from motley.train.input_checks import check_memory
from motley.train.mixed_precision import chosen_format
from motley.train.ngram_targets import counts_of
from motley.train.run_folder import RunFolder
from motley.train.strategy import SingleProcess
from motley.train.trainer import Inputs

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A prepared stage; plain values, so that rank 0 can prepare it for all.

    Attributes:
        config: settings of the stage.
        shape: of the model.
        data: the prepared data.
        run: the opened run folder.
        tokenizer_folder: where the model's tokenizer lies.
        title: of the progress bar.
    """

    config: Config
    shape: ModelConfig
    data: Path
    run: RunFolder
    tokenizer_folder: Path
    title: str

    def inputs(self) -> Inputs:
        """Streams of rows and the tokenizer."""
        return Inputs.of(self.data, self.config, Tokenizer.load(self.tokenizer_folder), self.title)


@dataclass(frozen=True)
class Stage:
    """What pretraining and fine-tuning differ in, for those who run a stage on many ranks.

    Attributes:
        prepare: (settings, prepared data or None) → the job.
        weights: (the job, a device) → the whole model to begin with.
        own_inputs: (settings, prepared data in use) → what a rank's own --data and --model come to.
        trained_shape: settings → the network of weights that are given; None: the network follows from the settings.
    """

    prepare: Callable[[Any, Path | None], Job[Any]]
    weights: Callable[[Job[Any], torch.device], Transformer]
    own_inputs: Callable[[Any, Path], Mapping[str, str]]
    trained_shape: Callable[[Any], ModelConfig] | None = None


def single_process(
    job: Job[Config], weights: Callable[[Job[Config], torch.device], Transformer], machine: Machine | None = None
) -> SingleProcess:
    """This process, ready to train: with the model on its device, in the number format that suits it.

    machine: what was measured before, if anything.
    """
    config, device = job.config, choose_device(job.config.device)
    check_memory(job.shape, config.optimizer, device, config.moments)
    number_format = chosen_format(config.precision, device, job.run, machine)
    keep_freed_memory()
    strategy = SingleProcess(weights(job, device), config, number_format)
    if config.ngram_share():
        note("counting how often what follows two tokens in the text")
        strategy.learn_ngrams(counts_of(job.inputs().train, job.shape.vocab_size, device))
    return strategy
