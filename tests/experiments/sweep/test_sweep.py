import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.checkpoint import store
from gpt2.cli import pool_options, seeds
from gpt2.config import options
from gpt2.experiments import results
from gpt2.experiments.pool.function_call import Call
from gpt2.experiments.sweep.sweep import Sweep
from gpt2.train import trainer
from support import ROOT, run_command, small_config, small_flags, wait_until

SCRIPT = ROOT / "src" / "main_multi_gpu.py"


def command(*flags: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, flags)]


def starts(tmp_path: Path) -> list[str]:
    """`rate seed` of every start of a job."""
    lines = (tmp_path / "trace").read_text().splitlines()
    return [" ".join(line.split()[:2]) for line in lines]


def test_a_sweep_stores_results_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))

    def sweep(*flags: str) -> int:
        target = ("--target", "experiments.jobs:measured", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["gpt2 seeds", *target, *flags])
        return seeds.seeds_main()

    with monkeypatch.context() as patch:
        patch.setenv("FAIL", "1")
        assert sweep("--num_seeds", "5", "--grid", "rate=1.5,2") == 1
    assert "FAILED rate=1.5,seed=3: RuntimeError: three is bad" in capsys.readouterr().out
    assert len(starts(tmp_path)) == 10
    content = json.loads((tmp_path / "checkpoints/seeds/results.json").read_text())
    assert content["failures"] == ["rate=1.5,seed=3", "rate=2,seed=3"]
    assert content["points"][1]["values"] == {"0": 0, "1": 2, "2": 4, "4": 8}
    assert content["results"][0]["result"]["nan"] is None
    (tmp_path / "trace").unlink()

    assert sweep("--num_seeds", "6", "--grid", "rate=1.5,2,4") == 0
    again = [start for start in starts(tmp_path) if start.split()[0] != "4"]
    assert sorted(again) == ["1.5 3", "1.5 5", "2 3", "2 5"], "what is done does not run again"
    assert len(starts(tmp_path)) == 4 + 6, "seeds and values may be added"
    printed = capsys.readouterr().out
    assert "8 of them are done already" in printed
    table = [line.split() for line in printed.splitlines()]
    assert ["1.5", "6", "-", "3.75", "2.81", "0.81", "to", "6.69"] in table
    assert (tmp_path / "checkpoints/seeds/value.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--learning_rate=1e-3", "--learning_rate"),
        ("--n-layer 2", "--n_layer"),
        ("--preset demo", "--preset"),
        ("--ddp 2", "--ddp 2"),
        ("--no_keep_checkpoints", "--no_keep_checkpoints"),
    ],
)
def test_options_of_a_training_are_refused_for_a_function(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, named: str
):
    target = ["--target", "experiments.jobs:measured"]
    monkeypatch.setattr(sys, "argv", ["gpt2 seeds", *target, *given.split()])
    assert seeds.seeds_main() == 2
    assert f"error: {named} applies to trainings only; leave it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "os:no_such"], "no function os:no_such"),
        (["--target", "os"], "no function os; expected module:function"),
        (
            ["--target", "os:getcwd", "--device", "cpu", "--out-dir", "x"],
            "os:getcwd cannot be called with seed",
        ),
        (["--grid", "learning_rat=1,2"], "did you mean learning_rate"),
        (["--grid", "n_layer=2.5,x"], "n_layer: expected int, got 2.5"),
        (["--grid", "seed=1,2"], "the seeds of a sweep are set by --num_seeds"),
        (["--seed", "7"], "the seeds of a sweep are set by --num_seeds"),
        (["--experiment_name", "a"], "are for one run"),
        (
            ["--target", "experiments.jobs:measured", "--grid", "rate=x/y,x_y"],
            "2 points would have the name 'rate=x_y'; expected different names",
        ),
        (["--resume", "latest"], "--resume latest is for one run; to resume an experiment"),
        (["--num_seeds", "0"], "num_seeds=0 is too small"),
        (["--metric", "val_los"], "error: --metric val_los is unknown; did you mean val_loss"),
        (["--preset", "demo", "--data_root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt2 seeds", *flags])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert seeds.seeds_main() == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "seeds" / "results.jsonl").exists()


def test_the_values_of_texts_are_as_they_were_typed():
    call = Call.of("experiments.jobs:spelled")
    values = "=007,1_0,7,1e3,True"
    command = seeds.SeedsCommand(
        grid=tuple(name + values for name in ("code", "other", "x", "width"))
    )
    parsed = seeds.grid_of(command, call)
    assert parsed["code"] == parsed["other"] == ["007", "1_0", "7", "1e3", "True"]
    assert parsed["x"] == parsed["width"] == ["007", "1_0", 7, 1000.0, True]
    optional = seeds.SeedsCommand(grid=("label=1e3,None", "tag=none,007"))
    assert seeds.grid_of(optional, call) == {"label": ["1e3", None], "tag": [None, "007"]}
    options_grid = seeds.SeedsCommand(grid=("data-root=2024,2025", "n_layer=2,4"))
    assert seeds.grid_of(options_grid, None) == {"data_root": ["2024", "2025"], "n_layer": [2, 4]}


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        pool_options.parse_beside_run(seeds.SeedsCommand, ["--n_layr", "3"])
    assert "--n_layer" in capsys.readouterr().err


def test_points_with_different_batch_sizes_validate_on_the_same_rows(
    data_root: Path, tmp_path: Path
):
    run = small_config(data_root, tmp_path)
    points = [{"total_batch_size": size} for size in (64, 128, 512)]
    group = Sweep(points, range(1), "val_loss").of_training(run, tmp_path)
    for name, values in group.values.items():
        assert options.of_stored(group.job(name, values).kwargs["run"]).eval_rows == run.eval_rows


@pytest.mark.soak
def test_an_interrupted_sweep_continues(tmp_path: Path):
    environment = os.environ | {
        "TRACE": str(tmp_path / "trace"),
        "PAUSE": "0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    flags = command("--target", "experiments.jobs:measured", "--num_seeds", 30)
    running = subprocess.Popen(flags, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    lines = tmp_path / "checkpoints" / "seeds" / "results.jsonl"
    wait_until(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 6)
    running.send_signal(signal.SIGINT)
    output = running.communicate()[0].decode()
    assert running.returncode == 130 and "run the same command to continue" in output
    before = len(results.read_results(lines.parent))
    assert 6 <= before < 30
    subprocess.run(flags, cwd=tmp_path, env=environment, check=True)
    assert len(results.read_results(lines.parent)) == 30
    assert sorted(starts(tmp_path)) == sorted(f"1.0 {seed}" for seed in range(30))


@pytest.mark.soak
def test_interrupted_trainings_give_the_results_of_undisturbed_ones(
    data_root: Path, tmp_path: Path
):
    shortened = {"max_steps": 16, "eval_interval": 16}
    folder = tmp_path / "sweep"
    flags = command(
        *small_flags(data_root, tmp_path, **shortened),
        *("--grid", "learning_rate=1e-3,3e-3", "--num_seeds", 1, "--checkpoint_dir", folder),
    )
    running = subprocess.Popen(flags, cwd=tmp_path, stdout=subprocess.PIPE)
    names = ["learning_rate=0.001,seed=0", "learning_rate=0.003,seed=0"]
    logs = [folder / name / "log.txt" for name in names]
    wait_until(lambda: all(log.exists() and "\nstep 3 " in log.read_text() for log in logs))
    running.send_signal(signal.SIGINT)
    running.communicate()
    assert running.returncode == 130
    stopped = [store.list_checkpoints(folder / name)[-1].training.step for name in names]
    assert not results.read_results(folder)

    again = run_command(flags, cwd=tmp_path)
    assert "val_loss over seeds" in again.stdout
    for name, log, step in zip(names, logs, stopped, strict=True):
        assert 3 <= step < 16 and f"Stopped by signal 15 at step {step};" in log.read_text()
        assert f"  - Step: {step}\n" in log.read_text()
        assert (folder / name / "latest.pt").exists()
    returned = {record.job: record.result for record in results.read_results(folder)}
    alone = small_config(data_root, tmp_path / "alone", **shortened, learning_rate=3e-3, seed=0)
    assert returned[names[1]]["val_loss"] == trainer.run(alone).val_loss

    other = run_command([*flags, "--n_layer", "1"], tmp_path, expect=2)
    assert "n_layer: 2 before, 1 now" in other.stderr
