"""What `gpt2 seeds`, `models`, `search` and `experiments run` post to --notify."""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.base import folder_lock
from gpt2.base.errors import ConfigError, FolderInUse
from gpt2.cli import watch
from gpt2.cli.experiment_notices import posting_end
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.progress import state
from gpt2.experiments.progress.state import ExperimentState
from gpt2.experiments.results import EXPERIMENT_FILE
from gpt2.metrics import notify
from webhook import SECRET, webhook

BEGUN = ExperimentState.at_start("seeds", 4, [Slot(0, "cpu0", {})])
LAST = replace(BEGUN, finished=3, failed=1)


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("code", "event"), [(0, "finished"), (1, "failed"), (128 + signal.SIGINT, "stopped")]
)
@pytest.mark.parametrize("is_on_disk", [True, False])
def test_the_end_is_posted_with_what_was_done(
    code: int, event: str, is_on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with webhook() as hook:
        monkeypatch.setattr(sys, "argv", ["gpt2 seeds", "--notify", hook.address])
        folder, more = (tmp_path, ()) if is_on_disk else (None, (LAST,))
        with posting_end(hook.address, "seeds checkpoints/seeds", folder) as ended:
            state.write(tmp_path, LAST)
            assert ended(code, *more) == code
        (message,) = hook.received
    assert SECRET not in str(sys.argv)  # which the workers get
    assert message["event"] == event
    assert message["title"].startswith("seeds checkpoints/seeds on ")
    assert f"{event}: 3 of 4 done, 1 failed | " in message["text"]


def test_an_error_is_posted_but_not_that_a_second_start_is_refused(tmp_path: Path):
    with webhook() as hook:
        for error in (ConfigError("no data"), OSError("disk on fire"), FolderInUse("process 1")):
            with pytest.raises(type(error)), posting_end(hook.address, "seeds", tmp_path):
                raise error
        texts = [message["text"] for message in hook.received]
    assert [text.partition(" failed: ")[2] for text in texts] == [
        "no data",
        "OSError: disk on fire",
    ]


def test_a_death_is_posted_once_by_a_watch_or_by_the_next_start(tmp_path: Path):
    """No process holds the folder, whose state says `running`."""
    (tmp_path / EXPERIMENT_FILE).write_text('{"kind": "seeds", "fixed": {}, "total": 4}')
    state.write(tmp_path, LAST)
    with webhook() as hook:
        command = ["gpt2 watch", str(tmp_path), "--notify", hook.address]
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", command)
                assert watch.watch_main() == 0
        assert hook.wait_for(1) == ["died"]
        for _ in range(2):  # the first death is posted already, the second is not
            with posting_end(hook.address, "seeds", tmp_path):
                pass
        assert hook.wait_for(2) == ["died", "died"]
        with folder_lock.held(tmp_path), posting_end(hook.address, "seeds", tmp_path):
            pass
    assert len(hook.received) == 2
    first, second = (message["text"] for message in hook.received)
    beginning = f"seeds {tmp_path} on {LAST.host} died: process {LAST.pid} ended unexpectedly"
    assert first.startswith(beginning)
    assert "; 3 of 4 done, 1 failed | " in first and " left" not in first
    assert second.endswith("; it is started again now")
