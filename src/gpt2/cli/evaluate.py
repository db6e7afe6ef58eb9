"""`gpt2 evaluate`: measures a trained model and compares it with GPT-2's published figures."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

import gpt2
from gpt2.base import addresses, atomic_files, log, validation
from gpt2.base.control_characters import visible
from gpt2.base.errors import ConfigError, DataError
from gpt2.base.text import console, counted, table
from gpt2.base.validation import suggestion
from gpt2.cli.loading import LoadedModel, load_model
from gpt2.cli.model_source import ModelSource
from gpt2.cli.parse import CommandOptions, guarded, parse
from gpt2.config import options, presets
from gpt2.config.run import EvalConfig, MachineConfig
from gpt2.data import saved_tokenizer
from gpt2.data.shards import DatasetIndex
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.distributed import precision, rendezvous
from gpt2.distributed.world import World
from gpt2.evaluation import baselines, hellaswag
from gpt2.evaluation.baselines import PromptStyle
from gpt2.evaluation.loss import Loss, row_losses
from gpt2.evaluation.measured_value import Measure, MeasuredValue
from gpt2.evaluation.rounds import MeasurementFailed
from gpt2.train import dataset
from gpt2.train.evaluator import validation_rows


@dataclass(frozen=True)
class EvaluateCommand(CommandOptions):
    """Measure a trained model: HellaSwag accuracy, and the loss on a validation split, per token
    and per byte. Under torchrun, all ranks share the work."""

    source: ModelSource = ModelSource()
    tasks: str = "hellaswag,val"
    """what to measure, separated by commas"""
    limit: int | None = None
    """number of HellaSwag tasks, and of rows of the validation split;
    None is all tasks, and as many rows as the run validates on"""
    style: PromptStyle = "completion"
    """format of HellaSwag: of GPT-2's replications, or of lm-evaluation-harness"""
    hellaswag_path: Path | None = None
    """file of tasks (.jsonl, .jsonl.gz); None downloads them once to data/hellaswag"""
    data_root: tuple[str, ...] = ()
    """shards whose validation split is measured; default is those of the run"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the model's matrix products; the logits are computed in float32"""
    batch_tokens: int | None = None
    """largest number of HellaSwag tokens in one batch; None is 16384 on CUDA, 4096 on the CPU"""
    output: Path = Path("results.json")
    """file for the results"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        validation.require_within(self, 1, validation.LARGEST, "limit", "batch_tokens")
        for name in self.names:
            if name not in MEASURES:
                raise ConfigError(
                    f"task {name!r} is unknown{suggestion(name, list(MEASURES))}; "
                    f"expected {', '.join(MEASURES)}"
                )

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",")]


def evaluate_main() -> int:
    """`gpt2 evaluate`."""
    return guarded(_evaluate_as_rank)


def _evaluate_as_rank() -> int:
    rank, _, local_rank, _ = rendezvous.env_rank()

    def body() -> int:
        with rendezvous.reported_by_local_rank0():
            command = parse(EvaluateCommand, sys.argv[1:], quiet=local_rank > 0)
        log.setup(command.log_level, rank=rank)
        with rendezvous.join(MachineConfig(device=command.device)) as world:
            loaded = load_model(command.source, world)
            # A file that cannot be written, missing tasks and missing data fail before any measure.
            world.run_on_rank0(lambda: _write(command, loaded, []))
            measures = [MEASURES[name](command, loaded, world) for name in command.names]
            loaded.model.to(world.device)
            measured: list[MeasuredValue] = []
            for measure in measures:
                try:
                    measured += measure()
                except MeasurementFailed as failure:
                    raise failure.own_error or failure from None
                if world.is_rank0:
                    _write(command, loaded, measured)
            if world.is_rank0:
                _show(loaded, measured)
                print(visible(f"Written to {command.output}"))
        return 0

    return guarded(body, rank=rank, report=rendezvous.report_to_torchrun)


def _hellaswag(command: EvaluateCommand, loaded: LoadedModel, world: World) -> Measure:
    loaded.require_tokens_of_bytes("; use --tasks val")
    tokenizer = loaded.tokenizer
    tasks = world.run_on_rank0(
        lambda: hellaswag.load(
            command.hellaswag_path, command.limit, command.style, tokenizer=tokenizer
        )
    )

    def measure() -> list[MeasuredValue]:
        score = hellaswag.evaluate(
            loaded.model,
            tasks,
            world,
            _autocast(command, world),
            command.batch_tokens,
            track=_progress("HellaSwag", world),
            vocab_size=tokenizer.vocab_size,
        )
        assert score is not None
        count, about = counted(score.tasks, "task"), {"style": command.style}
        shares = {"acc": score.acc, "acc_norm": score.acc_norm}
        references = baselines.HELLASWAG[command.style]
        return [
            MeasuredValue("hellaswag", about, metric, share, score.error(share), count, reference)
            for (metric, share), reference in zip(shares.items(), references, strict=True)
        ]

    return measure


def _validation(command: EvaluateCommand, loaded: LoadedModel, world: World) -> Measure:
    settings, roots = presets.preset("gpt2-124m"), command.data_root
    if loaded.config is not None:
        settings = options.of_stored(loaded.config)
        roots = roots or settings.data.data_root
    if not roots:
        raise ConfigError(
            f"{loaded.source} does not record its training data; name shards with --data_root, "
            "or use --tasks hellaswag"
        )
    if command.data_root == () and any(map(addresses.has_secret, roots)):
        raise ConfigError(
            f"the address of the training data of {loaded.source} has a password, which is not "
            "stored; type it with --data_root"
        )
    settings = replace(
        settings,
        model=loaded.model.config,
        data=replace(settings.data, data_root=roots, mixture=()),
    )
    data = dataset.find(settings, None if command.data_root else loaded.corpora)
    if not saved_tokenizer.is_same(loaded.recorded_tokenizer, data.tokenizer):
        theirs, ours = map(saved_tokenizer.described, (data.tokenizer, loaded.tokenizer))
        raise DataError(
            f"{data} has tokens of {theirs}, {loaded.source} was trained on those of "
            f"{ours}; name other shards with --data_root"
        )
    dataset.with_vocab_size(settings, data)
    if command.limit is not None:
        settings = replace(settings, evaluation=EvalConfig(eval_rows=command.limit))
    rows = validation_rows(settings, data)

    def measure() -> list[MeasuredValue]:
        of_corpora: list[MeasuredValue] = []
        of_all: list[Loss] = []
        for name, (shards, some) in rows.items():
            track = _progress(f"val {name}".strip(), world)
            losses = row_losses(loaded.model, shards, some, world, _autocast(command, world), track)
            of_all += losses
            index = data.corpora[name]
            about = {"data": f"{name} in {index.storage.root}" if name else index.storage.root}
            task = f"val/{name}" if name else "val"
            of_corpora += _of_rows(task, losses, about, _reference(index))
        if not data.is_mixture:
            return of_corpora
        return [*_of_rows("val", of_all, {"data": ", ".join(rows)}, None), *of_corpora]

    return measure


def _reference(index: DatasetIndex) -> float | None:
    """The loss of GPT-2 124M on a corpus; it is per token, so that of other tokens does not
    compare."""
    is_comparable = index.tokenizer is GPT2_TOKENIZER
    return baselines.LOSS.get(index.corpus or "") if is_comparable else None


def _of_rows(
    task: str, losses: Sequence[Loss], about: Mapping[str, str], reference: float | None
) -> Iterator[MeasuredValue]:
    per_token = [loss.per_token for loss in losses]
    mean, error = float(np.mean(per_token)), _standard_error(per_token)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))
    count = counted(len(losses), "row")
    yield MeasuredValue(task, about, "loss", mean, error, count, reference)
    yield from _bits_per_byte(task, losses, about, count)
    yield MeasuredValue(task, about, "perplexity", perplexity, perplexity * error, count)


def _bits_per_byte(
    task: str, losses: Sequence[Loss], about: Mapping[str, str], count: str
) -> Iterator[MeasuredValue]:
    """The bits per byte of all rows together; nothing if they have no text."""
    bits = np.array([loss.nats for loss in losses]) / math.log(2)
    text_bytes = np.array([loss.text_bytes for loss in losses])
    if text_bytes.any():
        value = bits.sum() / text_bytes.sum()
        # A ratio of two means over rows (Cochran, Sampling Techniques, 1977, section 2.11).
        error = _standard_error(bits - value * text_bytes) / text_bytes.mean()
        yield MeasuredValue(task, about, "bits_per_byte", float(value), float(error), count)


def _standard_error(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """That of the mean of `values`; NaN for a single one."""
    if len(values) == 1:
        return math.nan
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


MEASURES: dict[str, Callable[[EvaluateCommand, LoadedModel, World], Measure]] = {
    "hellaswag": _hellaswag,
    "val": _validation,
}
"""tasks by name: each reads what it needs and returns the measurement; a new task is a file in
`gpt2.evaluation` and an entry here"""


def _show(loaded: LoadedModel, measured: list[MeasuredValue]) -> None:
    listing = table(str(loaded), "what", "metric", "value", "± std. error", "of", "GPT-2 124M")
    for item in measured:
        reference = "" if item.gpt2 is None else f"{item.gpt2:.4f}"
        value, error = f"{item.value:.4f}", f"{item.error:.4f}"
        task = item.task.partition("/")[0]
        what = task + (f" ({', '.join(item.about.values())})" if item.about else "")
        listing.add_row(what, item.metric, value, error, item.count, reference)
    console().print(listing)


def _write(command: EvaluateCommand, loaded: LoadedModel, measured: list[MeasuredValue]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for item in measured:
        values = {item.metric: item.value, f"{item.metric}_stderr": item.error}
        numbers = {name: x if math.isfinite(x) else None for name, x in values.items()}
        results.setdefault(item.task, {**item.about, "of": item.count}).update(numbers)
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


def _autocast(command: EvaluateCommand, world: World) -> torch.autocast:
    return precision.autocast(precision.DTYPES[command.dtype], world.device)


def _progress(what: str, world: World) -> Callable[[Sequence[int]], Iterable[int]]:
    """A progress bar on the terminal of rank 0."""
    bar = Console(stderr=True)
    return lambda rounds: track(
        rounds, what, console=bar, transient=True, disable=not (world.is_rank0 and bar.is_terminal)
    )
