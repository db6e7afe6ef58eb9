import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from experiments import jobs
from experiments.measured import ENGINE, begun
from gpt2.experiments import api, results
from gpt2.experiments.pool import slots, worker
from gpt2.experiments.pool.function_call import plain
from gpt2.experiments.sweep.sweep import Sweep


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gets a line for every start of `jobs.measured`."""
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return tmp_path / "trace"


def place(tmp_path: Path) -> dict[str, Any]:
    """Keyword arguments of an experiment: folders, slots, and a console that `said` reads."""
    out = Console(file=io.StringIO(), width=160)
    return {"folder": tmp_path / "kept", "log_dir": tmp_path / "logs", "engine": ENGINE, "out": out}


def said(given: dict[str, Any]) -> str:
    text: str = given["out"].file.getvalue()
    return text


def test_a_function_is_swept_and_finished_jobs_never_run_again(tmp_path: Path, trace: Path):
    swept = api.sweep(jobs.measured, {"rate": [1.5, 2]}, 2, **(given := place(tmp_path)))
    assert begun(trace) == ["1.5 0", "1.5 1", "2 0", "2 1"]
    assert swept.exit_code == 0 and len(swept.records) == 4
    assert [item.values for item in swept.points] == [{0: 0, 1: 1.5}, {0: 0, 1: 2}]
    assert "value over seeds" in said(given)
    assert (tmp_path / "kept" / "value.png").stat().st_size > 5000

    again = api.sweep(jobs.measured, [{"rate": 1.5}, {"rate": 4}], 3, **place(tmp_path))
    assert begun(trace) == ["1.5 2", "4 0", "4 1", "4 2"]
    assert [len(item.values) for item in again.points] == [3, 3]

    with pytest.raises(api.ConfigError, match="grid: rate before, no grid now"):
        api.sweep(functools.partial(jobs.measured, rate=2), [{}], 1, **place(tmp_path))
    assert not begun(trace)


def test_parameters_may_have_any_name(tmp_path: Path):
    """A parameter called like a key of experiment.json does not collide with it."""
    swept = functools.partial(jobs.named, target=1, grid=1)
    api.sweep(swept, [{}], 1, **(given := place(tmp_path)))
    assert "Sweep of experiments.jobs:named: 1 seed (0), 1 job\n" in said(given)
    for function, changed in ((jobs.named, {"grid": 2}), (jobs.also_named, {"grid": 1})):
        with pytest.raises(api.ConfigError, match=r"before, .* now"):
            api.sweep(functools.partial(function, target=1, **changed), [{}], 1, **place(tmp_path))


def test_results_depend_on_the_values_of_a_partial(tmp_path: Path):
    def sweep(pause: float) -> api.Swept:
        return api.sweep(functools.partial(jobs.square, pause=pause), [{}], 3, **place(tmp_path))

    assert sweep(0.01).points[0].values == {0: 0, 1: 1, 2: 4}
    with pytest.raises(api.ConfigError, match=r"pause: 0\.01 before, 0\.02 now"):
        sweep(0.02)


def test_custom_table_and_picture(tmp_path: Path):
    from matplotlib.figure import Figure

    def listing(points: Any, metric: str) -> str:
        return f"{metric}: {[item.metrics[metric].mean for item in points]}"

    def draw(points: Any, metric: str) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.suptitle(f"{len(points)} of {metric}")
        return figure

    given = place(tmp_path)
    api.sweep(jobs.square, {"pause": [0.0, 0.01]}, 3, listing=listing, draw=draw, **given)
    assert "value: [1.66" in said(given) and (tmp_path / "kept" / "value.png").exists()


def test_the_exit_code_is_1_if_no_result_has_the_metric(tmp_path: Path):
    given = place(tmp_path)
    assert api.sweep(jobs.square, [{}], 2, metric="los", **given).exit_code == 1
    assert "No result has a finite los; --metric may be one of value" in said(given)
    assert api.sweep(jobs.square, [{}], 2, **given).exit_code == 0


def test_a_function_that_returns_no_number_fails(tmp_path: Path):
    given = place(tmp_path) | {"engine": api.Engine(slots.of_cores(1, threads="1"))}
    swept = api.sweep(jobs.odd, [{}], 6, metric="loss", **given)
    states = [record.state for record in swept.records]
    assert swept.exit_code == 1 and states == ["finished"] * 3 + ["failed"] * 3
    assert swept.records[1].result == {"value": None}
    words = "experiments.jobs:odd returned {}; expected numbers by name"
    for seed, returned in ((3, "'hello'"), (4, "None"), (5, "{'value': None}")):
        assert f"FAILED seed={seed}: {words.format(returned)}" in said(given)
    assert "No result has a finite loss; --metric may be one of value" in said(given)
    assert f"Results: {tmp_path}/kept/results.json\n" in said(given)


def test_jobs_side_by_side_the_third_on_the_second_slot(tmp_path: Path, trace: Path):
    functions = {
        "first": functools.partial(jobs.counts, until=9),
        "second": functools.partial(jobs.measured, seed=1),
        "third": functools.partial(jobs.measured, seed=3),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIL", "1")
        given = place(tmp_path)
        ended = api.together(functions, **given)
    assert ended.exit_code == 1 and "FAILED third: RuntimeError: three is bad" in said(given)
    assert {name: record.slot for name, record in ended.records.items()} == {
        "first": "cpu0",
        "second": "cpu1",
        "third": "cpu1",
    }
    assert ended.records["first"].result == 9
    assert begun(trace) == ["1.0 1", "1.0 3"]

    mended = api.together(functions, **place(tmp_path))
    assert begun(trace) == ["1.0 3"], "what has finished does not run again"
    assert mended.exit_code == 0 and mended.records["third"].result["value"] == 3
    assert mended.records["first"] == ended.records["first"]

    functions["second"] = functools.partial(jobs.measured, seed=2)
    with pytest.raises(api.ConfigError, match="second, seed: 1 before, 2 now"):
        api.together(functions, **place(tmp_path))
    assert not begun(trace)


def inner() -> Callable[[int], int]:
    return lambda seed: seed


@pytest.mark.parametrize(
    ("function", "points", "words"),
    [
        (lambda seed: seed, [{}], "a function at the top level of a module"),
        (inner(), [{}], "a function at the top level of a module"),
        (
            functools.partial(jobs.measured, 3),
            [{}],
            "keyword arguments only",
        ),
        (functools.partial(jobs.square, pause=slice(1)), [{}], "pause: .*not JSON serializable"),
        (jobs.measured, {"rat": [1]}, "cannot be called with seed, rat"),
        (jobs.measured, {"seed": [1]}, "the seeds of a sweep"),
        (jobs.measured, [{"rate": 1}, {}], "must have the same names"),
        (jobs.measured, [], "at least one point and one seed, got none"),
        (jobs.measured, [{"rate": 1}] * 2, "2 points would have the name 'rate=1'"),
        (jobs.measured, {"rate": ["x" * 200]}, "names of at most 200 characters"),
        ("experiments.jobs:measure", [{}], "no function"),
    ],
)
def test_invalid_sweeps_are_refused(tmp_path: Path, function: Any, points: Any, words: str):
    with pytest.raises(api.UserError, match=words):
        api.sweep(function, points, **place(tmp_path))
    assert not (tmp_path / "kept").exists()


UNGUARDED = """
from pathlib import Path
from gpt2.experiments.pool import process, scheduler, slots
from gpt2.experiments.pool.job import Job

def work(seed): return seed

class Source:
    left = 5
    def next(self):
        self.left -= 1
        return Job(f"{self.left}", "unguarded:work", {"seed": 1}) if self.left else None
    def event(self, event):
        print("event", event.kind)
        return "go"

engine = process.Engine(slots.of_cores(2, "1"))
scheduler.Scheduler(engine, Source(), lambda _: None).run()
"""


def test_a_script_that_starts_jobs_when_a_worker_imports_it_fails_with_one_message(tmp_path: Path):
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert set(done.stdout.splitlines()) <= {"event started"}, "no job was retried, or failed"
    message = f"{script} starts jobs when it is imported, which every worker does; {worker.GUARD}"
    assert done.stderr.count("Traceback") == done.stderr.count(message) == 1
    assert "to continue" not in done.stderr, "the same command would fail again"


def test_a_module_that_starts_jobs_when_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    call = "api.sweep(work, [{}], 1, folder=Path('kept'))"
    for name, start in (
        ("swept", call),
        ("side_by_side", call.replace("sweep(work, [{}], 1", "together({'a': work}")),
    ):
        text = (
            "from pathlib import Path\nfrom gpt2.experiments import api\ndef work(seed=0): pass\n"
        )
        (tmp_path / f"{name}_at_import.py").write_text(text + start)
        with pytest.raises(api.UserError, match="starts jobs when it is imported; put what starts"):
            worker.find_function(f"{name}_at_import:work")
    assert not Path("kept").exists()
    worker.require_not_importing()  # nor is anything else refused from then on


@pytest.mark.parametrize("number", [np.int64(3), np.float32(0.5), torch.tensor(2)])
def test_values_of_numpy_and_torch_are_numbers(number: Any):
    planned = Sweep([plain({"width": number})], range(1), "value")
    assert planned.points == [{"width": number.item()}]
    assert type(planned.points[0]["width"]) in (int, float)


@pytest.mark.parametrize("value", [float("nan"), np.float64("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float):
    for function, points in (
        (jobs.measured, {"rate": [value]}),
        (functools.partial(jobs.measured, rate=value), [{}]),
    ):
        with pytest.raises(api.ConfigError, match=r"rate: .*; expected finite numbers"):
            api.sweep(function, points, **place(tmp_path))


def test_invalid_jobs_are_refused(tmp_path: Path):
    with pytest.raises(api.ConfigError, match="is no file name"):
        api.together({"a/b": jobs.hangs}, **place(tmp_path))
    with pytest.raises(api.ConfigError, match="cannot be called with nothing: missing"):
        api.together({"a": jobs.measured}, **place(tmp_path))
    assert not (tmp_path / "kept").exists()


class Doubling:
    """Each job depends on the result of the one before, so there is no job while one runs."""

    def __init__(self) -> None:
        self.number, self.waits = 1, False

    def next(self) -> api.Job | None:
        if self.waits or self.number > 4:
            return None
        self.waits = True
        kwargs = {"until": 2 * self.number}
        return api.Job(f"{self.number}", "experiments.jobs:counts", kwargs, own_process=False)

    def event(self, event: api.Event) -> api.Answer:
        if event.kind == "finished":
            self.number, self.waits = event.result, False
        return "go"


def test_a_custom_job_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    source, events = Doubling(), list[api.Event]()
    assert api.Pool(ENGINE, source, events.append, limits=api.Limits(retries=0)).run() == 0
    assert source.number == 8
    assert [event.result for event in events if event.kind == "finished"] == [2, 4, 8]


def test_functions_need_no_torch():
    """Workers import the script of a function, which imports this."""
    code = "import sys, gpt2.experiments.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_results_of_another_kind_are_not_mixed(tmp_path: Path):
    api.together({"one": functools.partial(jobs.square, seed=2)}, **place(tmp_path))
    with pytest.raises(api.ConfigError, match="kind: jobs before, seeds now"):
        api.sweep(jobs.square, [{}], 1, **place(tmp_path))
    assert [record.result for record in results.read_results(tmp_path / "kept")] == [4]
