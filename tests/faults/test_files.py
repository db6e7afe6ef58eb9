"""Damaged checkpoints, a full disk, a folder that another run uses."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from faults.harness import trial
from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError, FolderInUse
from gpt2.checkpoint import store
from gpt2.cli import train
from gpt2.train import trainer
from gpt2.train.report import Answer
from support import ROOT, small_config, small_flags, train_command

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def data_root(characters: Path) -> Path:
    return characters


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 10, 15 and 20."""
    out = tmp_path_factory.mktemp("finished")
    trainer.run(small_config(data_root, out, checkpoint_interval=5))
    return out / "checkpoints"


def truncate(folder: Path) -> None:
    path = folder / "step_000020.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(folder: Path) -> None:
    path = folder / "step_000020.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_the_metadata(folder: Path) -> None:
    (folder / "step_000020.json").write_text("")


def forge_the_size(folder: Path) -> None:
    path = folder / "step_000020.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bytes": 5}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"step_000020\.pt has \d+ bytes, its metadata says \d+"),
        (flip_a_bit, r"step_000020\.pt is damaged: its SHA-256 is not that of its metadata"),
        (empty_the_metadata, r"step_000020\.json is empty, damaged or of another version"),
        (forge_the_size, r"step_000020\.(pt has|json is)"),
    ],
)
@trial("damaged checkpoint")
def test_damaged_checkpoint_is_set_aside(
    data_root: Path,
    tmp_path: Path,
    finished: Path,
    damage: Callable[[Path], None],
    reason,
    capfd,
    caplog,
):
    folder = Path(shutil.copytree(finished, tmp_path / "checkpoints", symlinks=True))
    damage(folder)
    before = (folder / "step_000020.pt").read_bytes()
    result = trainer.run(small_config(data_root, tmp_path, resume="latest", max_steps=22))
    assert result.step == 22
    assert "  - Step: 15\n" in capfd.readouterr().out
    warnings = [item.getMessage() for item in caplog.records if item.levelname == "WARNING"]
    [warning] = [text for text in warnings if "learning rate" not in text]  # of a longer cosine
    assert warning.endswith("renamed to step_000020.pt.corrupt")
    assert re.search(reason, warning)
    assert (folder / "step_000020.pt.corrupt").read_bytes() == before
    assert (folder / "step_000020.json.corrupt").exists()


def test_reading_a_folder_renames_nothing(finished: Path, tmp_path: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "checkpoints", symlinks=True))
    flip_a_bit(folder)
    before = sorted(os.listdir(folder))
    assert store.find(folder, "latest") == folder / "step_000015.pt"
    assert sorted(os.listdir(folder)) == before


@trial("dangling latest.pt")
def test_dangling_link(data_root: Path, tmp_path: Path, finished: Path, capfd, caplog):
    folder = Path(shutil.copytree(finished, tmp_path / "checkpoints", symlinks=True))
    for name in ("step_000020.pt", "step_000020.json"):
        (folder / name).unlink()
    trainer.run(small_config(data_root, tmp_path, resume="latest", max_steps=22))
    assert "latest.pt points to step_000020.pt, which does not exist" in caplog.text
    assert "  - Step: 15\n" in capfd.readouterr().out
    assert os.readlink(folder / "latest.pt") == "step_000022.pt"


def test_where_all_are_damaged_nothing_is_renamed(data_root: Path, tmp_path: Path, finished: Path):
    folder = Path(shutil.copytree(finished, tmp_path / "checkpoints", symlinks=True))
    for path in folder.glob("step_*.pt"):
        path.write_bytes(b"")
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used \(3 files damaged"):
        trainer.run(small_config(data_root, tmp_path, resume="latest", max_steps=22))
    assert set(before) <= set(os.listdir(folder))


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Within the block this process cannot write larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@trial("disk full during a save")
def test_full_disk(gpt2_tokens: Path, tmp_path: Path, monkeypatch, capfd):
    """Simulated by a limit: training continues, and the last save fails with a message."""
    flags = {"checkpoint_interval": 5, "eval_interval": None}
    trainer.run(small_config(gpt2_tokens, tmp_path, **flags, max_steps=5))
    before = (tmp_path / "checkpoints/step_000005.pt").read_bytes()
    more = small_flags(gpt2_tokens, tmp_path, **flags, max_steps=20, resume="latest")
    monkeypatch.setattr(sys, "argv", ["gpt2 train", *more])
    with files_of_at_most(len(before) // 2):
        assert train.train_main() == 2
    printed = capfd.readouterr()
    warnings = [line for line in printed.err.splitlines() if line.startswith("WARNING: training")]
    assert len(warnings) == 2  # at 10 and 15
    assert all("earlier checkpoints are intact" in line for line in warnings)
    assert all("[Errno 27] File too large" in line for line in warnings)
    assert printed.out.count("step 20 |") == 1
    assert "error: cannot save" in printed.err
    assert "step_000020.pt" in printed.err
    assert "Traceback" not in printed.err
    assert [item.training.step for item in store.list_checkpoints(tmp_path / "checkpoints")] == [5]
    assert (tmp_path / "checkpoints/step_000005.pt").read_bytes() == before
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    again = small_config(gpt2_tokens, tmp_path, **flags, max_steps=20, resume="latest")
    assert trainer.run(again).step == 20  # the limit is gone


@pytest.mark.soak
@trial("disk full in the middle, also for the log")
def test_a_disk_that_is_full_for_a_while(gpt2_tokens: Path, tmp_path: Path):
    """A small tmpfs for all files of the run, which is full for some steps before the end."""
    flags = {"max_steps": 120, "eval_interval": None, "keep_last": 2}
    run = train_command(small_flags(gpt2_tokens, tmp_path / "run", **flags))
    command = ["unshare", "-rm", "bash", "-c", FULL_FOR_A_WHILE, "bash", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *run, "--use_tensorboard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr}")
    text = (tmp_path / "run.txt").read_text()
    assert done.returncode == 0, text
    assert text.count("WARNING: training continues without this checkpoint: cannot save") > 4
    assert text.count("WARNING: LogFile cannot write") == 1
    assert text.count("WARNING: TensorBoard cannot write") <= 1  # its writer has a buffer
    kept = store.list_checkpoints(tmp_path / "kept/checkpoints")
    assert [item.training.step for item in kept][-1] == 120
    assert not list((tmp_path / "kept/checkpoints").glob("*.tmp"))


FULL_FOR_A_WHILE = """
mkdir -p "$1" && mount -t tmpfs -o size=60m tmpfs "$1" || exit 77
"${@:2}" >"$1.txt" 2>&1 &
run=$!
until_step() { until grep -q "step $1 |" "$2.txt" || ! kill -0 $run; do sleep 0.02; done; }
until_step 12 "$1"
cat /dev/zero >"$1/filler"
until_step 95 "$1"
rm "$1/filler"
wait $run
code=$?
cp -r "$1" "$(dirname "$1")/kept"
exit $code
"""


@trial("second run in one folder")
def test_second_run_in_one_folder_is_refused(data_root: Path, tmp_path: Path):
    seen = []

    def second(**_: float) -> Answer:
        with pytest.raises(FolderInUse) as caught:
            trainer.run(small_config(data_root, tmp_path, resume="latest"))
        seen.append(str(caught.value))
        return "stop"

    trainer.run(small_config(data_root, tmp_path), second)
    assert f": process {os.getpid()} on {os.uname().nodename}, since 20" in seen[0]
    assert "; stop it first, or choose another folder for this run with --out_dir NAME" in seen[0]
    assert not folder_lock.is_held(tmp_path / "checkpoints")


@trial("lock of a dead process")
def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path):
    script = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from gpt2.base import folder_lock\n"
        "with folder_lock.held(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT / "src")
    before = folder_lock.owner(tmp_path)
    assert before is not None
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.held(tmp_path):
        assert folder_lock.is_held(tmp_path)
        assert folder_lock.owner(tmp_path).pid == os.getpid() != before.pid


@pytest.mark.soak
def test_a_save_does_not_delay_training_and_holds_the_state_of_its_step(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training continues while a checkpoint is written; the file holds the state of its step."""
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    trainer.run(small_config(data_root, quick))
    save, steps = torch.save, []

    def slow_save(state: dict[str, object], file: object) -> None:
        while len(steps) < 14:  # until training has done four more steps
            pass
        save(state, file)

    def count(**metrics: float) -> Answer:
        if "loss" in metrics:
            steps.append(metrics["step"])
        return "go"

    monkeypatch.setattr(torch, "save", slow_save)
    trainer.run(small_config(data_root, slow), count)
    for step in (10, 20):
        one, other = (
            store.load(out / "checkpoints" / f"step_{step:06d}.pt") for out in (slow, quick)
        )
        for part in ("model", "optimizer"):
            left, right = (torch.utils._pytree.tree_leaves(state[part]) for state in (one, other))
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                for a, b in zip(left, right, strict=True)
            )
