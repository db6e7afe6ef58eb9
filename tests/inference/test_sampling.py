import pytest

from gpt2.base.errors import ConfigError
from gpt2.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 0),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_invalid_values_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match=f"^{name}={value} "):
        Sampling(**{name: value})


def test_none_is_off_and_the_limits_themselves_work():
    off, limits = Sampling(temperature=0, top_k=None, top_p=None), Sampling(top_k=1, top_p=1.0)
    assert (off.temperature, off.top_k, off.top_p) == (0, None, None)
    assert (limits.top_k, limits.top_p) == (1, 1.0)
