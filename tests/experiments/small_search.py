"""A search of trainings that are a small function, for tests that kill it:
OUT N_TRIALS PAUSE [STORAGE]."""

import sys
from pathlib import Path
from typing import Any

SPACE = "[learning_rate]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[n_layer]\nlow = 1\nhigh = 4\n"


def main(out: Path, count: int, pause: float, storage: str | None = None) -> int:
    # Here, as workers import this file, too, and these take seconds.
    from gpt2.base.text import console
    from gpt2.config import options, presets
    from gpt2.experiments.pool import slots
    from gpt2.experiments.pool.job import Job
    from gpt2.experiments.pool.process import Engine
    from gpt2.experiments.pool.scheduler import Limits
    from gpt2.experiments.search import run, space, spec, trial
    from gpt2.experiments.training import training_job

    def job(number: int, _run: object, folder: Path, _values: object, _ranks: int) -> Job:
        name = trial.name_of(number)
        (folder / name).mkdir(exist_ok=True)
        kwargs: dict[str, Any] = {"folder": str(folder / name), "trace": str(out / "trace")}
        kwargs |= {"number": number, "pause": pause}
        return Job(name, "experiments.jobs:scored", kwargs)

    trial.job = job  # type: ignore[assignment]
    training_job.require_data = lambda *_: None
    run_config = options.overlay(presets.preset("demo"), {"eval_interval": 1})
    asked = spec.Search(
        run_config,
        space.parse(SPACE, run_config, "space"),
        count,
        folder=out / "search",
        log_dir=out / "logs",
        storage=storage,
    )
    return run.run(asked, Engine(slots.of_cores(2, "1")), Limits(retries=99), console())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
