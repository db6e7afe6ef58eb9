"""Two tabular transformers and an MLP learn the same function of 19 parameters, side by side.

The data is synthetic. The parameters have the names and usual ranges of the phenomenological MSSM,
and `target` is a smooth formula made up for this example: it computes no physical quantity.

| model | what a number becomes |
|---|---|
| transformer | a token, from sines and cosines of learned frequencies (PLR, arXiv:2203.05556) |
| transformer_tabular | a token: its value times a vector, plus another (arXiv:2106.11959) |
| mlp | an input like the others |

All see the same batches in the same number of steps. The same command again trains only what is
missing; --help lists the flags.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn import TransformerEncoder, TransformerEncoderLayer, functional

from gpt2.cli.parse import guarded, parse
from gpt2.cli.pool_options import ScriptOptions
from gpt2.experiments import api

# B rows, P parameters, T tokens, D width of a token, F frequencies
MASSES = ("mL1", "me1", "mL3", "me3", "mQ1", "mu1", "md1", "mQ3", "mu3", "md3")
RANGES = {
    **dict.fromkeys(("M1", "M2", "mu"), (-4000.0, 4000.0)),
    "M3": (0.0, 4000.0),
    "mA": (100.0, 4000.0),
    "tan_beta": (1.0, 60.0),
    **dict.fromkeys(("At", "Ab", "Atau"), (-4000.0, 4000.0)),
    **dict.fromkeys(MASSES, (100.0, 4000.0)),
}
"""ranges of the 19 parameters, in GeV except tan beta; each is drawn uniformly"""
WIDTH, HEADS, LAYERS, MLP_WIDTH = 32, 4, 2, 128
FREQUENCIES, SPREAD = 16, 0.5
EVAL_EVERY, REPORT_EVERY = 50, 10
TEST_ROWS, SHOWN = 4_000, 150  # SHOWN: test rows in the picture


@dataclass(frozen=True)
class Command:
    """Train two tabular transformers and an MLP on a synthetic function of 19 parameters."""

    models: tuple[str, ...] = ("transformer", "transformer_tabular", "mlp")
    steps: int = 600
    batch_size: int = 128
    train_rows: int = 20_000
    learning_rate: float = 5e-3
    seed: int = 0
    place: ScriptOptions = ScriptOptions(checkpoint_dir=Path("checkpoints/pmssm"))

    def __post_init__(self) -> None:
        if unknown := set(self.models) - set(MODELS):
            raise api.ConfigError(f"--models {min(unknown)}: expected {', '.join(MODELS)}")
        if not self.models or len(set(self.models)) < len(self.models):
            raise api.ConfigError(f"--models {self.models}: expected one or more different models")
        for name in ("steps", "batch_size", "train_rows", "learning_rate"):
            if (value := getattr(self, name)) <= 0:
                raise api.ConfigError(f"{name}={value} must be more than 0")


def target(unit_BP: Tensor) -> Tensor:
    """The made-up formula, (B), of parameters scaled to -1 … 1, (B, P)."""
    p = dict(zip(RANGES, unit_BP.unbind(1), strict=True))
    mixing = p["At"] - 0.5 * p["mu"] * p["tan_beta"]
    return (
        torch.sin(math.pi * p["tan_beta"]) * p["mu"]
        + torch.exp(-4 * mixing**2)
        + torch.tanh(2 * p["mQ3"] * p["mu3"])
        + 0.5 * torch.cos(2 * math.pi * p["mA"])
        + p["M1"] * p["M2"]
        + 0.3 * torch.cos(math.pi * p["M3"]) * p["Ab"]
        + 0.1 * unit_BP.sum(1)
    )


def rows(count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """`count` random rows: parameters scaled to -1 … 1, (B, P), and their targets, (B)."""
    random = torch.Generator().manual_seed(seed)
    low_P, high_P = (torch.tensor(ends) for ends in zip(*RANGES.values(), strict=True))
    drawn_BP = low_P + (high_P - low_P) * torch.rand(count, len(RANGES), generator=random)
    unit_BP = (2 * (drawn_BP - low_P) / (high_P - low_P) - 1).to(device)
    return unit_BP, target(unit_BP)


class LinearTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_PD = nn.Parameter(torch.randn(len(RANGES), WIDTH) / math.sqrt(WIDTH))
        self.bias_PD = nn.Parameter(torch.randn(len(RANGES), WIDTH) / math.sqrt(WIDTH))

    def forward(self, unit_BP: Tensor) -> Tensor:
        return unit_BP[..., None] * self.weight_PD + self.bias_PD


class PeriodicTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates_PF = nn.Parameter(SPREAD * torch.randn(len(RANGES), FREQUENCIES))
        shape = (len(RANGES), 2 * FREQUENCIES, WIDTH)
        self.weight_PFD = nn.Parameter(torch.randn(shape) / math.sqrt(FREQUENCIES))
        self.bias_PD = nn.Parameter(torch.zeros(len(RANGES), WIDTH))

    def forward(self, unit_BP: Tensor) -> Tensor:
        angles_BPF = 2 * math.pi * unit_BP[..., None] * self.rates_PF
        waves_BPF = torch.cat([angles_BPF.sin(), angles_BPF.cos()], -1)
        mixed_BPD = torch.einsum("bpf,pfd->bpd", waves_BPF, self.weight_PFD)
        return functional.relu(mixed_BPD + self.bias_PD)


class Transformer(nn.Module):
    """Predicts from a class token that attends to the tokens of the parameters."""

    def __init__(self, tokens: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens
        self.cls_D = nn.Parameter(torch.randn(WIDTH) / math.sqrt(WIDTH))
        layer = TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, unit_BP: Tensor) -> Tensor:
        cls_BTD = self.cls_D.expand(len(unit_BP), 1, -1)
        seen_BTD = self.layers(torch.cat([cls_BTD, self.tokens(unit_BP)], 1))
        answer: Tensor = self.head(seen_BTD[:, 0])
        return answer


def mlp() -> nn.Module:
    sizes = (len(RANGES), *[MLP_WIDTH] * 3)
    hidden = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*hidden, nn.Linear(MLP_WIDTH, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: Transformer(PeriodicTokens()),
    "transformer_tabular": lambda: Transformer(LinearTokens()),
    "mlp": mlp,
}


def train(
    report: api.Report,
    model: str,
    steps: int,
    batch_size: int,
    train_rows: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Trains one model; returns its values in the comparison. RMSE is in units of the target."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, answers = rows(train_rows, 2 * seed, device)
    held_out, truth = rows(TEST_ROWS, 2 * seed + 1, device)
    torch.manual_seed(seed)
    net = MODELS[model]().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    curve, train_s, began = [], 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        batch = torch.randint(train_rows, (batch_size,), generator=order).to(device)
        loss = functional.mse_loss(net(inputs[batch])[:, 0], answers[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        metrics = {"step": step, "total_steps": steps, "loss": loss.item()}
        if step % EVAL_EVERY == 0 or step == steps:
            train_s += time.perf_counter() - began
            with torch.no_grad():
                predicted = torch.cat([net(part)[:, 0] for part in torch.split(held_out, 1000)])
            metrics["rmse"] = functional.mse_loss(predicted, truth).sqrt().item()
            curve.append((step, metrics["rmse"]))
            began = time.perf_counter()
        if step % REPORT_EVERY == 0 and report(**metrics) != "go":
            raise api.Stopped  # the same command runs the job again, from its beginning
    if not math.isfinite(rmse := curve[-1][1]):
        raise api.UserError("its test error is not finite; use a smaller --learning_rate")
    return {
        "parameters": sum(part.numel() for part in net.parameters()),
        "r2": 1 - rmse**2 / truth.var(correction=0).item(),
        "rmse": rmse,
        "train_s": train_s,
        "curve": curve,
        "pairs": torch.stack([truth, predicted], 1)[:SHOWN],
    }


def listing(records: api.Records) -> Table:
    built = api.table(
        "Synthetic target", "model", "parameters", "test R²", "test RMSE", "training time"
    )
    for name, record in records.items():
        if found := record.result:
            errors = f"{found['r2']:.4f}", f"{found['rmse']:.4f}"
            built.add_row(name, f"{found['parameters']:,}", *errors, api.duration(found["train_s"]))
        else:
            built.add_row(name, "-", "-", "-", record.state)
    return built


def draw(records: api.Records) -> Figure:
    """Test errors over the steps, and final predictions against the true values."""
    found = {name: record.result for name, record in records.items() if record.result}
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    curves, points = figure.subplots(1, 2)
    for name, result in found.items():
        curves.plot(*zip(*result["curve"], strict=True), "o-", markersize=3, label=name)
        points.scatter(*zip(*result["pairs"], strict=True), s=11, alpha=0.6, linewidths=0)
    truth = [pair[0] for result in found.values() for pair in result["pairs"]]
    points.axline((min(truth), min(truth)), slope=1, color="#888888", linewidth=1)
    curves.set(xlabel="step", ylabel="test RMSE", ylim=(0, None), title="synthetic target: error")
    points.set(xlabel="true", ylabel="predicted", title=f"the first {SHOWN} test rows")
    curves.legend()
    return figure


def run() -> int:
    command = parse(Command, sys.argv[1:])
    fields = ("steps", "batch_size", "train_rows", "learning_rate", "seed")
    common = {name: getattr(command, name) for name in fields}
    models = {name: partial(train, model=name, **common) for name in command.models}
    with command.place.placed(at_once=min(2, len(models))) as place:
        group = api.together(models, listing=listing, draw=draw, log_name="training", **place)
    return group.exit_code


if __name__ == "__main__":
    sys.exit(guarded(run))
