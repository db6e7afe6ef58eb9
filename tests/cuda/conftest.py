import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests of this folder run; there is no other place that asks for CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return "cuda"
