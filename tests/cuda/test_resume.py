"""Runs that stop and resume on the GPU are bit-identical, dropout included."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.checkpoint import random_state, store
from gpt2.distributed.world import World
from gpt2.train import trainer
from gpt2.train.replica import Replica
from support import loss_lines, run_command, small_config, small_flags, train_command

# Large enough for several blocks of each kernel, which add in any order without --deterministic.
LARGER: dict[str, object] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 128,
    "block_size": 256,
    "dropout": 0.1,
    "total_batch_size": 2048,
    "mini_batch_size": 4,
    "eval_interval": 4,
    "decay_steps": 8,
    "checkpoint_interval": 4,
    "dtype": "bfloat16",
}


@pytest.mark.timeout(600)  # two of three processes compile
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_deterministic_run_resumes_bit_identically(
    device: str, compiled: str, data_root: Path, tmp_path: Path
):
    """In separate processes: cuBLAS reads its setting once, before its first product. Each run
    compiles its own kernels."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, last in ((whole, 8), (parts, 4), (parts, 8)):
        options = {**LARGER, "device": device, "compile": compiled, "max_steps": last}
        flags = small_flags(data_root, out, **options, resume="latest")
        kernels = str(out / "kernels")
        run_command(train_command([*flags, "--deterministic"]), TORCHINDUCTOR_CACHE_DIR=kernels)
    lines = loss_lines(whole / "logs/log.txt")
    assert len(lines) == 8 + 3  # steps, and validations before, between and after them
    assert loss_lines(parts / "logs/log.txt") == lines
    one, other = (store.load(out / "checkpoints" / "step_000008.pt") for out in (whole, parts))
    assert one["model"].keys() == other["model"].keys()
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert torch.equal(one["rng"][0]["torch"], other["rng"][0]["torch"])
    if device == "cuda":
        assert torch.equal(one["rng"][0]["cuda"], other["rng"][0]["cuda"])


def draws(device: str) -> list[object]:
    """One number from every random stream."""
    of_torch = [torch.rand((), device=where).item() for where in ("cpu", device)]
    return [random.random(), np.random.random(), *of_torch]


def test_random_streams_are_restored_from_a_file(device: str, tmp_path: Path):
    torch.rand(7, device=device)  # the stream is past its beginning
    path, on_gpu = tmp_path / "state.pt", torch.device(device, 0)
    torch.save(random_state.rng_state(on_gpu), path)
    first, second = draws(device), draws(device)
    assert all(one != other for one, other in zip(first, second, strict=True))
    # As `store.load` returns it: on the host, with plain values and tensors only.
    random_state.set_rng_state(torch.load(path, map_location="cpu", weights_only=True), on_gpu)
    assert [draws(device), draws(device)] == [first, second]


def test_dropout_continues_its_random_stream(device: str, data_root: Path, tmp_path: Path):
    config = small_config(
        data_root, tmp_path, device=device, dtype="float32", compile="off", dropout=0.5
    )
    world = World(0, 1, torch.device(device, 0))
    drawn = torch.randint(50257, (8, config.model.block_size + 1))
    batch = (drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())

    def losses(replica: Replica) -> list[float]:
        return [trainer.train_step(replica, [batch], 64, 1e-2).loss for _ in range(3)]

    replica = Replica(config, world)
    losses(replica)
    path = tmp_path / "state.pt"
    torch.save({**replica.state_dict(), "rng": [random_state.rng_state(world.device)]}, path)
    expected = losses(replica)

    replica = Replica(config, world)
    replica.load_state_dict(torch.load(path, map_location="cpu"), step=3)
    resumed = losses(replica)
    replica.load_state_dict(torch.load(path, map_location="cpu"), step=3)
    torch.rand(1, device=device)  # the stream is one draw further
    other = losses(replica)
    assert resumed == pytest.approx(expected, rel=1e-4)
    assert other != pytest.approx(expected, rel=1e-3), "dropout does not matter here"
