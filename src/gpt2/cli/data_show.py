"""`gpt2 data show`: the shards of a data set, their text, the rows of a step, and statistics."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2.base import addresses
from gpt2.base.errors import ConfigError
from gpt2.base.text import console, counted
from gpt2.base.validation import LARGEST, LARGEST_SEED, require, require_within
from gpt2.cli import train
from gpt2.cli.parse import CommandOptions
from gpt2.config import options, presets
from gpt2.config.run import PresetName, RunConfig
from gpt2.data import excerpt, shards, statistics, training_data
from gpt2.data.manifest import Split
from gpt2.data.remote import Storage
from gpt2.data.sampler import MOST_ROWS, Shuffle
from gpt2.data.shards import DatasetIndex
from gpt2.data.training_data import UNNAMED
from gpt2.inspection import document_lengths, figures
from gpt2.inspection.data_views import (
    RowPlace,
    RowView,
    ShardLine,
    ShardsView,
    StatisticsView,
    StepView,
    View,
)


@dataclass(frozen=True)
class OrderOptions:
    """Options of a run that decide which rows a step reads."""

    preset: PresetName = "gpt2-124m"
    """configuration of the run; the options below override it"""
    config: Path | None = None
    """TOML file with options of the run"""
    block_size: int | None = None
    """tokens of a row; without it and the next four, preset and file decide"""
    total_batch_size: int | None = None
    """tokens per step, over all ranks"""
    batch_ramp: tuple[str, ...] | None = None
    """fewer tokens per step at first, as STEP:TOKENS up to each step"""
    seed: int | None = None
    """seed of the shuffling"""
    shuffle: Shuffle | None = None
    """what each epoch permutes: the shards; also the rows within each shard; all rows of all shards
    (global); or nothing"""

    def __post_init__(self) -> None:
        require_within(self, 1, 10**9, "block_size")
        require_within(self, 1, LARGEST, "total_batch_size")
        require_within(self, 0, LARGEST_SEED, "seed")

    def row_tokens(self) -> int:
        """The block size, whether or not it fits the other options of a run."""
        return self.block_size or self._without_flags().model.block_size

    def run(self) -> RunConfig:
        """The run; raises ConfigError as `gpt2 train` does."""
        names = ("block_size", "total_batch_size", "batch_ramp", "seed", "shuffle")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return options.overlay(self._without_flags(), given)

    def _without_flags(self) -> RunConfig:
        run = presets.preset(self.preset)
        return train.with_file(run, self.config) if self.config else run


@dataclass(frozen=True)
class Show(CommandOptions):
    """Show the table of shards and the text at the beginning of one; or the text of a row; or the
    rows of a training step; or statistics of all documents."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """folder, glob or URL of shards"""
    shard: int | None = None
    """number of the shard in the table; default is the first training shard"""
    tokens: int = 100
    """number of tokens to decode"""
    row: int | None = None
    """show this row of the shard"""
    step: int | None = None
    """show the rows that a run trains on after so many updates; this update is STEP + 1 in its
    log"""
    rows: int = 3
    """number of rows of the step to show as text"""
    stats: bool = False
    """read everything and show statistics of the documents"""
    split: Split | None = None
    """split of the statistics; default is both"""
    plot: Path | None = None
    """draw the histogram of the statistics to this file: .png, .svg or .pdf"""
    json: bool = False
    """print one JSON object"""
    order: OrderOptions = OrderOptions()

    def __post_init__(self) -> None:
        require_within(self, 0, LARGEST, "shard", "tokens", "row", "step", "rows")
        _require_apart(self, "row", "step", "stats")
        _require_apart(self, "shard", "step", "stats")
        for name in ("split", "plot"):
            needs_stats = getattr(self, name) is not None
            require(self.stats or not needs_stats, f"--{name} is for statistics; add --stats")
        if self.plot is not None:
            figures.require_kind(self.plot, "--plot")


def _require_apart(command: Show, *names: str) -> None:
    """Raises ConfigError if more than one of these options is given."""
    given = [name for name in names if getattr(command, name) not in (None, False)]
    require(len(given) < 2, f"use either {' or '.join(f'--{name}' for name in given)}")


def show(command: Show) -> int:
    """Runs the command."""
    view = _view(command, shards.load_index(Storage(command.root)))
    if command.json:
        print(json.dumps(addresses.public(asdict(view))))
    else:
        view.print_to(console())
    return 0


def _view(command: Show, index: DatasetIndex) -> View:
    if command.stats:
        return _statistics(command, index)
    if command.step is not None:
        return _step(command, index, command.step)
    number = _shard_number(command, index)
    if command.row is not None:
        return _row(command, index, number, command.row)
    lines = [ShardLine.of(place, shard) for place, shard in enumerate(index.shards)]
    beginning = excerpt.read(index, number, 0, command.tokens)
    used = index.tokenizer
    return ShardsView(command.root, used.name, used.vocab_size, tuple(lines), beginning)


def _shard_number(command: Show, index: DatasetIndex) -> int:
    """The shard that is meant; raises ConfigError if there is none with this number."""
    first = next((n for n, item in enumerate(index.shards) if item.split == "train"), 0)
    number = first if command.shard is None else command.shard
    last = len(index.shards) - 1
    require(number <= last, f"shard={number} is not in the table; expected 0 to {last}")
    return number


def _row(command: Show, index: DatasetIndex, number: int, row: int) -> RowView:
    """A row of shard `number`; raises ConfigError if there is none with this number."""
    tokens, length = index.shards[number].tokens, command.order.row_tokens()
    last = (tokens - 1) // length - 1
    if last < 0:
        raise ConfigError(
            f"shard {number} has {counted(tokens, 'token')}, too few for one row of "
            f"block_size={length} and its target; use --block_size {max(1, tokens - 1)} or less"
        )
    require(
        row <= last,
        f"row={row} is not in shard {number}; expected 0 to {last} with block_size={length}",
    )
    return RowView(command.root, length, row, excerpt.read(index, number, row * length, length))


def _step(command: Show, index: DatasetIndex, step: int) -> StepView:
    """The rows of a step of the run that the options describe."""
    if training_data.has_several_corpora(command.root):
        raise ConfigError(
            f"{command.root} has several corpora, which a run mixes; type gpt2 data order "
            f"--data_root '{command.root}' --step {step}, or name the folder of one of them"
        )
    run = command.order.run()
    length = run.model.block_size
    sampler = run.sampler({UNNAMED: shards.rows_per_shard(index, "train", length)})
    last = MOST_ROWS // sampler.rows_per_step
    require(step <= last, f"step={step} is too large; expected 0 to {last}")
    numbers = [number for number, shard in enumerate(index.shards) if shard.split == "train"]
    rows = [RowPlace(numbers[shard], row) for shard, row in sampler.rows(step).tolist()]
    texts = [
        excerpt.read(index, place.shard, place.row * length, length)
        for place in rows[: command.rows]
    ]
    return StepView(
        root=command.root,
        step=step,
        epochs=tuple(sampler.epochs_of(step)),
        block_size=length,
        total_batch_size=run.data.total_batch_size,
        batch_ramp=run.data.batch_ramp,
        seed=run.machine.seed,
        shuffle=run.data.shuffle,
        rows=tuple(rows),
        excerpts=tuple(texts),
    )


def _statistics(command: Show, index: DatasetIndex) -> StatisticsView:
    """The statistics of one split or both; draws them, too, if that is wanted."""
    read = statistics.stream_of(index, command.split)
    bar = Console(stderr=True)
    with Progress(
        TextColumn("Reading"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:,} of {task.total:,} tokens"),
        TimeRemainingColumn(compact=True),
        console=bar,
        transient=True,
        disable=not bar.is_terminal,
    ) as progress:
        task = progress.add_task("", total=sum(shard.tokens for shard in read))
        found = statistics.measure(
            index, read, command.order.row_tokens(), lambda tokens: progress.advance(task, tokens)
        )
    if command.plot is not None:
        figures.write(
            lambda: document_lengths.draw(found.lengths, command.root), command.plot, flag="--plot"
        )
    splits = tuple(dict.fromkeys(shard.split for shard in read))
    return StatisticsView(command.root, splits, found)
