"""A residual stream in bfloat16 beside one in float32, under autocast: `python bench/residual.py`.

Bytes that a block saves for the backward pass, and validation losses of small models that are
trained on the bytes of the standard library, with three seeds. Needs a processor with products of
bfloat16, or patience.

Shapes: N bytes, T time.
"""

import argparse
import statistics
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gpt2 import model
from gpt2.config import options, presets
from gpt2.config.lr_schedule import lr_at
from gpt2.config.model import ModelConfig
from gpt2.config.run import RunConfig
from gpt2.distributed import rendezvous
from gpt2.train import trainer
from gpt2.train.replica import Replica

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
ROWS, LENGTH, HELD_OUT = 8, 128, 256
SMALL = {"n_layer": 6, "n_embd": 64, "vocab_size": 256, "block_size": LENGTH, "device": "cpu"}
ARMS = {
    "gpt2": ("gpt2-124m", {"n_head": 2, "learning_rate": 1e-3}),
    "modern": ("fast-124m", {"n_head": 2, "learning_rate": 7e-3, "momentum_warmup": 50}),
}


class Features(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model.build(config)
        self.model.residual_dtype = dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model.features(tokens_BT, torch.arange(tokens_BT.size(1)), None)


def saved_bytes(config: ModelConfig, dtype: torch.dtype | None, is_compiled: bool) -> int:
    """What a forward pass saves, beside the weights and their copies in 16 bits."""
    torch.compiler.reset()
    plain = Features(config, dtype)
    backend = "aot_eager_decomp_partition"
    net = torch.compile(plain, dynamic=False, backend=backend) if is_compiled else plain
    weights = {part.untyped_storage().data_ptr() for part in plain.parameters()}
    matrices = {tuple(part.shape) for part in plain.model.hidden_matrices()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_copy = tuple(tensor.shape) in matrices | {shape[::-1] for shape in matrices}
        if storage.data_ptr() not in weights and not is_copy:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT = torch.zeros(4, LENGTH, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(tokens_BT)  # compiles
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            net(tokens_BT)
    return sum(saved.values())


def print_bytes(arm: str) -> None:
    config = replace(run_of(arm, 1, 0).model, n_embd=192)
    for is_compiled in (False, True):
        found = []
        for dtype in DTYPES.values():
            few, many = (
                saved_bytes(replace(config, n_layer=layers), dtype, is_compiled)
                for layers in (4, 8)
            )
            found.append((many - few) / (4 * 4 * LENGTH * config.n_embd))
        how = "compiled" if is_compiled else "eager"
        shown = ", ".join(f"{dtype} {size:.1f}" for dtype, size in zip(DTYPES, found, strict=True))
        print(f"{arm}, {how}: bytes for each token, block and unit of width: {shown}", flush=True)


def run_of(arm: str, steps: int, seed: int) -> RunConfig:
    preset, values = ARMS[arm]
    more = {
        "total_batch_size": ROWS * LENGTH,
        "mini_batch_size": ROWS,
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "seed": seed,
        "dtype": "bfloat16",
        "compile": "off",
    }
    return options.overlay(presets.preset(preset), SMALL | values | more)


def bytes_of_the_library() -> np.ndarray:
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return np.frombuffer(b"".join(texts), dtype=np.uint8)


def val_loss(run: RunConfig, text_N: np.ndarray) -> float:
    """Loss in nats for each byte of HELD_OUT rows, after a training on the others."""
    rows = len(text_N) // (LENGTH + 1)
    table = torch.from_numpy(text_N[: rows * (LENGTH + 1)].reshape(rows, -1).astype(np.int64))
    held_out, seen = table[:HELD_OUT], table[HELD_OUT:]
    draw = np.random.default_rng(run.machine.seed)
    schedule = run.lr_schedule(run.total_steps(1))
    with rendezvous.join(run.machine) as world:
        replica = Replica(run, world)
        for step in range(schedule.decay_steps):
            some = seen[draw.integers(len(seen), size=ROWS)]
            batch = (some[:, :-1].contiguous(), some[:, 1:].contiguous())
            trainer.train_step(replica, [batch], some[:, 1:].numel(), lr_at(step, schedule))
        with torch.no_grad():
            losses = [
                float(replica.losses(part[:, :-1], part[:, 1:])[0]) for part in held_out.split(ROWS)
            ]
    return sum(losses) / held_out[:, 1:].numel()


def print_losses(arm: str, steps: int, seeds: int, text_N: np.ndarray) -> None:
    differences = []
    for seed in range(seeds):
        run = run_of(arm, steps, seed)
        one, other = (
            val_loss(options.overlay(run, {"residual_dtype": dtype}), text_N) for dtype in DTYPES
        )
        differences.append(other - one)
        print(f"{arm}, seed {seed}: float32 {one:.4f}, bfloat16 {other:.4f}", flush=True)
    print(f"{arm}: bfloat16 is higher by {statistics.mean(differences):.4f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args()
    text_N = bytes_of_the_library()
    for arm in given.arms:
        print_losses(arm, given.steps, given.seeds, text_N)
        print_bytes(arm)


if __name__ == "__main__":
    main()
