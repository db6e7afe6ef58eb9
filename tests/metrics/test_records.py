"""`Metrics`: every record reaches every sink, and no sink ends the training."""

import logging
from dataclasses import replace

import pytest

from gpt2.base import log
from gpt2.metrics import records
from gpt2.metrics.console import Console
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Metrics,
    Record,
    SamplesRecord,
    ValidationRecord,
    events_to,
)
from metrics.example_record import RECORD

logger = logging.getLogger("gpt2.somewhere")


class Recorder:
    """A sink that keeps its records; raises `error` instead if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.records: list[Record] = []
        self.calls = 0
        self.is_closed = False

    def write(self, record: Record) -> None:
        assert not self.is_closed
        self.calls += 1
        if self.error:
            raise self.error
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def messages(self) -> list[str]:
        found = [item for item in self.records if isinstance(item, EventRecord)]
        return [f"{item.level} {item.message}" for item in found]


def test_every_sink_receives_every_record():
    sinks = [Recorder(), Recorder()]
    metrics = Metrics(sinks)
    metrics.step(RECORD)
    metrics.validation(1, 0, 3.0, 1.0)
    metrics.hellaswag(1, 0, 0.26, 0.28, 9)
    metrics.samples(1, ["a"])
    metrics.close()
    for sink in sinks:
        assert sink.is_closed
        assert sink.records == [
            RECORD,
            ValidationRecord(1, 0, 3.0, 1.0),
            HellaSwagRecord(1, 0, 0.26, 0.28, 9),
            SamplesRecord(1, ["a"]),
        ]


def test_time_left_is_estimated_from_the_median_speed_of_recent_steps(capsys):
    """Of steps of different sizes, too: those of a ramp are smaller at first."""
    metrics = Metrics([Console()])
    for tokens, elapsed_s in ((8, 100.0), (8, 2.0), (16, 4.0)):
        record = replace(RECORD, elapsed_s=elapsed_s, tokens_per_s=tokens / elapsed_s)
        metrics.step(record, tokens_left=80)
    metrics.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta: 20s")


def test_log_messages_are_events_until_metrics_are_closed():
    sink = Recorder()
    metrics = Metrics([sink])
    logger.info("%d shards", 3)
    logger.debug("not in the log of a run")
    logger.info("100 % done")
    metrics.close()
    logger.warning("after the end")
    assert sink.messages() == ["INFO 3 shards", "INFO 100 % done"]


def test_a_quiet_console_leaves_the_log_complete():
    log.setup("error")
    sink = Recorder()
    metrics = Metrics([sink])
    logger.info("a message")
    metrics.close()
    assert sink.messages() == ["INFO a message"]


def test_an_exception_is_logged_with_its_traceback():
    sink = Recorder()
    metrics = Metrics([sink])
    try:
        raise KeyError("x")
    except KeyError:
        logger.exception("failed")
    metrics.close()
    (message,) = sink.messages()
    assert message.startswith("ERROR failed\nTraceback ")
    assert message.endswith("KeyError: 'x'")


def test_a_message_that_cannot_be_formatted_ends_no_training(capsys):
    log.setup()
    sink = Recorder()
    metrics = Metrics([sink])
    logger.info("%d shards", "three")
    metrics.close()
    assert sink.records == []
    assert capsys.readouterr().err.count("Logging error") == 2  # of the console and of the metrics


def test_a_sink_that_cannot_write_is_warned_of_once_and_called_again():
    full, good = Recorder(OSError(28, "No space left on device")), Recorder()
    metrics = Metrics([full, good])
    for step in (1, 2):
        metrics.validation(step, 0, 3.0)
    full.error = None
    metrics.validation(3, 0, 3.0)
    metrics.close()
    assert good.records == [
        EventRecord("WARNING", "Recorder cannot write: [Errno 28] No space left on device"),
        *(ValidationRecord(step, 0, 3.0) for step in (1, 2, 3)),
    ]
    assert full.records == [ValidationRecord(3, 0, 3.0)]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), AssertionError("a bug")])
def test_a_sink_with_a_bug_is_reported_once_with_its_traceback_and_switched_off(error, monkeypatch):
    broken, good = Recorder(error), Recorder()
    metrics = Metrics([broken, good])
    for step in (1, 2):
        metrics.validation(step, 0, 3.0)
    assert broken.calls == 1
    (message,) = good.messages()
    assert message.startswith("ERROR Recorder failed; it is off for 10 minutes\nTraceback ")
    assert "a bug" in message
    now = records.time.monotonic()
    monkeypatch.setattr(records.time, "monotonic", lambda: now + records.WARN_EVERY_S + 1)
    metrics.validation(3, 0, 3.0)
    assert good.messages()[1] == f"WARNING Recorder cannot write: {error}"
    broken.error = None
    monkeypatch.setattr(records.time, "monotonic", lambda: now + 3 * records.WARN_EVERY_S)
    metrics.validation(4, 0, 3.0)
    metrics.close()
    assert broken.records == [ValidationRecord(4, 0, 3.0)]
    assert len(good.messages()) == 2
    assert broken.is_closed


def test_a_sink_that_cannot_be_closed_keeps_no_other_from_it():
    class Stuck(Recorder):
        def close(self) -> None:
            raise RuntimeError("stuck")

    good = Recorder()
    metrics = Metrics([good, Stuck()])
    metrics.close()
    assert good.is_closed
    assert "Stuck failed" in good.messages()[0]


def test_messages_of_before_come_first():
    sink = Recorder()
    with events_to((early := []).append):
        logger.info("Loading checkpoint from: a")
    metrics = Metrics([sink], early)
    logger.info("Resuming from:")
    metrics.close()
    assert sink.messages() == ["INFO Loading checkpoint from: a", "INFO Resuming from:"]


def test_without_sinks_nothing_is_logged(caplog):
    metrics = Metrics([])
    metrics.step(RECORD)
    metrics.close()
    assert not caplog.records
