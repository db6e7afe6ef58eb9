from collections.abc import Iterator

import pytest

from experiments.ray_cluster import Machines


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """A Ray cluster, which starts slowly. Two machines are free; a test that kills one adds one."""
    running = Machines()
    yield running
    running.end()
