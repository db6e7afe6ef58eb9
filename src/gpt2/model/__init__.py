"""Models. A new one is one file here, and its entry in the table of `gpt2.config.model`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.model.base import LanguageModel


def build(config: ModelConfig) -> LanguageModel:
    """The model that `config` describes, freshly initialised from torch's CPU generator."""
    module, name = ARCHITECTURES[config.architecture].model.split(":")
    kind: type[LanguageModel] = getattr(importlib.import_module(module), name)
    return kind(config)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within the block; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
