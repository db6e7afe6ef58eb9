import math
from dataclasses import replace

import pytest

from gpt2.config.lr_schedule import Schedule, is_due, lr_at

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


def test_is_due():
    assert [step for step in range(10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, None) for step in range(10))
