"""run_parallel_experiments.sh, with small trainings on CPU shares."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.harness import processes_of
from gpt2.cli import main
from gpt2.config import experiment_name, gpu_list
from support import ROOT, run_command, small_flags

SCRIPT = ROOT / "run_parallel_experiments.sh"
# Python imports it at its start.
STOP_AT_C = """
import os, signal

real = os.stat
def stat(path, **more):
    if str(path).endswith("c_gpu_cpu"):  # whether it has a folder is asked before it begins
        os.kill(os.getpid(), signal.SIGTERM)
    return real(path, **more)
os.stat = stat
"""
SHORT = {"eval_interval": None, "device": "cpu"}


def environment() -> dict[str, str]:
    """Where the script finds this Python, and no GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Trains several named experiments side by side"),
        (["a --seed 1", "b", "a --seed 2"], "two experiments have the name a"),
        (["../a"], "'../a' must begin with a name of letters, digits, . _ and -"),
        (["--learning_rate 1"], "unknown option --learning_rate 1; flags of all experiments come"),
        (["a --sample_prompt 'b"], "has an unmatched quote"),
        (["--slots", "0", "a"], "--slots 0: expected a number from 1 to 9999"),
        (["--gpus=0", "--slots=2", "a"], "use either --gpus or --slots"),
        (["--max_gpus=1", "--slots=2", "a"], "use either --max_gpus or --slots"),
        (["--gpus"], "--gpus needs a value"),
        (["--max_gpus", "0", "a"], "--max_gpus 0: expected a number from 1 to 9999"),
        (
            ["--gpus", "0,-1", "a"],
            "--gpus '0,-1': '-1' is not a GPU (understood: 0); expected GPUs separated by commas",
        ),
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt2", "experiments", "run", *arguments])
    assert main.main() == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_the_script_passes_its_arguments_and_the_exit_code_on(tmp_path: Path):
    done = run_command([str(SCRIPT), "a --sample_prompt 'b"], cwd=tmp_path, expect=2)
    assert "has an unmatched quote" in done.stderr
    assert done.stdout == ""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """The script where `python` only tells what it was started with."""
    return stood_in(tmp_path, python='echo "gpus=$CUDA_VISIBLE_DEVICES $*"')


def stood_in(folder: Path, python: str) -> Path:
    """The script in a place of its own, beside an environment whose `python` runs this code in bash
    for a training, and is Python for the rest."""
    environment = folder / "with blank" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "with blank" / "src").symlink_to(ROOT / "src")
    command = environment / "bin" / "python"
    command.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ $1 == */train_improved.py ]] || exec -a "$0" "{Path(sys.executable).resolve()}" "$@"\n'
        f"{python}\n"
    )
    command.chmod(0o755)
    return Path(shutil.copy(SCRIPT, folder / "with blank"))


@pytest.mark.parametrize(
    "visible",
    [
        *("0, 1", " 3 ,-1,4", ""),
        *(pytest.param(shown, marks=pytest.mark.soak) for shown in ("2", "-1", "MIG-GPU-89/1/0")),
    ],
)
def test_gpus_are_called_as_the_training_calls_them(stand_in: Path, tmp_path: Path, visible: str):
    done = run_command([str(stand_in), "a", "b"], cwd=tmp_path, CUDA_VISIBLE_DEVICES=visible)
    gpu_id = experiment_name.first_gpu(gpu_list.shown_by(visible) or [])
    (console,) = (tmp_path / "logs" / experiment_name.label("a", gpu_id)).glob("console_*.log")
    shown = console.read_text().split()[0].removeprefix("gpus=")
    assert experiment_name.first_gpu(gpu_list.shown_by(shown) or []) == gpu_id
    on = "1" if visible == "0, 1" else gpu_id
    begun = re.search(r"begins b: process \d+, log (\S+)", done.stdout)
    assert begun and experiment_name.label("b", on) in begun[1]


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--log_dir", "kept", "--out_dir=out"], "kept"),
        (["--out-dir", "first", "--out_dir", "out"], "out/logs"),
    ],
)
def test_its_console_log_lies_beside_the_trainings(
    stand_in: Path, tmp_path: Path, flags: list[str], folder: str
):
    for label in (f"{folder}/a_gpu_7", "own/b_gpu_5"):
        (tmp_path / label).mkdir(parents=True)
    experiments = ["a --x 'two  words'\n--y ''", "b --log_dir=own"]
    done = run_command(
        [str(stand_in), "--gpus", "5,7", *experiments, "--", *flags], cwd=tmp_path, expect=0
    )
    assert "gpu5 begins b: " in done.stdout
    (console,) = (tmp_path / folder / "a_gpu_7").glob("console_*.log")
    given = console.read_text()
    assert given.endswith(f"{' '.join(flags)} --x two  words --y  --experiment_name a\n")
    assert list((tmp_path / "own" / "b_gpu_5").glob("console_*.log"))
    assert not (tmp_path / "logs").exists()


def test_after_a_stop_nothing_begins(tmp_path: Path):
    """A stop that comes while the third of five is about to begin."""
    (tmp_path / "sitecustomize.py").write_text(STOP_AT_C)
    script = stood_in(tmp_path, python="exec sleep infinity")
    done = run_command(
        [str(script), "--slots=5", *"abcde"], cwd=tmp_path, expect=143, PYTHONPATH=str(tmp_path)
    )
    assert {path.parent.name for path in tmp_path.glob("logs/*/*")} <= {"a_gpu_cpu", "b_gpu_cpu"}
    assert "stopped a" in done.stdout and "stopped b" in done.stdout
    assert "stopped: 0 of 5 done" in done.stdout


def test_one_without_a_log_ends_no_other(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a_gpu_cpu").write_text("a file where its folder would be")
    script = stood_in(tmp_path, python="sleep 1; echo done")
    done = run_command([str(script), "--slots=2", "a", "b"], cwd=tmp_path, expect=1)
    assert "finished b after" in done.stdout
    failed = next(line for line in done.stdout.splitlines() if line.startswith("failed: a on cpu"))
    assert "a_gpu_cpu" in failed
    assert "finished: 1 of 2 done, 1 failed" in done.stdout


def test_experiments_outlive_the_reader_but_not_the_script(tmp_path: Path):
    """Nobody reads what the script says of `b`; then a signal ends it that it does not know."""
    python = (
        "[[ $* == *'--experiment_name a' ]] && exit\n"
        "trap 'echo told; exit 3' TERM; echo runs; while true; do sleep 0.1; done"
    )
    script = stood_in(tmp_path, python=python)
    with subprocess.Popen(
        [str(script), "--slots=1", "a", "b"], cwd=tmp_path, stdout=subprocess.PIPE
    ) as started:
        try:
            started.stdout.readline()
            started.stdout.close()
            wait_for(tmp_path, "b", "runs\n")
            started.send_signal(signal.SIGUSR1)
            wait_for(tmp_path, "b", "runs\ntold\n")
        finally:
            started.terminate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_signal_kills_and_so_does_the_end_of_the_command(
    tmp_path: Path, number: signal.Signals
):
    """An experiment that ends neither after SIGTERM nor by itself."""
    python = "trap 'echo told' TERM; echo runs; while true; do sleep 0.1; done"
    script = stood_in(tmp_path, python=python)
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        started = subprocess.Popen(
            [str(script), "--slots=1", "a", "b"], cwd=tmp_path, stdout=output, stderr=output
        )
    wait_for(tmp_path, "a", "runs\n")
    if number == signal.SIGTERM:
        started.send_signal(number)
        wait_for(tmp_path, "a", "runs\ntold\n")
    started.send_signal(number)
    assert started.wait() == (143 if number == signal.SIGTERM else -number)
    while processes_of(f"{tmp_path}/with blank/.venv"):
        time.sleep(0.05)
    if number == signal.SIGTERM:
        lines = printed.read_text().splitlines()
        assert lines[1:3] == [
            "stopping: every experiment saves and ends; a second signal kills",
            "cpu0 stopped a: its owner has ended",
        ]
        assert lines[3].startswith("stopped: 0 of 2 done")


def wait_for(folder: Path, name: str, text: str) -> None:
    """Waits until that, and nothing else, is what an experiment has printed."""
    while [log.read_text() for log in folder.glob(f"logs/{name}_gpu_*/console_*.log")] != [text]:
        time.sleep(0.05)


@pytest.mark.soak
def test_the_next_takes_the_place_that_it_had_before(data_root: Path, tmp_path: Path):
    """Two places, in which two experiments fail, and a third that trained in one of them before."""
    out = tmp_path / "out of all"
    (out / "logs" / "last_gpu_7").mkdir(parents=True)
    flags = small_flags(data_root, out, max_steps=2, **SHORT)
    experiments = ["bad --n_head 3", "worse --n_head 5", "last --sample_prompt 'a b'"]
    done = run_command(
        [str(SCRIPT), "--gpus", "5,7", *experiments, "--", *flags],
        cwd=tmp_path,
        expect=1,
        **environment(),
    )
    lines = done.stdout.splitlines()
    begun = sorted(line.partition(":")[0] for line in lines[:2])
    assert begun == ["gpu5 begins bad", "gpu7 begins worse"]
    failed = next(place for place, line in enumerate(lines) if line.startswith("failed: worse on"))
    assert lines[failed].startswith(
        "failed: worse on gpu7: exit code 2; its last line: error: n_embd=16 is not a multiple of "
    )
    started = next(line for line in lines if line.startswith("gpu7 begins last: process "))
    assert lines.index(started) > failed
    assert lines[-1].startswith("finished: 1 of 3 done, 2 failed")
    link = out / "checkpoints" / "ckpt_exp_last_gpu_7.pt"
    assert os.readlink(link) == "last_gpu_7/step_000002.pt"
    (console,) = (out / "logs" / "last_gpu_7").glob("console_*.log")
    assert f"Checkpoint will be saved as {link}\n" in console.read_text()


@pytest.mark.parametrize(
    ("number", "code", "slots"),
    [
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.soak),
        pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.soak),
    ],
)
def test_a_stop_saves_all(
    data_root: Path, tmp_path: Path, number: signal.Signals, code: int, slots: int
):
    """Ctrl+C goes to the whole group, as from a terminal; SIGTERM to the script alone."""
    running = ["a", "b"][:slots]
    names = [*running, "never"]
    flags = small_flags(data_root, tmp_path, max_steps=100_000, **SHORT)
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        script = subprocess.Popen(
            [str(SCRIPT), "--slots", str(slots), *names, "--", *flags],
            cwd=tmp_path,
            env=os.environ | environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A shell may have started the tests with SIGINT ignored, which bash could not undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    logs = [tmp_path / "logs" / f"{name}_gpu_cpu" / "log.txt" for name in running]
    while not all(log.exists() and "step 3 |" in log.read_text() for log in logs):
        assert script.poll() is None, printed.read_text()
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(script.pid, number)
    else:
        script.send_signal(number)
    assert script.wait() == code, printed.read_text()
    assert processes_of(f"\0{tmp_path}\0") == []
    for name, log in zip(running, logs, strict=True):
        link = tmp_path / "checkpoints" / f"ckpt_exp_{name}_gpu_cpu.pt"
        step = int(link.resolve(strict=True).stem.removeprefix("step_"))
        assert f"Stopped by signal 15 at step {step}; --resume latest continues" in log.read_text()
    said = printed.read_text()
    assert sorted(re.findall(r"^cpu\d stopped (\w+)$", said, re.MULTILINE)) == running
    assert f"\nstopped: 0 of {len(names)} done" in said
    assert "run the same command with --resume latest after --" in said
