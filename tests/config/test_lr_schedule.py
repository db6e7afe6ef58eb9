import itertools
import math
from dataclasses import replace

import pytest

from gpt2.config.lr_schedule import Schedule, is_due, lr_at, warning

SCHEDULE = Schedule(peak=1.0, floor=0.1, warmup_steps=10, decay_steps=110)


def test_warm_up_rises_linearly_to_the_peak():
    assert [lr_at(step, SCHEDULE) for step in range(10)] == pytest.approx(
        [0.1 * (step + 1) for step in range(10)]
    )


def test_cosine_falls_from_the_peak_to_the_floor():
    assert lr_at(10, SCHEDULE) == pytest.approx(1.0)
    assert lr_at(60, SCHEDULE) == pytest.approx(0.55)
    assert lr_at(35, SCHEDULE) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    rates = [lr_at(step, SCHEDULE) for step in range(10, 130)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_stays_at_the_peak_and_falls_linearly_at_the_end():
    wsd = replace(SCHEDULE, shape="wsd", cooldown=0.4)
    assert lr_at(9, wsd) == lr_at(10, wsd) == lr_at(66, wsd) == 1.0
    assert lr_at(88, wsd) == pytest.approx(0.55)
    assert lr_at(109, wsd) == pytest.approx(0.1 + 0.9 / 44)
    assert lr_at(110, wsd) == 0.1


def test_a_long_cooldown_begins_after_the_warm_up():
    wsd = replace(SCHEDULE, shape="wsd", cooldown=1.0)
    assert lr_at(10, wsd) == 1.0 and lr_at(60, wsd) == pytest.approx(0.55)


def test_floor_after_the_decay():
    assert lr_at(110, SCHEDULE) == lr_at(10_000, SCHEDULE) == 0.1


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    short = Schedule(peak=1.0, floor=0.1, warmup_steps=10, decay_steps=4)
    assert [lr_at(step, short) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("changes", "total_steps", "words"),
    [
        ({}, 110, None),
        ({}, 11, None),
        ({}, 10, None),  # the last update has the peak
        ({}, 9, "never reaches its peak of 1: the warm-up takes 10 steps, the run 9"),
        ({"decay_steps": 9}, 9, "never reaches its peak"),
        ({"decay_steps": 9}, 110, "drops from 1 to 0.1 in one step, at step 10"),
        ({"decay_steps": 10}, 110, "at step 10"),
        ({"decay_steps": 11}, 110, "at step 11"),
        ({"decay_steps": 12}, 110, None),
        ({"decay_steps": 11}, 11, None),  # the run ends before
        ({"decay_steps": 11, "floor": 1.0}, 110, None),
        ({"shape": "wsd", "cooldown": 0.001}, 120, "at step 110"),
        ({"shape": "wsd", "cooldown": 0.01}, 120, "at step 110"),
        ({"shape": "wsd", "cooldown": 0.02}, 120, None),
        ({"warmup_steps": 0, "decay_steps": 1}, 5, "at step 1"),
        ({"peak": 6e-4, "floor": 6e-5, "shape": "wsd", "cooldown": 0.001}, 120, "at step 110"),
    ],
)
def test_a_schedule_without_peak_or_without_decay_is_a_warning(changes, total_steps, words):
    schedule = replace(SCHEDULE, **changes)
    said = warning(schedule, total_steps)
    assert said is None if words is None else words in said
    rates = [lr_at(step, schedule) for step in range(total_steps)]
    falls = [before - after for before, after in itertools.pairwise(rates)]
    is_cliff = max(falls, default=0) > 0.99 * (schedule.peak - schedule.floor) > 0
    is_low = max(rates) < 0.999 * schedule.peak
    assert (said is not None) == (is_cliff or is_low)


def test_a_rate_of_0_before_the_end_is_a_warning():
    schedule = replace(SCHEDULE, floor=0.0)
    assert warning(schedule, 110) is None
    assert "0 from step 110 of 111 on, where nothing is learned" in warning(schedule, 111)


def test_is_due():
    assert [step for step in range(10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, None) for step in range(10))
