"""GPT-2 from scratch: pretraining under torchrun with exact resume."""

__version__ = "0.1.0"
