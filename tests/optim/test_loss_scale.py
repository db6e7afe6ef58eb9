import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from gpt2.optim import loss_scale
from gpt2.optim.loss_scale import LossScale

CPU = torch.device("cpu")


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_the_scale_is_that_of_gradscaler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    ours = LossScale(torch.float16, CPU)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    norms = [math.inf, math.inf, 1, 1, 1, 1, 1, math.nan, 1, 1, 1, 1, 1, 1, math.inf]
    for norm in norms:
        theirs.scale(weight.sum()).backward()
        weight.grad.fill_(norm)
        assert float(ours.scale) == theirs.get_scale()
        assert ours.update(number(norm)) == theirs.get_scale(), "that of this update"
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
    assert float(ours.scale) == theirs.get_scale() == 2.0**15


def test_the_constants_are_those_of_gradscaler():
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == loss_scale.INITIAL_SCALE
    assert theirs.get_growth_factor() == loss_scale.GROWTH_FACTOR
    assert theirs.get_backoff_factor() == loss_scale.BACKOFF_FACTOR
    assert theirs.get_growth_interval() == loss_scale.GROWTH_INTERVAL


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "is_too_large"),
    [
        (3.0, math.inf, 4.0, True),
        (3.0, math.nan, 4.0, True),
        (3.0, math.inf, 1.0, False),
        (math.nan, math.nan, 4.0, False),
        (math.inf, math.nan, 4.0, False),
        (3.0, 9.0, 4.0, False),
    ],
)
def test_a_scale_is_to_blame_only_for_gradients_that_a_smaller_one_may_mend(
    loss: float, norm: float, scale: float, is_too_large: bool
):
    assert loss_scale.is_too_large(scale, loss, norm) is is_too_large
    assert not loss_scale.is_too_large(None, loss, norm)


def test_the_scale_never_falls_below_the_smallest():
    scaling = LossScale(torch.float16, CPU)
    for _ in range(20):
        scaling.update(number(math.inf))
    assert float(scaling.scale) == loss_scale.SMALLEST_SCALE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_have_no_scale(dtype: torch.dtype):
    scaling = LossScale(dtype, CPU)
    norm = number(3.0)
    assert scaling.times(0.25) == 0.25 and scaling.unscaled(norm) is norm
    assert scaling.scale is None and scaling.state_dict() == {}
    assert scaling.update(number(math.inf)) == 0


def test_the_host_never_waits():
    """Fake tensors have no values: reading one on the host raises, unless it is a constant, as
    `torch.tensor` makes one."""
    with torch._subclasses.FakeTensorMode():
        norm = torch.ones((), dtype=torch.float64)
        with pytest.raises(DataDependentOutputException):
            float(norm)
        for dtype in (torch.float16, torch.float32):
            scaling = LossScale(dtype, CPU)
            torch.ones(()) * scaling.times(0.25)
            scaling.update(scaling.unscaled(norm))
