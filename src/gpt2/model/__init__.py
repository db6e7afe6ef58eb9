"""Models. A new one is one file here, its entry in MODELS, and what is known of it in `shape`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gpt2.config import ModelConfig
from gpt2.model.base import LanguageModel
from gpt2.model.gpt2 import GPT2
from gpt2.model.mlp import MLP
from gpt2.model.modern import Modern
from gpt2.shape import Architecture

MODELS: dict[Architecture, type[LanguageModel]] = {"gpt2": GPT2, "modern": Modern, "mlp": MLP}


def build(config: ModelConfig) -> LanguageModel:
    """The model that `config` describes, freshly initialised from torch's CPU generator."""
    return MODELS[config.architecture](config)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within the block; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
