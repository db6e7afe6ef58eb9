"""What a job of a sweep costs beside its function: `python bench/experiments.py`.

200 calls of a function that does nothing, on two worker processes, results and all; in turn with
concurrent.futures' process pool, which keeps nothing and notices no hanging worker.
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from gpt2.experiments import results
from gpt2.experiments.job_group import JobGroupSource
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.function_call import Call
from gpt2.experiments.pool.job import Event
from gpt2.experiments.pool.process import Engine
from gpt2.experiments.pool.scheduler import Scheduler, worker_logs
from gpt2.experiments.results import ExperimentDescription
from gpt2.experiments.sweep.sweep import Sweep

WORKERS = 2


def nothing(seed: int) -> int:
    return seed


def ours(jobs: int, folder: Path) -> float:
    """Seconds per job between the first start and the last result, by the pool."""
    sweep = Sweep([{}], range(jobs), "value")
    group = sweep.of_function(Call.of("experiments:nothing"), folder=folder / "results")
    description = ExperimentDescription(group.kind, group.fixed, total=jobs)
    times: list[float] = []

    def note(event: Event) -> None:
        times.append(time.perf_counter())

    with results.opened(group.folder, description) as store:
        engine = Engine(slots.of_cores(WORKERS, threads="1"))
        source = JobGroupSource(group, store, WORKERS)
        Scheduler(engine, source, note, log_of=worker_logs(folder)).run()
        assert len(store.results) == jobs
    # The workers' own start is over when each has ended its first job.
    return (times[-1] - times[2 * WORKERS - 1]) / (jobs - WORKERS)


def executor(jobs: int) -> float:
    """The same by concurrent.futures."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        list(pool.map(nothing, range(WORKERS * 10)))
        begun = time.perf_counter()
        running = [pool.submit(nothing, seed) for seed in range(jobs)]
        for future in concurrent.futures.as_completed(running):
            future.result()
        return (time.perf_counter() - begun) / jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((1000 * ours(options.jobs, Path(folder)), 1000 * executor(options.jobs)))
        print(f"round {number + 1}: {rows[-1][0]:.2f} ms a job; executor {rows[-1][1]:.2f} ms")
    mine, other = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"median: {mine:.2f} ms a job; concurrent.futures {other:.2f} ms, {mine / other:.1f} times"
    )


if __name__ == "__main__":
    main()
