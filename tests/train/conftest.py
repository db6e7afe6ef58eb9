from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root(characters: Path) -> Path:
    return characters
