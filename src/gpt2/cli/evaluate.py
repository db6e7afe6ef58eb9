"""`gpt2 evaluate`: how good a trained model is, beside GPT-2's published figures."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import gpt2
from gpt2.base import log, validation
from gpt2.base.errors import ConfigError
from gpt2.base.text import console, counted, table
from gpt2.base.validation import suggestion
from gpt2.cli.loading import Loaded, Source, load_model
from gpt2.cli.parse import guarded, parse
from gpt2.config import options, presets, run
from gpt2.evaluation import baselines
from gpt2.evaluation.baselines import Style

if TYPE_CHECKING:
    import torch

    from gpt2.distributed.world import World


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a trained model: HellaSwag, and the loss on a validation split. Under torchrun, all
    ranks share the work."""

    source: Source = Source()
    tasks: str = "hellaswag,val"
    """what to measure, separated by commas"""
    limit: int | None = None
    """the first so many HellaSwag tasks, and so many rows of the split; None is all tasks, and as
    many rows as the run validated on (as a run by default, for models of other tools)"""
    style: Style = "completion"
    """HellaSwag as GPT-2's replications put it, or as lm-evaluation-harness does"""
    hellaswag_path: Path | None = None
    """file of tasks (.jsonl, .jsonl.gz); None loads them once and keeps them in data/hellaswag"""
    data_root: str | None = None
    """shards whose validation split is measured; None is the run's own"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the model's matrix products; the logits are computed in float32"""
    batch_tokens: int = 4096
    """tokens of HellaSwag that go through the model at once, at most"""
    output: Path = Path("results.json")
    """file for the results"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        validation.require_at_least(self, 1, "limit", "batch_tokens")
        for name in self.names:
            if name not in MEASURES:
                raise ConfigError(
                    f"task {name!r} is unknown{suggestion(name, list(MEASURES))}; "
                    f"there are {', '.join(MEASURES)}"
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


Measure = Callable[[], list[Figure]]


def evaluate_main() -> int:
    """`gpt2 evaluate`."""
    from gpt2.distributed import rendezvous

    rank = rendezvous.env_rank()[0]
    speaks = rank == 0
    log.setup(rank=rank)

    def body() -> int:
        with rendezvous.reported_by_local_rank0():
            command = parse(EvaluateCommand, sys.argv[1:], speak=speaks)
        with rendezvous.join(run.MachineConfig(device=command.device)) as world:
            loaded = load_model(command.source)
            world.run_on_rank0(lambda: _write(command, loaded, []))  # it can be written
            # What is not there is known before the first measure begins.
            measures = [MEASURES[name](command, loaded, world) for name in command.names]
            loaded.model.to(world.device)
            figures: list[Figure] = []
            for measure in measures:
                figures += measure()
                if world.is_rank0:
                    _write(command, loaded, figures)
            if world.is_rank0:
                _show(loaded, figures)
                print(f"Written to {command.output}")
        return 0

    return guarded(body, tell=rendezvous.tell_torchrun)


def _hellaswag(command: EvaluateCommand, loaded: Loaded, world: "World") -> Measure:
    from gpt2.evaluation import hellaswag

    tasks = world.run_on_rank0(
        lambda: hellaswag.load(command.hellaswag_path, command.limit, command.style)
    )

    def measure() -> list[Figure]:
        score = hellaswag.evaluate(
            loaded.model,
            tasks,
            world,
            _autocast(command, world),
            command.batch_tokens,
            track=_progress("HellaSwag", world),
        )
        assert score is not None
        count, about = counted(score.tasks, "task"), {"style": command.style}
        shares = {"acc": score.acc, "acc_norm": score.acc_norm}
        known = baselines.HELLASWAG[command.style]
        return [
            Figure("hellaswag", about, metric, share, score.error(share), count, theirs)
            for (metric, share), theirs in zip(shares.items(), known, strict=True)
        ]

    return measure


def _validation(command: EvaluateCommand, loaded: Loaded, world: "World") -> Measure:
    from gpt2.data import sampler
    from gpt2.data.remote import Storage
    from gpt2.data.shards import TokenDataset, load_index
    from gpt2.evaluation.loss import row_losses
    from gpt2.train.setup import cache_of, require_known_ids

    settings, root = presets.preset("gpt2-124m"), command.data_root
    if loaded.config is not None:
        settings = options.of_stored(loaded.config)
        root = root or settings.data.data_root
    if root is None:
        raise ConfigError(
            f"{loaded.source} does not say what it was trained on; name shards with --data_root, "
            "or use --tasks hellaswag"
        )
    settings = replace(settings, model=loaded.model.config)
    data = load_index(Storage(root), cache_of(settings))
    require_known_ids(settings, data)
    shards = TokenDataset(data, "val", loaded.model.config.block_size)
    rows = sampler.spread(shards.rows_per_shard, command.limit or settings.eval_rows)

    def measure() -> list[Figure]:
        losses = row_losses(
            loaded.model, shards, rows, world, _autocast(command, world), _progress("val", world)
        )
        mean = float(np.mean(losses))
        error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) if losses[1:] else math.nan
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(mean))
        count, about = counted(len(losses), "row"), {"data": root}
        theirs = baselines.LOSS.get(data.corpus or "")
        return [
            Figure("val", about, "loss", mean, error, count, theirs),
            Figure("val", about, "perplexity", perplexity, perplexity * error, count),
        ]

    return measure


MEASURES: dict[str, Callable[[EvaluateCommand, Loaded, "World"], Measure]] = {
    "hellaswag": _hellaswag,
    "val": _validation,
}


def _show(loaded: Loaded, figures: list[Figure]) -> None:
    listing = table(str(loaded), "what", "metric", "value", "± std. error", "of", "GPT-2 124M")
    for figure in figures:
        theirs = "" if figure.gpt2 is None else f"{figure.gpt2:.4f}"
        value, error = f"{figure.value:.4f}", f"{figure.error:.4f}"
        what = f"{figure.task} ({', '.join(figure.about.values())})"
        listing.add_row(what, figure.metric, value, error, figure.count, theirs)
    console().print(listing)


def _write(command: EvaluateCommand, loaded: Loaded, figures: list[Figure]) -> None:
    from gpt2.base import atomic_files

    results: dict[str, dict[str, Any]] = {}
    for figure in figures:
        values = {figure.metric: figure.value, f"{figure.metric}_stderr": figure.error}
        numbers = {name: x if math.isfinite(x) else None for name, x in values.items()}
        results.setdefault(figure.task, {**figure.about, "of": figure.count}).update(numbers)
    report = {
        "model": loaded.source,
        "step": loaded.step,
        "results": results,
        "dtype": command.dtype,
        "version": gpt2.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        atomic_files.write_text(command.output, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {command.output}: {error.strerror}; choose another file with --output"
        ) from error


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
        rounds, what, console=bar, transient=True, disable=not (world.is_rank0 and bar.is_terminal)
    )
