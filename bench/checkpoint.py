"""How long a checkpoint holds training up, and how fast it comes back: python bench/checkpoint.py

GPT-2 124M with the state of AdamW, 1.5 GB. Saving: the time that `Saver.save_in_background` blocks,
against a synchronous save of the same state, in turn. Loading: verified, from the page cache.
Memory: the most that the host holds beside the state, from VmHWM of /proc.
"""

import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpt2 import model
from gpt2.checkpoint import metadata, store
from gpt2.checkpoint.async_save import HostCopy, Saver
from gpt2.config import presets
from gpt2.config.run import CheckpointConfig
from gpt2.distributed import world as distributed
from gpt2.optim import build

ROUNDS = 5


def resident_gb(what: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def trained_state() -> metadata.CheckpointState:
    """Weights and moments of GPT-2 124M after one update."""
    preset = presets.preset("gpt2-124m")
    net = model.build(preset.model)
    optimizer = build.build_optimizer(net, preset.optim)
    for part in net.parameters():
        part.grad = torch.randn_like(part)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def training(step: int) -> metadata.TrainingMetadata:
    return metadata.TrainingMetadata(step, 0, 0, 3.0, None, 1, "bench", "0")


def main() -> None:
    state = trained_state()
    world = distributed.World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=".") as root:
        folder = Path(root)
        settings = CheckpointConfig(checkpoint_dir=folder, keep_last=2)
        saver = Saver(world, settings, None, None)
        blocked, whole, synchronous = [], [], []
        for number in range(ROUNDS):
            started = time.perf_counter()
            path = store.save(folder, {**state, "rng": []}, training(2 * number + 1), keep_last=2)
            synchronous.append(time.perf_counter() - started)
            before = resident_gb("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            started = time.perf_counter()
            saver.save_in_background(training(2 * number + 2), lambda: state)
            blocked.append(time.perf_counter() - started)
            saver.wait()
            whole.append(time.perf_counter() - started)
            extra = resident_gb("VmHWM") - before
            print(
                f"  synchronous {synchronous[-1]:.2f} s; blocked {blocked[-1]:.2f} s "
                f"({blocked[-1] / synchronous[-1]:.0%}), written after {whole[-1]:.2f} s; "
                f"{extra:.2f} GB more at the most"
            )
        assert store.list_checkpoints(folder)[-1].training.step == 2 * ROUNDS
        size_gb = path.stat().st_size / 1e9
        share = statistics.median(blocked[1:]) / statistics.median(synchronous)
        print(f"{size_gb:.2f} GB, {len(os.sched_getaffinity(0))} cores")
        print(
            f"Saving blocks for {share:.0%} of a synchronous save (the first: {blocked[0]:.2f} s)"
        )
        newest = store.find(folder, "latest")
        assert newest is not None
        loaded, copied = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            mapped = store.load(newest)
            loaded.append(size_gb / (time.perf_counter() - started))
            HostCopy().copy(mapped)
            copied.append(size_gb / (time.perf_counter() - started))
        for what, rates in (("", loaded), (" and copied to fresh memory", copied)):
            print(
                f"Loaded, checksum verified{what}: {statistics.median(rates):.2f} GB/s "
                f"({min(rates):.2f} to {max(rates):.2f})"
            )


if __name__ == "__main__":
    main()
