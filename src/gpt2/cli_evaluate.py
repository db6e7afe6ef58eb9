"""`gpt2 evaluate`: how good a trained model is, beside GPT-2's published figures."""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gpt2
from gpt2 import config
from gpt2.cli_model import Loaded, load_model
from gpt2.cli_parse import guarded, parse
from gpt2.errors import ConfigError
from gpt2.tables import console, counted, table

if TYPE_CHECKING:
    import torch

    from gpt2.distributed import World

TASKS = ("hellaswag", "val")


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a trained model: HellaSwag, and the loss on the validation split."""

    checkpoint: str = "latest"
    """latest, best, a step, a path; hf:FOLDER and nanogpt:FILE are other people's models"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run's checkpoints"""
    tasks: str = "hellaswag,val"
    """what to measure, separated by commas"""
    limit: int | None = None
    """the first so many HellaSwag tasks, and so many rows of the split; None is all tasks, and the
    rows that the run validated on"""
    style: Literal["completion", "harness"] = "completion"
    """HellaSwag as GPT-2's replications put it, or as lm-evaluation-harness does"""
    hellaswag_path: Path | None = None
    """file of tasks (.jsonl, .jsonl.gz); None loads them once and keeps them in data/hellaswag"""
    data_root: str | None = None
    """shards whose validation split is measured; None is the run's own"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the matrix products; logits are float32 in both"""
    batch_tokens: int | None = None
    """tokens of HellaSwag that go through the model at once; None is what suits the device"""
    output: Path = Path("results.json")
    """file for the results"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "limit", "batch_tokens")
        for name in self.names:
            if name not in TASKS:
                raise ConfigError(
                    f"task {name!r} is unknown{config.suggestion(name, list(TASKS))}; "
                    f"there are {', '.join(TASKS)}"
                )

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",")]


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    task: str
    about: Mapping[str, str]
    """what the task was, in detail"""
    metric: str
    value: float
    error: float
    """standard error"""
    count: str
    gpt2: float | None = None
    """what GPT-2 124M reaches"""


def evaluate_main() -> int:
    """`gpt2 evaluate`."""

    def body() -> int:
        command = parse(EvaluateCommand, sys.argv[1:])
        from gpt2 import distributed

        with distributed.join(config.MachineConfig(device=command.device)) as world:
            loaded = load_model(
                command.checkpoint_dir, command.checkpoint, command.trust_checkpoint
            )
            loaded.model.to(world.device)
            figures = [
                figure
                for name in command.names
                for figure in MEASURES[name](command, loaded, world)
            ]
            if world.is_main:
                _show(loaded, figures)
                _write(command, loaded, figures)
        return 0

    return guarded(body)


def _hellaswag(command: EvaluateCommand, loaded: Loaded, world: "World") -> list[Figure]:
    from gpt2.evaluation import hellaswag

    tasks = world.on_main(
        lambda: hellaswag.load(command.hellaswag_path, command.limit, command.style)
    )
    score = hellaswag.evaluate(
        loaded.model,
        tasks,
        world,
        _autocast(command, world),
        command.batch_tokens,
        track=_progress("HellaSwag", world),
    )
    assert score is not None
    count = counted(score.tasks, "task")
    known = hellaswag.PUBLISHED[command.style]
    about = {"style": command.style}
    return [
        Figure("hellaswag", about, metric, share, score.error(share), count, published)
        for metric, share, published in zip(
            ("acc", "acc_norm"), (score.acc, score.acc_norm), known, strict=True
        )
    ]


def _validation(command: EvaluateCommand, loaded: Loaded, world: "World") -> list[Figure]:
    from gpt2.data import order
    from gpt2.data.shards import ShardSet, catalog
    from gpt2.data.storage import Storage
    from gpt2.evaluation.loss import row_losses
    from gpt2.judge import gpt2_124m_loss

    root, rows = command.data_root, command.limit
    block_size = loaded.model.config.block_size
    if loaded.config is not None:
        run, settings = loaded.config["data"], loaded.config["evaluation"]
        root = root or run["data_root"]
        rows = rows or settings["eval_batches"] * run["total_batch_size"] // block_size
    if root is None:
        raise ConfigError(
            f"{loaded.source} does not say what it was trained on; name shards with --data_root, "
            "or use --tasks hellaswag"
        )
    data = catalog(Storage(root))
    shards = ShardSet(data, "val", block_size)
    spread = order.spread(shards.rows_per_shard, rows or sum(shards.rows_per_shard))
    losses = row_losses(
        loaded.model, shards, spread, world, _autocast(command, world), _progress("val", world)
    )
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    count, about = counted(len(losses), "row"), {"data": root}
    mean = statistics.fmean(losses)
    perplexity = math.exp(mean)
    return [
        Figure("val", about, "loss", mean, error, count, gpt2_124m_loss(data)),
        Figure("val", about, "perplexity", perplexity, perplexity * error, count),
    ]


MEASURES: dict[str, Callable[[EvaluateCommand, Loaded, "World"], list[Figure]]] = {
    "hellaswag": _hellaswag,
    "val": _validation,
}


def _show(loaded: Loaded, figures: list[Figure]) -> None:
    listing = table(str(loaded), "what", "metric", "value", "± std. error", "of", "GPT-2 124M")
    for figure in figures:
        published = "" if figure.gpt2 is None else f"{figure.gpt2:.4f}"
        value, error = f"{figure.value:.4f}", f"{figure.error:.4f}"
        what = f"{figure.task} ({', '.join(figure.about.values())})"
        listing.add_row(what, figure.metric, value, error, figure.count, published)
    console().print(listing)


def _write(command: EvaluateCommand, loaded: Loaded, figures: list[Figure]) -> None:
    from gpt2 import atomic

    results: dict[str, dict[str, Any]] = {}
    for figure in figures:
        values: dict[str, Any] = {
            figure.metric: figure.value,
            f"{figure.metric}_stderr": figure.error,
        }
        results.setdefault(figure.task, {**figure.about, "of": figure.count}).update(values)
    report = {
        "model": loaded.source,
        "step": loaded.step,
        "results": results,
        "dtype": command.dtype,
        "version": gpt2.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        atomic.write_text(command.output, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {command.output}: {error.strerror}; choose another file with --output"
        ) from error
    print(f"Written to {command.output}")


def _autocast(command: EvaluateCommand, world: "World") -> "torch.autocast":
    import torch

    enabled = command.dtype == "bfloat16"
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=enabled)


def _progress(what: str, world: "World") -> Callable[[Sequence[int]], Iterable[int]]:
    """A bar on the terminal of the main rank."""
    from rich.console import Console
    from rich.progress import track

    bar = Console(stderr=True)
    return lambda rounds: track(
        rounds, what, console=bar, transient=True, disable=not (world.is_main and bar.is_terminal)
    )
