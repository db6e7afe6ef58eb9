from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.experiments.pool import messages


def test_values_that_json_cannot_hold_are_converted():
    values = {
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "torch": torch.tensor(3),
        "path": Path("a"),
        "nan": float("nan"),
        "infinite": (1.0, float("inf")),
        "nan of numpy": np.float64("nan"),
        "large": 10**400,
        "many digits": [-(10**5000)],
        "long double": np.longdouble(0.25),
        "large long double": np.longdouble("1e400"),
        "bool": np.bool_(True),
        "text": np.str_("a"),
        "half": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
        "decimal": Decimal("0.1"),
        "large decimal": Decimal("1e400"),
        "fraction": Fraction(1, 4),
        "keys": {np.int64(3): 4, None: 5, True: 6, 0.5: 7},
    }
    assert messages.json_ready(values) == {
        "numpy": 0.5,
        "array": [0, 1],
        "torch": 3,
        "path": "a",
        "nan": None,
        "infinite": [1.0, None],
        "nan of numpy": None,
        "large": None,
        "many digits": [None],
        "long double": 0.25,
        "large long double": None,
        "bool": True,
        "text": "a",
        "half": 0.5,
        "decimal": 0.1,
        "large decimal": None,
        "fraction": 0.25,
        "keys": {"3": 4, "null": 5, "true": 6, "0.5": 7},
    }
    with pytest.raises(TypeError, match="not JSON serializable"):
        messages.json_ready({"value": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        messages.json_ready({(1, 2): 3})


@pytest.mark.parametrize(
    "value",
    [float("nan"), -float("inf"), Decimal("1e400"), Fraction(10**400), np.float32("inf")],
)
def test_what_no_float_holds_is_refused_if_it_must_be_exact(value: object):
    with pytest.raises(ValueError, match="NaN, infinite or beyond the range"):
        messages.json_ready([value], strict=True)
    assert messages.json_ready(10**400, strict=True) == 10**400
    with pytest.raises(ValueError, match="digits"):
        messages.json_ready(10**5000, strict=True)
