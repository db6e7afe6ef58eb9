"""Muon, an optimiser for matrices."""

import inspect

import torch

from gpt2.optim.adamw import Uncompiled


class Muon(Uncompiled, torch.optim.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) by torch's implementation."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))
