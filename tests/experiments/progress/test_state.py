import time
from pathlib import Path
from typing import Any

import pytest

from gpt2.experiments.pool.job import Event, EventKind, Job, Slot
from gpt2.experiments.progress import rendering, state
from gpt2.experiments.progress.state import Board

SLOTS = [Slot(index, f"gpu{index}", {}) for index in range(2)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(name: str) -> Job:
    return Job(name, "module:function", {})


def event(kind: EventKind, slot: int, name: str = "a", at: float = 0.0, **facts: Any) -> Event:
    return Event(kind, SLOTS[slot], job(name), pid=7, elapsed_s=at, **facts)


def watching(total: int, before: int = 0) -> tuple[Board, Clock]:
    clock = Clock()
    return Board("models", total, SLOTS, before=before, clock=clock), clock


def train(on: Board, clock: Clock, slot: int, name: str, steps: range, total: int) -> None:
    """A training that takes a second to begin, and then one for each step."""
    clock.now = 1000.0
    on.take(event("started", slot, name))
    for seconds, step in enumerate(steps, 1):
        metrics = {"step": step, "total_steps": total, "loss": 3.5}
        on.take(event("reported", slot, name, at=seconds, metrics=metrics))
    clock.now = 1000.0 + len(steps)


def test_counts_and_slots_follow_the_events():
    on, clock = watching(total=10, before=3)
    for slot in range(2):
        on.take(event("started", slot, f"job{slot}", log="w.log"))
    on.take(event("reported", 0, "job0", metrics={"loss": 2.0, "n": 1}))
    on.take(event("reported", 0, "job0", metrics={"loss": 1.5}))
    assert dict(on.picture.places[0].metrics) == {"loss": 1.5, "n": 1}
    on.take(event("finished", 0, "job0"))
    on.take(event("retried", 1, "job1", reason="killed"))
    on.take(event("started", 1, "job1", attempt=2))
    assert on.picture.places[0].job is None
    assert (on.picture.places[1].job, on.picture.places[1].attempt) == ("job1", 2)
    on.take(event("failed", 1, "job1", reason="ValueError: no"))
    on.take(Event("slot_lost", SLOTS[1], reason="3 failures in a row"))
    now = on.picture
    assert (now.done, now.failed, now.retried, now.ended) == (4, 1, 1, 5)
    assert [(item.job, item.reason) for item in now.failures] == [("job1", "ValueError: no")]
    assert not now.places[1].in_service and now.places[0].in_service
    clock.now += 10
    assert now.left_s(clock.now) == pytest.approx(25)  # 5 jobs at 2 in 10 s
    assert rendering.summary(now, clock.now) == (
        "4 of 10 done, 1 retried, 1 failed | 12.0 jobs/min | 25s left"
    )
    on.take(Event("stopping", SLOTS[0], reason="jobs have 60 s to save and end"))
    assert on.picture.state == "stopping"
    on.end()
    assert on.picture.state == "stopped" and on.picture.left_s(clock.now) is None


def test_failures_that_are_kept_are_the_newest():
    on, _ = watching(total=1000)
    for number in range(100):
        on.take(event("failed", 0, f"{number}", reason="no"))
    assert on.picture.failed == 100
    assert [item.job for item in on.picture.failures] == [f"{n}" for n in range(80, 100)]


def test_time_left_of_a_training_counts_from_where_it_went_on():
    on, clock = watching(total=1)
    train(on, clock, 0, "a", range(901, 912), total=1000)
    place = on.picture.places[0]
    assert place.left_s(clock.now) == pytest.approx(89)
    assert place.left_s(clock.now + 10) == pytest.approx(79), "it counts down between reports"
    assert on.picture.left_s(clock.now) == pytest.approx(89)


def test_time_left_of_all_counts_what_waits_and_the_slots_that_serve():
    on, clock = watching(total=4)
    train(on, clock, 0, "a", range(1, 12), total=101)
    train(on, clock, 1, "b", range(1, 12), total=101)
    whole = on.picture.places[0].whole_s
    assert whole == pytest.approx(102)
    assert on.picture.left_s(clock.now) == pytest.approx((90 + 90 + 2 * 102) / 2)
    on.take(Event("slot_lost", SLOTS[1]))
    assert on.picture.left_s(clock.now) == pytest.approx(90 + 90 + 2 * 102)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"step": 3},
        {"step": None, "total_steps": 10},
        {"step": 3, "total_steps": 0},
        {"step": 30, "total_steps": 10, "loss": float("nan")},
        {"step": "three", "total_steps": [1]},
    ],
)
def test_a_job_may_report_anything(metrics: dict[str, Any]):
    on, clock = watching(total=2)
    on.take(event("started", 0))
    for _ in range(3):
        on.take(event("reported", 0, at=1.0, metrics=metrics))
    assert on.picture.left_s(clock.now) is None
    assert "a: " in rendering.place_line(on.picture.places[0], clock.now)


def test_picture_on_the_disk(tmp_path: Path):
    on, clock = watching(total=4)
    train(on, clock, 0, "a", range(1, 5), total=8)
    on.take(event("failed", 1, "b", reason="bad"))
    state.write(tmp_path, on.picture)
    found = state.read(tmp_path)
    assert found is not None and abs(found.written - time.time()) < 60
    assert found.places == on.picture.places and found.failures == on.picture.failures
    (tmp_path / state.NAME).write_text('{"kind": "seeds"')
    assert state.read(tmp_path) is None
    state.write(tmp_path / "none", on.picture)  # a disk that fails ends nothing
