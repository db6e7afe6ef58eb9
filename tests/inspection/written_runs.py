"""Runs on disk that nothing trained, and what a command printed about them."""

import io
from pathlib import Path

from rich.console import Console

from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import StepRecord
from gpt2.train import status


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


PLAN = status.Plan(
    run_name="run",
    preset="demo",
    total_steps=1000,
    rows_per_step=4,
    rows_per_epoch=1001,
    block_size=8,
    checkpoint_interval=150,
    world_size=2,
    device="cuda",
    log_file="",
)


def write_run(
    folder: Path, steps: int, plan: status.Plan = PLAN, state: status.RunState = "running"
):
    folder.mkdir(parents=True, exist_ok=True)
    log = LogFile(folder / "log.txt", plan.run_name, 0)
    for step in range(1, steps + 1):
        log.write(StepRecord(step, 0, 3.0, 1e-3, 1.0, 2.0, 16.0, 0.1, []))
    log.close()
    values = plan.__dict__ | {"log_file": str(folder / "log.txt")}
    status.write(folder, status.Plan(**values), state, step=0)
