import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the tests in this folder, which are skipped without CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return "cuda"
