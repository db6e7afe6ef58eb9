import io

import pytest
from rich.console import Console


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), width=160, highlight=False)
