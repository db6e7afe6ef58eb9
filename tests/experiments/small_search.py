"""A search whose trainings are a small function, for tests that kill it.

As a script: OUT N_TRIALS PAUSE [STORAGE].
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SPACE = "[learning_rate]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[n_layer]\nlow = 1\nhigh = 4\n"


def start(out: Path, count: int, pause: float = 0.05) -> subprocess.Popen[bytes]:
    script = [__file__, str(out), str(count), str(pause)]
    with (out / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, *script],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def starts(out: Path) -> list[str]:
    """A line for each start of a trial: `trial NUMBER STEP PID`."""
    trace = out / "trace"
    return trace.read_text().splitlines() if trace.exists() else []


def study_in(folder: Path) -> Any:
    import optuna

    address = f"sqlite:///{folder / 'optuna_study.db'}"
    return optuna.load_study(study_name="search", storage=address)


def main(out: Path, count: int, pause: float, storage: str | None = None) -> int:
    # Here, as workers import this file, too, and these take seconds.
    from gpt2.base.text import console
    from gpt2.config import options, presets
    from gpt2.experiments.pool import slots
    from gpt2.experiments.pool.job import Job
    from gpt2.experiments.pool.process import Engine
    from gpt2.experiments.pool.scheduler import Limits
    from gpt2.experiments.search import run, space, spec, trial

    def job(number: int, _run: object, folder: Path, _values: object, _ranks: int) -> Job:
        name = trial.name_of(number)
        (folder / name).mkdir(exist_ok=True)
        kwargs: dict[str, Any] = {"folder": str(folder / name), "trace": str(out / "trace")}
        kwargs |= {"number": number, "pause": pause}
        return Job(name, "experiments.jobs:scored", kwargs)

    run_config = options.overlay(presets.preset("demo"), {"eval_interval": 1})
    asked = spec.Search(
        run_config,
        space.parse(SPACE, run_config, "space"),
        count,
        folder=out / "search",
        log_dir=out / "logs",
        storage=storage,
    )
    return run.run(asked, Engine(slots.of_cores(2, "1")), Limits(retries=99), console(), job)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
