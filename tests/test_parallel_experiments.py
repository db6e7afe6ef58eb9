"""run_parallel_experiments.sh, with small trainings on CPU shares."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.harness import processes_of
from support import ROOT, run_command, small_flags

SCRIPT = ROOT / "run_parallel_experiments.sh"
SHORT = {"total_batch_size": 64, "eval_interval": None, "device": "cpu"}


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
        (["a --sample_prompt 'b"], "has a quote that does not end"),
        (["--slots", "0", "a"], "--slots 0 is no number of experiments"),
        (["--gpus=0", "--slots=2", "a"], "--gpus and --slots contradict each other"),
        (["--gpus"], "--gpus needs a value"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str):
    done = run_command([str(SCRIPT), *arguments], cwd=tmp_path, expect=2)
    assert message in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


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
    assert lines[0].startswith("started   bad on gpu 5, process ")
    assert lines[1].startswith("started   worse on gpu 7, process ")
    failed = next(place for place, line in enumerate(lines) if line.startswith("failed    worse"))
    assert lines[failed].endswith(" s, exit code 2")
    assert lines[failed + 1].startswith("          error: n_embd=16 is not a multiple of n_head=5")
    started = next(line for line in lines if line.startswith("started   last on gpu 7, process "))
    assert lines.index(started) > failed
    assert lines[-2] == "1 of 3 finished: last"
    assert lines[-1] in ("2 ended early: bad worse", "2 ended early: worse bad")
    link = out / "checkpoints" / "ckpt_exp_last_gpu_7.pt"
    assert os.readlink(link) == "last_gpu_7/step_000002.pt"
    (console,) = (out / "logs" / "last_gpu_7").glob("console_*.log")
    assert f"Checkpoint will be saved as {link}\n" in console.read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)],
    ids=["Ctrl+C", "SIGTERM"],
)
def test_a_stop_saves_all(data_root: Path, tmp_path: Path, number: signal.Signals, code: int):
    """Ctrl+C goes to the whole group, as from a terminal; SIGTERM to the script alone."""
    names = ["a", "b", "never"] if number == signal.SIGINT else ["a"]
    flags = small_flags(data_root, tmp_path, max_steps=100_000, **SHORT)
    slots = "2" if number == signal.SIGINT else "1"
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        script = subprocess.Popen(
            [str(SCRIPT), "--slots", slots, *names, "--", *flags],
            cwd=tmp_path,
            env=os.environ | environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A shell may have started the tests with SIGINT ignored, which bash could not undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    running = names[: int(slots)]
    logs = [tmp_path / "logs" / f"{name}_gpu_cpu" / "log.txt" for name in running]
    deadline = time.monotonic() + 90
    while not all(log.exists() and "step 3 |" in log.read_text() for log in logs):
        assert time.monotonic() < deadline, printed.read_text()
        assert script.poll() is None, printed.read_text()
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(script.pid, number)
    else:
        script.send_signal(number)
    assert script.wait(60) == code, printed.read_text()
    assert processes_of(f"\0{tmp_path}\0") == []
    for name, log in zip(running, logs, strict=True):
        link = tmp_path / "checkpoints" / f"ckpt_exp_{name}_gpu_cpu.pt"
        step = int(link.resolve(strict=True).stem.removeprefix("step_"))
        assert f"Stopped by signal 15 at step {step}; --resume latest goes on" in log.read_text()
    said = printed.read_text()
    assert said.count("\nstopped   ") == len(running)
    assert f"\n0 of {len(names)} finished\n" in said
    assert ("1 never began: never" in said) == ("never" in names)
