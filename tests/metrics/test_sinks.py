"""What holds for every sink, and which sinks a run has."""

import logging
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.base.errors import ConfigError
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.metrics import sinks
from gpt2.metrics.console import Console
from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import (
    CorpusLoss,
    EventRecord,
    HellaSwagRecord,
    Metrics,
    Record,
    SamplesRecord,
    Sink,
    ValidationRecord,
)
from gpt2.metrics.sinks import RunStart
from gpt2.metrics.tensorboard import TensorBoard
from metrics.example_record import RECORD
from metrics.fake_wandb import FakeWandB, open_wandb
from support import small_config

OPENERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Sink]] = {
    "console": lambda folder, monkeypatch: Console(),
    "log_file": lambda folder, monkeypatch: LogFile(folder / "log.txt", "run", 0),
    "jsonl": lambda folder, monkeypatch: JsonLines(folder / "metrics.jsonl", "run", 0, {}),
    "tensorboard": lambda folder, monkeypatch: TensorBoard(folder, {}, 0, {}),
    "wandb": lambda folder, monkeypatch: open_wandb(monkeypatch, FakeWandB()),
}


@pytest.mark.parametrize("name", OPENERS)
class TestEverySink:
    """The contract of `Sink`."""

    @pytest.fixture
    def sink(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sink:
        return OPENERS[name](tmp_path, monkeypatch)

    @pytest.mark.parametrize(
        "record",
        [
            RECORD,
            replace(RECORD, loss=math.nan, grad_norm=math.inf, applied=False),
            replace(RECORD, rank_gpu=[{"memory_gb": 1.5}, {}], left_s=60.0),
            replace(RECORD, corpora={"web": 3.5, "code": math.nan}),
            ValidationRecord(5, 0, 3.25),
            ValidationRecord(5, 0, 3.25, 1.05, {"web": CorpusLoss(3.0, 1.0)}),
            ValidationRecord(5, 0, 3.25, None, {"web": CorpusLoss(math.nan, None)}),
            ValidationRecord(5, 0, math.nan),
            ValidationRecord(5, 0, 3.25, 1.05),
            ValidationRecord(5, 0, math.nan, math.nan),
            HellaSwagRecord(5, 0, 0.26, 0.28, 9),
            SamplesRecord(5, ["one\n\ntwo", ""]),
            SamplesRecord(5, []),
            EventRecord("INFO", "Completed Epoch 0"),
            EventRecord("ERROR", "failed\nTraceback"),
        ],
        ids=lambda record: type(record).__name__,
    )
    def test_it_accepts_every_record(
        self, sink: Sink, record: Record, caplog: pytest.LogCaptureFixture
    ):
        for _ in range(2):
            sink.write(record)
            sink.flush()
        sink.close()
        assert not caplog.records, "W&B logs the errors that it does not raise"

    def test_it_can_be_closed_without_a_record(self, sink: Sink, caplog: pytest.LogCaptureFixture):
        sink.flush()
        sink.close()
        assert not caplog.records


@pytest.fixture
def run(data_root: Path, tmp_path: Path) -> RunConfig:
    run = small_config(data_root, tmp_path)
    sinks.require_folders(run)
    return run


def opened_by(run: RunConfig, **changes: object) -> list[Sink]:
    return sinks.open_sinks(RunStart(options.overlay(run, changes), "run", 0, {}, "run-1"))


def names(opened: list[Sink]) -> list[str]:
    return [type(sink).__name__ for sink in opened]


def test_a_run_has_the_sinks_of_its_options(run: RunConfig, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    for flags, more in (
        ({}, []),
        ({"use_tensorboard": True}, ["TensorBoard"]),
        ({"use_wandb": True}, ["WandB"]),
    ):
        opened = opened_by(run, **flags)
        assert names(opened) == ["Console", "LogFile", "JsonLines", *more]
        Metrics(opened).close()


def test_without_records_no_other_sink_stays_open(run: RunConfig, monkeypatch):
    closed: list[object] = []
    close = LogFile.close
    monkeypatch.setattr(LogFile, "close", lambda self: closed.append(close(self)))
    (run.watch.log_dir / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl: Is a directory"):
        opened_by(run)
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "no wandb: --use_wandb needs W&B's package"),
        (FakeWandB(FakeWandB.UsageError("No API key")), "no wandb: --use_wandb: No API key; or"),
        (types.ModuleType("wandb"), "no wandb: module 'wandb' has no attribute"),
    ],
)
def test_a_run_goes_on_without_wandb(run: RunConfig, monkeypatch, caplog, module, message: str):
    """Also if it has changed since it was tried."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    opened = opened_by(run, use_wandb=True)
    assert names(opened) == ["Console", "LogFile", "JsonLines"]
    assert caplog.messages[0].startswith(message)
    Metrics(opened).close()


def test_a_run_goes_on_without_tensorboard(run: RunConfig, caplog):
    run.watch.runs_dir.mkdir(parents=True)
    (run.watch.runs_dir / "run").touch()
    opened = opened_by(run, use_tensorboard=True)
    assert "TensorBoard" not in names(opened)
    assert caplog.messages[-1].startswith("no tensorboard: ")
    Metrics(opened).close()


def test_what_the_sinks_need_is_tried_before_a_run(run: RunConfig, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks.require_usable(run)
    with pytest.raises(ConfigError, match="pip install"):
        sinks.require_usable(options.overlay(run, {"use_wandb": True}))
    monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--use_tensorboard needs TensorBoard; first: pip"):
        sinks.require_usable(options.overlay(run, {"use_tensorboard": True}))


@pytest.mark.parametrize("name", sinks.REQUIRED)
def test_an_unexpected_error_of_a_required_sink_ends_the_run(run: RunConfig, monkeypatch, name):
    def fail(_: RunStart) -> Sink:
        raise ValueError("a bug")

    monkeypatch.setitem(sinks.SINKS, name, fail)
    with pytest.raises(ValueError, match="a bug"):
        opened_by(run)


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_file_that_cannot_be_opened_is_named_with_its_flag(run: RunConfig, name: str):
    (run.watch.log_dir / name).mkdir()
    with pytest.raises(ConfigError, match=rf"cannot write .*{name}: Is a directory; .*--log_dir"):
        opened_by(run)


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(run: RunConfig, tmp_path: Path):
    (tmp_path / "file").touch()
    for flag in ("log_dir", "runs_dir"):
        changes = {"use_tensorboard": True, flag: tmp_path / "file" / "below"}
        with pytest.raises(ConfigError, match=f"choose another folder with --{flag}"):
            sinks.require_folders(options.overlay(run, changes))


def test_a_warning_while_sinks_are_opened_is_in_the_log(run: RunConfig, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(failure=OSError("no route")))
    opened = opened_by(run, use_wandb=True)
    metrics = Metrics(opened)
    logging.getLogger("gpt2.somewhere").info("Completed Epoch 0")
    metrics.close()
    _, warning, message = sinks.log_file(run).read_text().splitlines()
    assert warning.startswith("WARNING: W&B is offline (no route)")
    assert message == "Completed Epoch 0"
