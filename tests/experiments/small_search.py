"""A search of trainings that are a small function, for tests that kill it:
OUT N_TRIALS PAUSE [STORAGE]."""

import sys
from pathlib import Path
from typing import Any

SPACE = "[learning_rate]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[n_layer]\nlow = 1\nhigh = 4\n"


def main(out: Path, count: int, pause: float, storage: str | None = None) -> int:
    from gpt2 import config  # seconds to import, and workers import this file, too
    from gpt2.experiments import search, slots, space, training, trial
    from gpt2.experiments.plan import Job
    from gpt2.experiments.pool import Limits
    from gpt2.experiments.process import Engine
    from gpt2.tables import console

    def job(number: int, _run: object, folder: Path, _values: object, _ranks: int) -> Job:
        name = trial.name_of(number)
        (folder / name).mkdir(exist_ok=True)
        kwargs: dict[str, Any] = {"folder": str(folder / name), "trace": str(out / "trace")}
        kwargs |= {"number": number, "pause": pause}
        return Job(name, "experiments.jobs:scored", kwargs)

    trial.job = job  # type: ignore[assignment]
    training.require_data = lambda *_: None
    run = config.overlay(config.preset("demo"), {"eval_interval": 1})
    asked = search.Search(
        run,
        space.parse(SPACE, run, "space"),
        count,
        folder=out / "search",
        log_dir=out / "logs",
        storage=storage,
    )
    return search.run(asked, Engine(slots.of_cores(2, "1")), Limits(retries=99), console())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
