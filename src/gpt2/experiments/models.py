"""Several models on the same data and token budget, at the same time."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console, RenderableType

from gpt2 import config, estimate, plot
from gpt2.config import ModelConfig, RunConfig
from gpt2.errors import ConfigError
from gpt2.experiments import comparison, plan, training
from gpt2.experiments import ledger as ledgers
from gpt2.experiments.board import Board
from gpt2.experiments.comparison import Row
from gpt2.experiments.ledger import About, Ledger, Record
from gpt2.experiments.plan import Answer, Event, Job, Slot
from gpt2.experiments.pool import Limits, Pool
from gpt2.experiments.process import Engine
from gpt2.experiments.view import watched
from gpt2.shape import ARCHITECTURES

AT_ONCE = 2
"""slots at most, where nobody says how many"""
TABLE, PICTURE = "comparison.csv", "comparison.png"
MODELS: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in ARCHITECTURES}
"""what is compared, with the options by which the training of each differs from the others"""


@dataclass(frozen=True)
class Comparison:
    """The same training with several models."""

    run: RunConfig
    """what they have in common"""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=MODELS.copy)
    """name -> options of its own"""
    folder: Path = Path("checkpoints/models")
    log_dir: Path = Path("logs")
    begun: str = field(default_factory=lambda: time.strftime("%Y%m%d_%H%M%S"))
    """which the names of the logs end with"""
    ranks: int = 1
    """GPUs of each training, or processes on the CPU"""

    def __post_init__(self) -> None:
        training.require_fresh_start(self.run)
        if self.run.checkpoint.init_from != "scratch":
            raise ConfigError("--init_from does not go with several models: weights fit one only")
        if self.run.model.architecture != ModelConfig().architecture:
            raise ConfigError("--architecture is what is compared; --models chooses among them")
        for name in self.models:
            self.run_of(name)  # raises for what this model cannot be

    def run_of(self, name: str) -> RunConfig:
        """The training of one model."""
        try:
            return config.overlay(self.run, self.models[name])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def about(self) -> About:
        """What all trainings have in common; models may be added later."""
        own = {option for options in self.models.values() for option in options}
        decisive = training.decisive(self.run)
        fixed = {name: value for name, value in decisive.items() if name not in own}
        return About("models", fixed, total=len(self.models))

    def jobs(self, names: Sequence[str], count: int) -> list[Job]:
        """The trainings of these models, for `count` slots."""
        places = plan.model_slots(len(names), count)
        return [
            replace(self._job(name), slot=place) for name, place in zip(names, places, strict=True)
        ]

    def _job(self, name: str) -> Job:
        return training.job(name, self.run_of(name), self.folder / name, ranks=self.ranks)

    def log(self, name: str) -> Path:
        """The log of a worker by its model, or `training` for the owner's."""
        return self.log_dir / f"{name}_{self.begun}.log"


class Models:
    """The source of the trainings; keeps their results."""

    def __init__(self, jobs: Sequence[Job], ledger: Ledger) -> None:
        self._jobs, self._ledger = iter(jobs), ledger
        self.busy_s = 0.0
        """of all slots together"""

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def event(self, event: Event) -> Answer:
        if event.kind in ("finished", "failed", "retried", "stopped"):
            self.busy_s += event.elapsed_s
        if event.kind in ("finished", "failed"):
            assert event.job is not None
            self._ledger.add(Record.of(event, {"model": event.job.name}))
        return "go"


class Diary:
    """What the owner says: on the console and, without colours, in its log."""

    def __init__(self, out: Console, asked: Comparison) -> None:
        log = asked.log("training")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8", buffering=1)
        plain = Console(file=self._log, width=160, highlight=False, markup=False)
        self._consoles = (out, plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._log.close()

    def say(self, text: RenderableType, style: str | None = None) -> None:
        for console in self._consoles:
            with contextlib.suppress(OSError):  # a full disk, or a terminal that is gone
                console.print(text, style=style, soft_wrap=isinstance(text, str))


def at_once(
    models: int, count: int | None, are_gpus_named: bool, parallel: bool, ddp: int = 1
) -> tuple[int | None, int | None]:
    """How many slots, and on how many GPUs at most, `models` trainings have: two unless more are
    asked for, one if not `parallel`; each on `ddp` GPUs. None is no limit."""
    if models == 1 or not parallel:
        return 1, None
    return count, None if count or are_gpus_named else AT_ONCE * ddp


def run(asked: Comparison, engine: Engine, limits: Limits, out: Console) -> int:
    """Trains the models that have not finished yet, and compares all; the exit code: 1 if one has
    failed, 128 and the signal's number if it was stopped."""
    training.require_data(asked.run, asked.ranks)
    with ledgers.opened(asked.folder, asked.about()) as ledger, Diary(out, asked) as diary:
        waiting = [name for name in asked.models if not ledger.is_done(name)]
        _introduce(asked, waiting, engine.slots, diary)
        source = Models(asked.jobs(waiting, len(engine.slots)), ledger)
        began, number = time.monotonic(), 0
        if waiting:
            board = Board(
                "models", len(asked.models), engine.slots, before=len(asked.models) - len(waiting)
            )
            with watched(board, asked.folder, log=asked.log("training"), out=out) as on_event:
                number = Pool(
                    engine,
                    source,
                    on_event,
                    log_of=lambda _, job: asked.log(job.name),
                    limits=limits,
                ).run()
        took_s = time.monotonic() - began
        _conclude(asked, ledger, diary)
        left = [name for name in asked.models if not ledger.is_done(name)]
        if number and left:
            diary.say(f"Stopped: {', '.join(left)} left; the same command goes on")
            return 128 + number
        if len(waiting) > 1 and len(engine.slots) > 1:
            diary.say(comparison.saved_time(took_s, source.busy_s, _are_shared(engine)))
        for name in left:
            reason = ledger.records[name].reason if name in ledger.records else "no slot is left"
            diary.say(f"FAILED {name}: {reason} ({asked.log(name)})", style="red")
        return 1 if left else 0


def _are_shared(engine: Engine) -> bool:
    """Whether a training alone on this machine would have more than its slot gives it."""
    gpus = {slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in engine.slots}
    return engine.is_fixed and (None in gpus or len(gpus) < len(engine.slots))


def _introduce(
    asked: Comparison, waiting: Sequence[str], places: Sequence[Slot], diary: Diary
) -> None:
    data = asked.run.data
    budget = f"{data.epochs} epochs of {data.data_root}"
    if data.max_steps is not None:
        budget = f"{data.max_steps * data.total_batch_size:,} tokens of {data.data_root}"
    diary.say(f"Models {', '.join(asked.models)}: {budget} each")
    if done := [name for name in asked.models if name not in waiting]:
        diary.say(f"  - finished already: {', '.join(done)}")
    where = plan.names(places, asked.ranks)
    if len(places) > 1:
        diary.say(f"  - {min(len(places), len(waiting))} at a time, on {where}")
    elif len(waiting) > 1:
        diary.say(f"  - one after another, on {where}")
    diary.say(f"  - results {asked.folder}, logs {asked.log('*')}")


def _conclude(asked: Comparison, ledger: Ledger, diary: Diary) -> None:
    """The table and the picture, on the console and in files."""
    rows = [_row(asked, ledger.records[name]) for name in asked.models if name in ledger.records]
    if not rows:
        return
    diary.say("")
    diary.say(comparison.listing(rows))
    ledger.save(summary=[asdict(row) for row in rows])
    kept = [str(asked.folder / ledgers.RESULTS), TABLE, PICTURE]
    runs = comparison.logged(asked.folder, list(asked.models))
    batch_tokens = asked.run.data.total_batch_size
    try:
        comparison.write_csv(rows, asked.folder / TABLE)
        if runs:
            plot.write(lambda: comparison.draw(runs, batch_tokens), asked.folder / PICTURE)
        else:
            kept.remove(PICTURE)
        diary.say(f"Kept: {', '.join(kept)}")
    except (ConfigError, OSError) as error:
        diary.say(f"WARNING: not everything could be kept: {error}")


def _row(asked: Comparison, record: Record) -> Row:
    parameters = estimate.parameter_count(asked.run_of(record.job).model)
    return Row.of(record.job, parameters, record.state, record.result)
