"""Models. A new architecture is a file here and an entry of `gpt2.config.model.ARCHITECTURES`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.model.base import LanguageModel


def build(config: ModelConfig) -> LanguageModel:
    """The model that `config` describes; its weights are drawn from torch's CPU generator."""
    module, name = ARCHITECTURES[config.architecture].model.split(":")
    kind: type[LanguageModel] = getattr(importlib.import_module(module), name)
    return kind(config)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off in the block; then restores the mode of the model."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
