from pathlib import Path

import pytest

import forked_ranks
from faults.harness import FLAGS, TABLE
from support import small_flags


@pytest.fixture(scope="session")
def reference(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 steps on 2 ranks, with dropout, uninterrupted."""
    out = tmp_path_factory.mktemp("reference")
    forked_ranks.run(small_flags(data_root, out, **FLAGS), 2, out)
    return out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':<48} trials  survived  steps lost (mean, most)")
    for row in TABLE.values():
        lost = "-"
        if row.steps_lost:
            lost = f"{sum(row.steps_lost) / len(row.steps_lost):.1f}, {max(row.steps_lost)}"
        terminalreporter.write_line(
            f"{row.fault:<48} {row.trials:>6}  {row.survived:>8}  {lost:>11}"
        )
