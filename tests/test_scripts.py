"""The scripts that users type, as they are typed."""

import contextlib
import os
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from support import ROOT, run_command, wait_until

SHIMS = [
    "src/train_improved.py",
    "src/main_multi_gpu.py",
    "src/train_models.py",
    "src/parallel_search.py",
]


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1"""


@pytest.mark.parametrize("name", SHIMS)
def test_shims_are_short(name: str):
    assert (ROOT / name).read_text().count("\n") < 15


def test_list_checkpoints_in_an_empty_folder(tmp_path: Path, monkeypatch, capsys):
    script = ROOT / "src" / "train_improved.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--list_checkpoints"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "No checkpoints in checkpoints\n"


def test_estimate_without_a_run(tmp_path: Path):
    done = run_command([sys.executable, str(ROOT / "estimate_training_time.py")], cwd=tmp_path)
    assert "No run found in checkpoints" in done.stdout
    assert "On other numbers of GPUs" in done.stdout


@pytest.mark.parametrize("name", [*SHIMS, "estimate_training_time.py"])
def test_outside_the_environment_the_way_in_is_named(name: str, tmp_path: Path):
    command = [sys.executable, "-S", str(ROOT / name)]  # -S: without installed packages
    done = run_command(command, cwd=tmp_path, expect=2, PYTHONPATH="")
    assert done.stderr.startswith("error: No module named")
    assert "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("name", SHIMS[1:])
def test_a_worker_that_imports_the_script_imports_nothing_else(name: str):
    as_worker = f"import runpy; runpy.run_path({str(ROOT / name)!r}, run_name='__mp_main__')"
    done = run_command([sys.executable, "-S", "-c", as_worker], PYTHONPATH="")  # no packages
    assert done.stdout == done.stderr == ""


def test_help_of_tensorboard_script():
    assert "--port" in run_command(["./start_tensorboard.sh", "--help"]).stdout
    assert "needs a value" in run_command(["./start_tensorboard.sh", "--port"], expect=2).stderr


def test_tensorboard_starts_from_any_folder(tmp_path: Path):
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [str(ROOT / "start_tensorboard.sh"), "--port", str(port)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as started:
        try:
            assert started.stdout.readline().startswith(
                f"TensorBoard for {ROOT}/runs: http://localhost:{port}"
            )
            url = f"http://localhost:{port}/data/environment"
            wait_until(lambda: started.poll() is not None or page_at(url))
            assert f"{ROOT}/runs".encode() in page_at(url)
            assert listening_at(port) <= LOOPBACK
            again = [str(ROOT / "start_tensorboard.sh"), f"--port={port}"]
            assert f"error: port {port} is in use" in run_command(again, expect=2).stderr
        finally:
            started.terminate()  # a shell may have started the tests with SIGINT ignored


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def listening_at(port: int) -> set[str]:
    """The local addresses, in the kernel's hexadecimal, at which a process listens at `port`."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    is_listening = "0A"
    found = {
        row[1].split(":")[0]
        for row in rows
        if row[3] == is_listening and row[1].endswith(f":{port:04X}")
    }
    assert found
    return found


@pytest.mark.parametrize(
    ("flags", "url", "host", "bind_all"),
    [
        ([], "http://localhost:PORT (", None, False),
        (["--bind_all"], "http://localhost:PORT, and every address", None, True),
        (["--host", "0.0.0.0"], "http://0.0.0.0:PORT (", "0.0.0.0", False),
        (["--host=::1"], "http://[::1]:PORT (", "::1", False),
        (["--path_prefix", "/tb"], "http://localhost:PORT/tb (", None, False),
    ],
)
def test_tensorboard_is_open_to_the_network_on_request_only(tmp_path, flags, url, host, bind_all):
    """The script's copy starts a program that prints what it receives; TensorBoard parses that."""
    program = pytest.importorskip("tensorboard.program")
    script = Path(shutil.copy(ROOT / "start_tensorboard.sh", tmp_path))
    stand_in = tmp_path / ".venv" / "bin" / "tensorboard"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stand_in.chmod(0o755)
    port = free_port()
    line, *received = run_command([str(script), "--port", str(port), *flags]).stdout.splitlines()
    assert line.startswith(f"TensorBoard for {tmp_path}/runs: {url.replace('PORT', str(port))}")
    board = program.TensorBoard()
    board.configure(("tensorboard", *received))
    assert (board.flags.host, board.flags.bind_all, board.flags.port) == (host, bind_all, port)


def test_tensorboard_is_bound_in_one_way():
    script = [str(ROOT / "start_tensorboard.sh"), "--host", "0.0.0.0", "--bind_all"]
    error = run_command(script, expect=2).stderr
    assert error == "error: use one of --host=0.0.0.0 --bind_all\n"


def page_at(url: str) -> bytes:
    with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
        return bytes(answer.read())
    return b""
