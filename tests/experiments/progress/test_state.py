import json
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.progress.tracked import SLOTS, Tracker, event, train
from gpt2.experiments.pool.job import Event
from gpt2.experiments.progress import rendering, state


def test_counts_and_slots_follow_the_events():
    tracker = Tracker(total=10, before=3)
    clock = tracker.clock
    for slot in range(2):
        tracker.update(event("started", slot, f"job{slot}", log="w.log"))
    tracker.update(event("reported", 0, "job0", metrics={"loss": 2.0, "n": 1}))
    tracker.update(event("reported", 0, "job0", metrics={"loss": 1.5}))
    assert dict(tracker.current.slots[0].metrics) == {"loss": 1.5, "n": 1}
    tracker.update(event("finished", 0, "job0"))
    tracker.update(event("retried", 1, "job1", reason="killed"))
    tracker.update(event("started", 1, "job1", attempt=2))
    assert tracker.current.slots[0].job is None
    assert (tracker.current.slots[1].job, tracker.current.slots[1].attempt) == ("job1", 2)
    tracker.update(event("failed", 1, "job1", reason="ValueError: no"))
    tracker.update(Event("slot_lost", SLOTS[1], reason="3 failures in a row"))
    now = tracker.current
    assert (now.done, now.failed, now.retried, now.ended) == (4, 1, 1, 5)
    assert now.failures == (state.JobFailure("job1", "gpu1", "ValueError: no"),)
    assert not now.slots[1].in_service and now.slots[0].in_service
    clock.now += 10
    assert now.left_s(clock.now) == pytest.approx(25)  # 5 jobs at 2 in 10 s
    assert rendering.summary(now, clock.now) == (
        "4 of 10 done, 1 retried, 1 failed | 12.0 jobs/min | 25s left"
    )
    tracker.update(Event("stopping", SLOTS[0], reason="jobs have 60 s to save and end"))
    assert tracker.current.state == "stopping"
    tracker.end()
    assert tracker.current.state == "stopped" and tracker.current.left_s(clock.now) is None


def test_no_job_runs_after_the_end():
    """As when a full disk ends the experiment: no event says so of the jobs that ran."""
    tracker = Tracker(total=3)
    tracker.update(event("started", 0, "a", log="logs/a"))
    tracker.update(event("reported", 0, "a", at=1.0, metrics={"step": 5, "total_steps": 10}))
    tracker.end()
    assert tracker.current.slots[0] == state.SlotState("gpu0", log="logs/a")
    assert tracker.current.fraction == 0


def test_losses_are_shown_with_four_decimals():
    tracker = Tracker(total=3)
    tracker.update(event("started", 0, "a"))
    metrics = {"{x}": 10.53174, "val_loss": 10.53174, "loss": 3.27124, "tokens_per_s": 31415.9}
    tracker.update(event("reported", 0, "a", at=1.0, metrics=metrics))
    line = rendering.slot_line(tracker.current.slots[0], tracker.clock.now)
    assert "loss 3.2712 | val_loss 10.5317 | 31,416 tokens/s | {x} 10.53" in line


def test_the_newest_failures_are_kept():
    tracker = Tracker(total=1000)
    for number in range(100):
        tracker.update(event("failed", 0, f"{number}", reason="no"))
    assert tracker.current.failed == 100
    assert [item.job for item in tracker.current.failures] == [f"{n}" for n in range(80, 100)]


def test_time_left_counts_from_the_step_where_a_training_resumed():
    tracker = Tracker(total=1)
    clock = tracker.clock
    train(tracker.update, clock, 0, "a", range(901, 912), total=1000)
    slot = tracker.current.slots[0]
    assert slot.left_s(clock.now) == pytest.approx(89)
    assert slot.left_s(clock.now + 10) == pytest.approx(79), "it counts down between reports"
    assert tracker.current.left_s(clock.now) == pytest.approx(89)


def test_time_left_counts_waiting_jobs_and_slots_in_service():
    tracker = Tracker(total=4)
    clock = tracker.clock
    train(tracker.update, clock, 0, "a", range(1, 12), total=101)
    train(tracker.update, clock, 1, "b", range(1, 12), total=101)
    assert tracker.current.left_s(clock.now) == pytest.approx((90 + 90 + 2 * 101) / 2)
    tracker.update(event("failed", 1, "b"))
    tracker.update(Event("slot_lost", SLOTS[1]))
    assert tracker.current.left_s(clock.now) == pytest.approx(90 + 2 * 101)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"step": 3},
        {"step": None, "total_steps": 10},
        {"step": 3, "total_steps": 0},
        {"step": 3, "total_steps": 10**400},
        {"step": 10**400, "total_steps": 10},
        {"step": 30, "total_steps": 10, "loss": float("nan")},
        {"step": "three", "total_steps": [1]},
    ],
)
def test_a_job_may_report_anything(metrics: dict[str, Any]):
    tracker = Tracker(total=2)
    clock = tracker.clock
    tracker.update(event("started", 0))
    for _ in range(3):
        tracker.update(event("reported", 0, at=1.0, metrics=metrics))
    assert tracker.current.left_s(clock.now) is None
    assert "a: " in rendering.slot_line(tracker.current.slots[0], clock.now)


def test_unknown_keys_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tracker = Tracker(total=4)
    tracker.update(event("started", 0, "a"))
    content = state.as_json(tracker.current) | {"priority": 7}
    content["places"][0]["temperature"] = 70
    (tmp_path / state.FILE).write_text(json.dumps(content))
    assert state.read(tmp_path) == tracker.current
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/state.json: ignored unknown fields of {name}"
        for name in ("SlotState: temperature", "ExperimentState: priority")
    ]


def test_state_file(tmp_path: Path):
    tracker = Tracker(total=4)
    clock = tracker.clock
    train(tracker.update, clock, 0, "a", range(1, 5), total=8)
    tracker.update(event("failed", 1, "b", reason="bad"))
    before = time.time()
    state.write(tmp_path, tracker.current)
    found = state.read(tmp_path)
    assert found is not None and found.written >= before
    assert found.slots == tracker.current.slots and found.failures == tracker.current.failures
    (tmp_path / state.FILE).write_text('{"kind": "seeds"')
    assert state.read(tmp_path) is None
    state.write(tmp_path / "none", tracker.current)  # a disk that fails ends nothing
