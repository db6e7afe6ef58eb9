import ast
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2.base.errors import UserError
from gpt2.cli.parse import guarded
from gpt2.experiments import results
from support import ROOT, run_command, wait_until

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = {"gpt2.cli.parse", "gpt2.cli.pool_options", "gpt2.experiments.api"}
TEACHER = (
    *("teacher_student", "--teacher_ranks", "1", "3", "--student-dims", "2", "4", "--num_seeds"),
    *("2", "--measurements", "4", "--size", "4", "--guesses", "2000", "--slots", "1"),
)
PMSSM = ("pmssm", "--steps", "12", "--train-rows", "500", "--models", "transformer", "mlp")


def example(tmp_path: Path, name: str, *flags: str) -> str:
    """What an example says, run as a user runs it."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *flags]
    return run_command(command, tmp_path, PYTHONPATH=os.pathsep.join(sys.path)).stdout


def loaded(name: str, patch: pytest.MonkeyPatch) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    patch.setitem(sys.modules, name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def within(tmp_path: Path, name: str, *flags: str) -> tuple[int, str]:
    """The exit code of an example that runs within this process, and what it says."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", [name, *flags])
        patch.syspath_prepend(ROOT / "examples")  # where the processes of jobs find it
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return guarded(loaded(name, patch).run), said.getvalue()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_need_only_what_is_public(path: Path):
    text = path.read_text()
    assert text.count("\n") < 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gpt2"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.module in PUBLIC or names <= PUBLIC
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gpt2") for alias in node.names)


def test_teacher_student(tmp_path: Path):
    code, said = within(tmp_path, *TEACHER)
    assert code == 0, said
    assert "Left out, as narrower than the teacher: student dim 2 for rank 3" in said
    folder = tmp_path / "checkpoints" / "teacher_student"
    records = results.read_results(folder)
    assert len(records) == 2 * 3 * 2
    errors = {record.job: record.result for record in records}
    for job, found in errors.items():
        aim = 1e-5 if "method=gd" in job else 0.3
        assert found["fits"] == (found["train"] <= aim)
    row = next(line.split() for line in said.splitlines() if line.split()[:3] == ["4", "3", "4"])
    points = json.loads((folder / "results.json").read_text())["points"]
    wanted = {"measurements": 4, "teacher_rank": 3, "student_dim": 4, "method": "gd"}
    point = next(item for item in points if item["point"] == wanted)
    assert row[7] == f"{point['metrics']['test']['mean']:.2g}"
    assert (folder / "test.png").read_bytes().startswith(b"\x89PNG")

    code, again = within(tmp_path, *TEACHER)
    assert code == 0 and "12 of them are done already" in again
    assert results.read_results(folder) == records
    code, other = within(tmp_path, *TEACHER, "--gd", "--tolerance", "0.5")
    assert code == 2 and "tolerance: 0.3 before, 0.5 now" in other


@pytest.mark.soak
def test_pmssm(tmp_path: Path):
    said = example(tmp_path, *PMSSM)
    folder = tmp_path / "checkpoints" / "pmssm"
    records = {record.job: record.result for record in results.read_results(folder)}
    assert sorted(records) == ["mlp", "transformer"]
    for result in records.values():
        assert f"{result['rmse']:.4f}" in said and f"{result['parameters']:,}" in said
        assert result["curve"][-1] == [12, result["rmse"]]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    logs = {path.name.rpartition("_202")[0] for path in (tmp_path / "logs").iterdir()}
    assert logs == {"training", "mlp", "transformer"}
    code, again = within(tmp_path, *PMSSM)
    assert code == 0 and "2 of them are done already" in again
    assert {item.job: item.result for item in results.read_results(folder)} == records


def test_pmssm_fails_where_its_error_is_not_finite(monkeypatch: pytest.MonkeyPatch):
    sizes = {"steps": 3, "batch_size": 8, "train_rows": 16}
    pmssm = loaded("pmssm", monkeypatch)
    with pytest.raises(UserError, match="not finite; use a smaller --learning_rate"):
        pmssm.train(lambda **_: "go", "mlp", **sizes, learning_rate=1e30, seed=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("teacher_student", "--teacher_ranks", "9"), "--teacher_ranks 9: a matrix of --size 8"),
        (("teacher_student", "--teacher_ranks", "8", "--student_dims", "4"), "use larger --stud"),
        (
            ("teacher_student", "--teacher_ranks"),
            "--teacher_ranks (): expected one or more different numbers",
        ),
        (
            ("teacher_student", "--student_dims", "4", "4"),
            "(4, 4): expected one or more different numbers",
        ),
        (("teacher_student", "--tolerance", "-1"), "--tolerance -1.0 must be more than 0"),
        (("teacher_student", "--measurements", "4", "0"), "--measurements 0 must be more than 0"),
        (
            ("pmssm", "--models", "mlp", "mlp"),
            "('mlp', 'mlp'): expected one or more different models",
        ),
        (
            ("pmssm", "--models", "mlp", "cnn"),
            "--models cnn: expected transformer, transformer_tabular, mlp",
        ),
        (("pmssm", "--no-parallel", "--slots", "2"), "use either --slots 2 or --no_parallel"),
        (("teacher_student", "--max_gpus", "0"), "max_gpus=0"),
        (("teacher_student", "--checkpoint_interval", "nan"), "checkpoint_interval=nan"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str):
    code, said = within(tmp_path, *arguments)
    assert code == 2 and words in said.splitlines()[-1]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.soak
def test_ctrl_c(tmp_path: Path):
    flags = ("--gnc", "--guesses", "4000000", "--tolerance", "1e-9", "--num_seeds", "1")
    command = [sys.executable, str(ROOT / "examples" / "teacher_student.py"), *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    state = tmp_path / "checkpoints" / "teacher_student" / "state.json"
    wait_until(lambda: state.exists() and '"step"' in state.read_text())
    running.send_signal(signal.SIGINT)
    output = running.communicate()[0].decode()
    assert running.returncode == 130 and "run the same command to continue" in output
