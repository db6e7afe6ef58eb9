"""How far losses are apart on one, two and three ranks with Muon: `python bench/muon_ranks.py`

The demo's model on the bytes of the standard library, 100 updates on the CPU (gloo), with the
orthogonalisation in float32, and in bfloat16 as on GPUs. All else is in float32.
"""

import functools
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch

from gpt2.config import options, presets
from gpt2.config.lr_schedule import lr_at
from gpt2.distributed import rendezvous
from gpt2.optim import muon
from gpt2.train import trainer
from gpt2.train.replica import Replica

ROWS, LENGTH, STEPS = 12, 128, 100


def losses(dtype: str, rate: float) -> list[float]:
    """The loss of each update, on all ranks of torchrun; each has its share of the same rows."""
    products = functools.partial(muon.orthogonalised, dtype=getattr(torch, dtype))
    muon._orthogonalise = lambda device: products
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    count = len(text) // (LENGTH + 1)
    table = np.frombuffer(text, dtype=np.uint8)[: count * (LENGTH + 1)].reshape(count, -1)
    values = {
        "vocab_size": 256,
        "total_batch_size": ROWS * LENGTH,
        "mini_batch_size": ROWS,
        "max_steps": STEPS,
        "device": "cpu",
        "dtype": "float32",
        "learning_rate": rate,
    }
    run = options.overlay(presets.preset("demo"), values)
    schedule, draw = run.lr_schedule(STEPS), np.random.default_rng(0)
    found = []
    with rendezvous.join(run.machine) as world:
        replica = Replica(run, world)
        for step in range(STEPS):
            rows = table[draw.integers(count, size=ROWS)].astype(np.int64)
            own = torch.from_numpy(np.array_split(rows, world.size)[world.rank])
            batch = (own[:, :-1].contiguous(), own[:, 1:].contiguous())
            rate_now = lr_at(step, schedule)
            update = trainer.train_step(replica, [batch], ROWS * LENGTH, rate_now)
            assert update is not None
            found.append(update.loss)
    return found


def main() -> None:
    if len(sys.argv) > 1:
        out, dtype, rate = sys.argv[1:]
        found = losses(dtype, float(rate))  # the same on all ranks
        Path(out).write_text(json.dumps(found))
        return
    for rate in ("0.024", "0.006"):
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                of_ranks = [measured(Path(folder), ranks, dtype, rate) for ranks in (1, 2, 3)]
            for ranks, found in enumerate(of_ranks[1:], 2):
                apart = [abs(a - b) for a, b in zip(of_ranks[0], found, strict=True)]
                print(
                    f"rate {rate}, {dtype}, {ranks} ranks and one: apart at most "
                    f"{max(apart[:10]):.1e} in 10 updates, {max(apart):.1e} in {STEPS}",
                    flush=True,
                )


def measured(folder: Path, ranks: int, *arguments: str) -> list[float]:
    out = folder / f"{ranks}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *torchrun, __file__, str(out), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: list[float] = json.loads(out.read_text())
    return found


if __name__ == "__main__":
    main()
