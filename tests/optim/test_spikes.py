import math

import numpy as np
import pytest
import torch

from gpt2.optim.spikes import LENGTH, MIN_COUNT, SpikeDetector

CPU = torch.device("cpu")


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    """Losses and gradient norms that fall slowly, with noise; (count, 2)."""
    noise = np.random.default_rng(seed).normal(0, [0.05, 0.02], (count, 2))
    return torch.tensor(np.linspace([4, 1], [3, 0.5], count) + noise)


def filled(count: int = 3 * LENGTH, skip_spikes: bool = False) -> SpikeDetector:
    detector = SpikeDetector(CPU)
    for row in numbers(count):
        is_applied, is_spike = detector.add(row, skip_spikes)
        assert is_applied and not is_spike
    return detector


def limits(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(dim=0) + 6 * rows.std(dim=0)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("count", [MIN_COUNT, 100, LENGTH, LENGTH + 7])
def test_the_limit_is_six_standard_deviations_above_the_mean(count: int, column: int):
    rows = numbers(count)
    limit = limits(rows[-LENGTH:])
    for factor, expected in ((0.9999, False), (1.0001, True)):
        tried = rows.mean(dim=0)
        tried[column] = limit[column] * factor
        is_applied, is_spike = filled(count).add(tried, skip_spikes=True)
        assert (bool(is_spike), bool(is_applied)) == (expected, not expected)


def test_low_values_are_no_spikes():
    _, is_spike = filled().add(torch.tensor([-100.0, 0.0], dtype=torch.float64), True)
    assert not is_spike


def test_the_first_updates_are_no_spikes():
    _, is_spike = filled(MIN_COUNT - 1).add(torch.tensor([1e9, 1e9], dtype=torch.float64), True)
    assert not is_spike


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_applied_and_no_spike(value: float):
    detector = filled()
    before = detector.state_dict()["window"].clone()
    is_applied, is_spike = detector.add(torch.tensor([3.0, value], dtype=torch.float64), False)
    assert not is_applied and not is_spike
    assert torch.equal(detector.state_dict()["window"], before)


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_a_skipped_spike_does_not_enter_the_statistics(skip_spikes: bool):
    detector = filled()
    spike = torch.tensor([50.0, 50.0], dtype=torch.float64)
    found = [bool(detector.add(spike, skip_spikes)[1]) for _ in range(20)]
    assert found[0]
    assert all(found) == skip_spikes  # once they are part of the statistics, they are normal


def test_a_loaded_state_goes_on_as_the_one_that_was_saved():
    one, other = filled(LENGTH + 30), SpikeDetector(CPU)
    other.load_state_dict({name: part.clone() for name, part in one.state_dict().items()})
    for row in numbers(LENGTH, seed=1):
        one.add(row, True)
        other.add(row, True)
    for name, part in one.state_dict().items():
        assert torch.equal(part, other.state_dict()[name])
