"""`gpt2 watch`: what it finds, and how it behaves on terminals of all kinds."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2.base.errors import CheckpointError, ConfigError
from gpt2.cli import watch
from gpt2.cli.status import status_main
from gpt2.cli.watch import WatchCommand, watch_main
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.progress import state
from gpt2.experiments.progress.listing import ExperimentView
from gpt2.experiments.progress.state import ExperimentState
from gpt2.experiments.results import EXPERIMENT_FILE
from gpt2.inspection.watch import RunView
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier
from gpt2.train.status import Plan
from inspection.written_runs import PLAN, write_run
from support import wait_until
from webhook import webhook


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)


def write_named(folder: Path, name: str) -> None:
    write_run(folder, 2, Plan(**PLAN.__dict__ | {"run_name": name}))
    time.sleep(0.01)  # the newest is found by its time


def write_experiment(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / EXPERIMENT_FILE).write_text('{"kind": "seeds", "fixed": {}, "total": 4}')
    state.write(folder, ExperimentState.at_start("seeds", 4, [Slot(0, "cpu0", {})]))


def found(run: str | None, checkpoint_dir: Path) -> str:
    """The name of the run that is found, or the folder of the experiment."""
    view = watch.find(WatchCommand(run=run, checkpoint_dir=checkpoint_dir), Notifier(None))
    if isinstance(view, ExperimentView):
        return str(view._folder)
    assert isinstance(view, RunView)
    view.update()
    return str(view.log.name)


def test_it_finds_what_is_named_and_the_newest_without_a_name(tmp_path: Path):
    root = tmp_path / "checkpoints"
    for name in ("lr1_gpu_0", "lr1_gpu_1", "lr1_gpu_x_gpu_0", "demo"):
        write_named(root / name, name)
    write_named(tmp_path / "out" / "checkpoints", "in out")
    assert found(None, root) == "demo"
    assert found("lr1", root) == "lr1_gpu_1"
    assert found(str(root / "lr1_gpu_0"), root) == "lr1_gpu_0"
    assert found(str(tmp_path / "out"), root) == "in out"
    assert found(str(root / "demo" / "status.json"), root) == "demo"
    assert found(str(root / "demo" / "log.txt"), root) == "demo"
    (root / "demo" / "status.json").unlink()
    assert found(str(root / "demo"), root) == "demo"  # by its log alone
    assert found(None, root) == "lr1_gpu_x_gpu_0"
    (root / "lr1_gpu_0" / "status.json").write_text("{")
    assert found(str(root / "lr1_gpu_0"), root) == "lr1_gpu_0"


def test_an_experiment_is_shown_instead_of_its_trainings(tmp_path: Path):
    write_named(tmp_path / "old", "old")
    write_experiment(tmp_path / "seeds")
    write_named(tmp_path / "seeds" / "seed=1", "seed=1")
    assert found(None, tmp_path) == str(tmp_path / "seeds")
    assert found(str(tmp_path / "seeds"), tmp_path) == str(tmp_path / "seeds")
    assert found(str(tmp_path / "seeds" / "seed=1"), tmp_path) == "seed=1"
    write_named(tmp_path / "new", "new")
    assert found(None, tmp_path) == "new"


@pytest.mark.parametrize("run", [None, "nothing", "lr_gpu"])
def test_without_a_run_the_error_says_what_to_type(run: str | None, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no run"):
        found(run, tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2 watch", *arguments])
    return watch_main()


def test_without_a_terminal_it_prints_one_view(monkeypatch, capsys, tmp_path: Path):
    write_named(tmp_path, "run")
    monkeypatch.setenv("COLUMNS", "60")
    assert call(monkeypatch, str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert all(len(line) <= 60 for line in printed.splitlines())
    monkeypatch.setattr(sys, "argv", ["gpt2 status", "--follow", "--checkpoint_dir", str(tmp_path)])
    assert status_main() == 0
    later = re.sub(r"\d+s ago", "0s ago", capsys.readouterr().out)
    assert later == re.sub(r"\d+s ago", "0s ago", printed)


def test_an_experiment_without_a_terminal(monkeypatch, capsys, tmp_path: Path):
    write_experiment(tmp_path / "seeds")
    assert call(monkeypatch, str(tmp_path / "seeds")) == 0
    printed = capsys.readouterr().out
    assert "seeds" in printed and "0 of 4 done" in printed
    assert "Its process ended unexpectedly" in printed


def test_a_death_is_posted_once_by_several_watches(monkeypatch, tmp_path: Path, capsys):
    write_named(tmp_path, "run")
    with webhook() as hook:
        for _ in range(2):
            assert call(monkeypatch, str(tmp_path), "--notify", hook.address) == 0
        (message,) = hook.received
    assert message["event"] == "died"


def test_a_bad_address_is_refused(monkeypatch, tmp_path: Path):
    with pytest.raises(ConfigError):
        watch.run(WatchCommand(checkpoint_dir=tmp_path, notify="ftp://x"))


class Terminal:
    """A process on a terminal."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt2", "watch", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env=os.environ
            | {"TERM": "xterm-256color", "COLUMNS": "60", "LINES": "24"}
            | environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(
                os.open(os.ttyname(0), os.O_RDWR)
            ),  # becomes the controlling one
        )
        os.close(other)
        self.text = ""

    def shows(self, words: str) -> bool:
        """Reads what has come; whether `words` are in all of it."""
        with contextlib.suppress(OSError):  # the other end is closed
            self.text += os.read(self._end, 65536).decode(errors="replace")
        return words in self.text

    def press_ctrl_c(self) -> int:
        """Returns the exit code."""
        os.write(self._end, b"\x03")
        wait_until(lambda: not self.shows("no such text") and self.process.poll() is not None)
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    write_named(tmp_path, "the_run")
    return tmp_path


@contextlib.contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments, **environment)
    try:
        yield opened
    finally:
        opened.close()


def test_ctrl_c_leaves_the_terminal_as_it_was_with_the_last_view_and_exit_code_0(watched: Path):
    with terminal(str(watched), "--every", "0.1", NO_COLOR="1") as shown:
        wait_until(lambda: shown.shows("the_run"), lambda: shown.text)
        assert shown.press_ctrl_c() == 0
        on_other_screen, _, after = shown.text.rpartition("\x1b[?1049l")
        assert "\x1b[?1049h" in on_other_screen
        assert "the_run" in after
        assert len(after.splitlines()) <= 24  # the head of the view has not left the terminal
        assert "\x1b[?25h" in shown.text  # the cursor is back
        assert "Traceback" not in shown.text
        assert "\x1b[3" not in shown.text  # no colour


def test_a_dumb_terminal_gets_lines(watched: Path):
    with terminal(str(watched), TERM="dumb") as shown:
        wait_until(lambda: shown.shows("training"), lambda: shown.text)
        assert shown.press_ctrl_c() == 0
        assert "\x1b" not in shown.text
        assert "⠒" not in shown.text


def test_it_starts_without_torch(watched: Path):
    code = (
        "import sys; sys.argv = ['gpt2', 'watch', sys.argv[1]]; from gpt2.cli import main; "
        "main.main(); print([name for name in ('torch', 'matplotlib', 'optuna') "
        "if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(watched)], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
