import io
from pathlib import Path

import pytest
from rich.console import Console

from gpt2.experiments.compare import job_group
from gpt2.experiments.compare.job_group import JobGroup, LoggedConsole
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Job


def test_time_saved():
    text = job_group.saved_time(190, 290, shared=False, noun="job")
    assert text == (
        "In parallel 3m 10s, one after another about 4m 50s at these speeds: 1m 40s saved (34 %)"
    )
    rounded = job_group.saved_time(46.4, 72.6, shared=False, noun="job")
    assert "46s" in rounded and "1m 13s" in rounded and "27s saved" in rounded, "as 73 - 46"
    assert "nothing saved" in job_group.saved_time(20, 19, shared=False, noun="job")
    assert "the real saving is smaller, or none" in job_group.saved_time(
        190, 290, shared=True, noun="job"
    )


@pytest.mark.parametrize(
    ("count", "available", "words"),
    [
        (3, 2, "- 2 at a time, on cpu0, cpu1\n"),
        (2, 4, "- 2 at a time, on cpu0, cpu1\n"),
        (1, 2, "- on cpu0\n"),
        (2, 1, "- one after another, on cpu0\n"),
    ],
)
def test_used_slots_are_printed(tmp_path: Path, count: int, available: int, words: str):
    names = [f"{number}" for number in range(count)]
    group = JobGroup("jobs", "Jobs", [Job(name, "a:b", {}) for name in names], {}, log_dir=tmp_path)
    out = Console(file=io.StringIO(), width=160)
    with LoggedConsole(out, tmp_path / "log") as console:
        job_group._print_plan(group, names, slots.of_cores(available, "1"), console)
    assert f"Jobs\n  {words}  - results" in (tmp_path / "log").read_text()
