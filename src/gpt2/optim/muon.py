"""Muon for matrices."""

import inspect

import torch

from gpt2.optim.adamw import Uncompiled


class Muon(Uncompiled, torch.optim.Muon):
    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))
