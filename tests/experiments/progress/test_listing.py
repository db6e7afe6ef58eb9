import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.progress.tracked import Tracker, event
from gpt2.cli import experiments
from gpt2.experiments import results
from gpt2.experiments.progress import listing, state
from gpt2.experiments.results import ExperimentDescription, JobResult
from gpt2.train import status
from inspection.written_runs import PLAN

TRACEBACK = "Traceback (most recent call last):\n  in f\nValueError: no [b]"


@contextmanager
def experiment(
    folder: Path, returned: list[Any], total: int = 10, kind: str = "seeds"
) -> Iterator[Tracker]:
    """An experiment whose owner is this process while the block runs; a result that is None is a
    job that has failed."""
    folder.mkdir(parents=True)
    tracker = Tracker(total, kind=kind)
    with results.opened(folder, ExperimentDescription(kind, {}, total)) as kept:
        for seed, result in enumerate(returned):
            name, facts = f"seed={seed}", {"result": result}
            if result is None:
                facts = {"reason": "ValueError: no [b]", "traceback": TRACEBACK}
            ended = event("failed" if result is None else "finished", 0, name, at=61.0, **facts)
            tracker.update(ended)
            kept.add(JobResult.from_event(ended, {"seed": seed, "lr": 0.1}))
        state.write(folder, tracker.current)
        yield tracker


def end(folder: Path, tracker: Tracker) -> None:
    tracker.end()
    state.write(folder, tracker.current)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2 experiments", *map(str, arguments)])
    return experiments.experiments_main()


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("watch", "unknown action watch; did you mean gpt2 watch?"),
        ("lst", "unknown action lst; did you mean list?"),
        ("other", "unknown action other; expected list, show or run"),
    ],
)
def test_an_unknown_action_is_refused_with_the_nearest_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str, words: str
):
    assert call(monkeypatch, action, "checkpoints") == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


@pytest.mark.parametrize("is_readable", [True, False])
def test_the_death_of_a_known_process_is_reported(tmp_path: Path, is_readable: bool):
    folder, deaths = tmp_path / "killed", list[int]()
    with experiment(folder, [1]) as tracker:
        if not is_readable:
            (folder / state.FILE).write_text("{")
    view = listing.ExperimentView(folder, lambda _, found: deaths.append(found.pid))
    for _ in range(2):
        view.update()
    assert view.state == "dead" and deaths == [tracker.current.pid] * is_readable


def test_list_has_every_experiment_and_every_other_training(tmp_path: Path, monkeypatch, capsys):
    with experiment(tmp_path / "done", [1, 2], total=2) as tracker:
        end(tmp_path / "done", tracker)
    with experiment(tmp_path / "killed", [1]):
        pass
    for part in ("done/seed=0", "alone_gpu_2"):
        (tmp_path / part).mkdir()
        status.write(tmp_path / part, PLAN, "finished", 500)
    with experiment(tmp_path / "here/live", [1, None, 3], kind="models"):
        assert call(monkeypatch, "list", tmp_path) == 0
        assert call(monkeypatch, "list", tmp_path, "--json") == 0
    printed = capsys.readouterr().out
    assert line_with(printed, "/done ").split()[1:5] == ["finished", "2", "of", "2"]
    assert " dead " in line_with(printed, "/killed ")
    live = line_with(printed, "/live ").split()
    assert live[1:6] == ["running", "2", "of", "10", "1"] and "models" in live
    assert "step 500 of 1,000" in line_with(printed, "/alone_gpu_2 ")
    assert "seed=0" not in printed
    facts = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {item["folder"]: item["state"] for item in facts} == {
        str(tmp_path / "done"): "finished",
        str(tmp_path / "here/live"): "running",
        str(tmp_path / "killed"): "dead",
    }
    assert call(monkeypatch, "list", "--checkpoint_dir", tmp_path, "--json") == 0
    again = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["folder"] for line in again} == {item["folder"] for item in facts}
    require_no_heavy_module("list", "--checkpoint_dir", tmp_path)
    require_no_heavy_module("show", tmp_path / "done")


def require_no_heavy_module(*arguments: str | Path) -> None:
    program = f"""
import sys
from gpt2.cli import experiments
sys.argv = {["gpt2 experiments", *map(str, arguments)]}
assert experiments.experiments_main() == 0
assert not {{"torch", "optuna", "ray", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_show_has_jobs_with_results_slots_and_failures(tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "live"
    returned = [{"val_loss": 3.25, "tokens": 10**9, "note": "x"}, None, {"val_loss": 3.125}]
    with experiment(folder, returned) as tracker:
        tracker.update(event("started", 1, "seed=3", log=f"{folder}/worker.log"))
        tracker.update(event("reported", 1, "seed=3", metrics={"step": 7, "val_loss": 3.5}))
        state.write(folder, tracker.current)
        assert call(monkeypatch, "show", folder) == 0
        assert call(monkeypatch, "show", folder, "--json") == 0
    printed, facts = capsys.readouterr().out.split("\n{")
    assert f"{folder}: seeds, running" in printed
    assert "  2 of 10 done, 1 failed\n" in printed and f"{folder}/worker.log" in printed
    assert line_with(printed, "  seed=0 ").split() == [
        *("seed=0", "finished", "1m", "01s", "1", "3.2500", "1,000,000,000", "gpu0")
    ]
    assert "failed" in line_with(printed, "  seed=1 ")
    assert "val_loss 3.5000 | step 7" in line_with(printed, "gpu1  seed=3 ")
    assert " on gpu0: ValueError: no [b]" in line_with(printed, "seed=1, ")
    assert "Traceback" not in printed
    facts = json.loads("{" + facts)
    assert facts["jobs"][1]["traceback"] == TRACEBACK and facts["now"]["places"][1]["pid"] == 7


def test_failures_are_shown_with_their_tracebacks(tmp_path: Path, monkeypatch, capsys):
    with experiment(tmp_path / "a", [1, None, None]):
        pass
    assert call(monkeypatch, "show", tmp_path / "a", "--failed", "--last", "1") == 0
    printed = capsys.readouterr().out
    assert "seed=2, " in printed and "seed=1" not in printed
    assert "  Traceback (most recent call last):\n    in f\n" in printed


def test_show_of_a_dead_experiment_has_what_its_slots_did_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "killed"
    with experiment(folder, [1]) as tracker:
        metrics = {"step": 50, "total_steps": 100, "loss": 3.5}
        tracker.update(event("started", 1, "seed=3"))
        tracker.update(event("reported", 1, "seed=3", at=1.0, metrics=metrics))
        state.write(folder, tracker.current)
    assert call(monkeypatch, "show", folder) == 0
    printed = capsys.readouterr().out
    assert f"{folder}: seeds, dead" in printed
    assert "50 %" in line_with(printed, "gpu1  seed=3 ")


def test_show_of_folders_without_an_experiment(tmp_path: Path, monkeypatch, capsys):
    assert call(monkeypatch, "show", tmp_path / "god") == 2
    assert f"error: no experiment or training in {tmp_path}/god; " in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    status.write(tmp_path / "alone", PLAN, "finished", 500)
    assert call(monkeypatch, "show", tmp_path / "alone") == 0
    assert "run: finished\n  step 500 of 1,000" in capsys.readouterr().out
    for missing in (tmp_path / "alnoe", tmp_path):
        assert call(monkeypatch, "show", missing) == 2
        assert f"{missing}; there are {tmp_path}/alone\n" in capsys.readouterr().err
    assert call(monkeypatch, "lst") == 2
    assert "did you mean list" in capsys.readouterr().err


def test_list_of_a_missing_folder(tmp_path: Path, monkeypatch, capsys):
    """The default folder may not exist yet."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "list", "nodir") == 2
    assert capsys.readouterr().err.startswith("error: no folder nodir; ")
    assert call(monkeypatch, "list") == 0
    assert capsys.readouterr().out == "No experiments in checkpoints\n"
    assert call(monkeypatch, "list", "--checkpoint-dir=nodir") == 2
    assert call(monkeypatch, "list", "nodir", "--checkpoint_dir", "other") == 2
    refused = capsys.readouterr().err.splitlines()
    assert refused[0].startswith("error: no folder nodir; ")
    assert refused[1] == "error: use either nodir or --checkpoint_dir other"


def test_long_experiments_show_their_last_jobs(tmp_path: Path):
    folder = tmp_path / "long"
    with experiment(folder, [1], total=10_000):
        pass
    result = {"val_loss": 3.1, "step": 100}
    lines = [
        json.dumps(asdict(JobResult(f"seed={n}", "finished", {"seed": n}, result)))
        for n in range(10_000)
    ]
    (folder / results.RESULT_LINES_FILE).write_text("\n".join(lines) + "\n")
    out = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    listing.print_list(tmp_path, out)
    listing.print_experiment(listing.read(folder), out, last=5)
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert "10,000 of 10,000" in text and "the last 5 of 10,000" in text
    assert "seed=9995 " in text and "seed=9994 " not in text
    assert max(map(len, text.splitlines()[:5])) <= 80
