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
    }
    assert messages.json_ready(values) == {
        "numpy": 0.5,
        "array": [0, 1],
        "torch": 3,
        "path": "a",
        "nan": None,
        "infinite": [1.0, None],
        "nan of numpy": None,
    }
    with pytest.raises(TypeError, match="not JSON serializable"):
        messages.json_ready({"value": object()})
