"""Experiments of `jobs.measured` on two slots of this machine."""

from pathlib import Path

from gpt2.experiments import api
from gpt2.experiments.pool import slots

ENGINE = api.Engine(slots.of_cores(2, threads="1"))


def begun(trace: Path) -> list[str]:
    """`rate seed` of every start since the last time."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    trace.unlink(missing_ok=True)
    return sorted(" ".join(line.split()[:2]) for line in lines)
