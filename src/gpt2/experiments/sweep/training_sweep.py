"""A training as the target of a sweep."""

import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.config import flops, options
from gpt2.config.run import RunConfig
from gpt2.experiments.grid import Point
from gpt2.experiments.pool.job import Job
from gpt2.experiments.training import training_job
from gpt2.inspection import machine

MAX_CHECKPOINTS = 3
"""checkpoints that a training in a sweep keeps at most: the newest two and the best"""


@dataclass(frozen=True)
class TrainingTarget:
    """A training whose options are changed by the points of a sweep."""

    run: RunConfig
    keep_checkpoints: bool = True
    ranks: int = 1
    """GPUs of each training, or processes on the CPU"""

    @property
    def name(self) -> str:
        return "a training" if self.ranks == 1 else f"a training on {self.ranks} ranks"

    def require(self, points: Sequence[Point]) -> None:
        training_job.require_fresh_start(self.run)
        for point in points:
            options.overlay(self.run, point)  # raises ConfigError for invalid names or values

    def fixed(self, swept: Collection[str]) -> dict[str, Any]:
        all_options = training_job.result_options(self.run)
        fixed = {name: value for name, value in all_options.items() if name not in swept}
        return {"target": "training", **fixed}

    def job(self, name: str, values: Point, folder: Path) -> Job:
        run_config = options.overlay(self.run, self._same_validation(values) | values)
        return training_job.job(name, run_config, folder, ranks=self.ranks, keep_last=2)

    def _same_validation(self, values: Point) -> dict[str, Any]:
        """Makes points with different batch sizes validate on the same rows."""
        return {"eval_rows": self.run.eval_rows} if "total_batch_size" in values else {}

    def prepare(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        training_job.require_data(self.run, self.ranks)
        self.require_room(planned, folder, at_once)

    def require_room(self, planned: Mapping[str, Point], folder: Path, at_once: int) -> None:
        """Raises ConfigError if the disk has no room for the checkpoints of the trainings that have
        not started yet."""
        needs = [
            MAX_CHECKPOINTS * flops.state_bytes(options.overlay(self.run, values).model)
            for name, values in planned.items()
            if not (folder / name).exists()
        ]
        if not self.keep_checkpoints:
            needs = sorted(needs)[-at_once:]
        _, free = machine.disk(folder)
        if sum(needs) > free:
            raise ConfigError(
                f"the checkpoints of {counted(len(needs), 'training')} may need "
                f"{sum(needs) / 1e9:,.0f} GB, {folder} has {free / 1e9:,.0f} GB free; use "
                "--no_keep_checkpoints (the results stay), or another disk with --checkpoint_dir"
            )

    def clear(self, folder: Path) -> None:
        if not self.keep_checkpoints:
            # Removing gigabytes takes time, in which other jobs would wait for their answers.
            threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
