"""Data that is not what it was: 3,000 tokens of a shard overwritten, another validation split under
the same names; in a new run, at a resume, while the run trains."""

import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest

import forked_ranks
from gpt2.base.errors import CheckpointError, DataError, UserError, WrongContent
from gpt2.checkpoint import store
from gpt2.cli.parse import USER_ERROR
from gpt2.data import digests, verifier
from gpt2.data.digests import DigestMemory, Fault
from gpt2.data.manifest import MANIFEST, Shard
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler
from gpt2.data.shards import load_index
from gpt2.data.training_data import TrainingData
from gpt2.data.verifier import Verifier
from gpt2.train import data_faults, status, trainer, training_run
from gpt2.train.report import Answer
from gpt2.train.state import TrainState
from support import loss_lines, small_config, small_flags

Damage = Callable[[Path], str]


def overwrite_tokens(folder: Path) -> str:
    """3,000 tokens of the first training shard, in place; returns the shard's name."""
    path = sorted(folder.glob("*_train_*.npy"))[0]
    with path.open("r+b") as file:
        file.seek(128 + 2 * 2000)
        file.write(np.arange(3000, dtype="<u2").tobytes())
    return path.name


def replace_validation(folder: Path) -> str:
    """Another validation split of the same size under the same name."""
    (path,) = folder.glob("*_val_*.npy")
    tokens = np.load(path)[::-1].copy()
    path.unlink()
    np.save(path, tokens)
    return path.name


DAMAGES = (overwrite_tokens, replace_validation)


@pytest.fixture(params=["manifest", "foreign"])
def folder(gpt2_tokens: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the small corpus, an hour old, with its manifest or as another tool's shards."""
    folder = tmp_path / "corpus"
    shutil.copytree(gpt2_tokens, folder, ignore=shutil.ignore_patterns(digests.NAME))
    if request.param == "foreign":
        (folder / MANIFEST).unlink()
    age(folder)
    return folder


def age(folder: Path) -> None:
    an_hour_ago = time.time() - 3600
    for path in folder.iterdir():
        os.utime(path, (an_hour_ago, an_hour_ago))


def remembered(folder: Path) -> set[str]:
    lines = (folder / digests.NAME).read_text().splitlines()
    return {json.loads(line)["file"] for line in lines}


def steps_kept(out: Path) -> list[int]:
    return [item.training.step for item in store.list_checkpoints(out / "checkpoints")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_new_run_on_damaged_shards_of_a_manifest_ends(
    damage: Damage, folder: Path, tmp_path: Path
):
    if not (folder / MANIFEST).exists():
        pytest.skip("nothing says what new shards of another tool should hold")
    name = damage(folder)
    age(folder)
    with pytest.raises(
        WrongContent, match=rf"/{name}: its SHA-256 differs from the manifest's.*which is saved$"
    ):
        trainer.run(small_config(folder, tmp_path))
    assert status.read(tmp_path / "checkpoints").state == "stopped", "a restart would not help"
    [step] = steps_kept(tmp_path)[-1:]
    with pytest.raises(DataError, match=rf"^[^;]*/{name}: its SHA-256 differs"):
        trainer.run(small_config(folder, tmp_path, resume="latest"))
    assert steps_kept(tmp_path)[-1] == step  # not one step more on what is known to be wrong


@pytest.mark.parametrize("answer", ["stop", "prune"])
def test_a_complete_run_is_verified_whatever_report_answers(
    answer: Answer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The shards are still being hashed when the last step is done."""
    if not (folder / MANIFEST).exists():
        pytest.skip("nothing says what new shards of another tool should hold")
    name, waits, may_verify = overwrite_tokens(folder), itertools.count(1), threading.Event()
    age(folder)
    verify, wait_for = Verifier._verify, Verifier.wait_for

    def verify_later(self: Verifier, memory: DigestMemory, shard: Shard) -> None:
        while not may_verify.wait(0.01):
            if self._closed.is_set():
                raise verifier._Closed
        verify(self, memory, shard)

    def wait_twice(self: Verifier, files: Collection[str], timeout_s: float) -> bool:
        if next(waits) == 2:
            may_verify.set()
        return wait_for(self, files, timeout_s)

    monkeypatch.setattr(training_run, "DATA_SLICE_S", 0.01)
    monkeypatch.setattr(Verifier, "_verify", verify_later)
    monkeypatch.setattr(Verifier, "wait_for", wait_twice)
    config = small_config(folder, tmp_path, max_steps=2, eval_interval=None)
    with pytest.raises(WrongContent, match=rf"/{name}: its SHA-256 differs"):
        trainer.run(config, lambda **metrics: answer if metrics["step"] == 2 else "go")


@pytest.mark.parametrize("knows_versions", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_resume_on_other_content_is_refused(
    damage: Damage, knows_versions: bool, folder: Path, tmp_path: Path
):
    """Before its first step if the shard was verified before, soon after that if nothing about it
    is remembered."""
    trainer.run(small_config(folder, tmp_path, max_steps=2))
    assert remembered(folder) == {path.name for path in folder.glob("*.npy")}
    name = damage(folder)
    if not knows_versions:
        (folder / digests.NAME).unlink()
    with pytest.raises(DataError, match=f"{name}: its SHA-256 differs") as caught:
        trainer.run(small_config(folder, tmp_path, resume="latest"))
    assert ("which is saved" in str(caught.value)) != knows_versions
    if knows_versions:
        assert steps_kept(tmp_path) == [2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_changes_while_the_run_trains_ends_it(
    damage: Damage, folder: Path, tmp_path: Path, caplog
):
    """After a verified beginning: no step uses what is wrong, and the steps before are saved."""
    trainer.run(small_config(folder, tmp_path, max_steps=2))
    before = steps_kept(tmp_path)

    def damage_at_7(**metrics: float) -> Answer:
        if metrics["step"] == 7 and "loss" in metrics:
            damage(folder)
        return "go"

    shard = "small_train_000001.npy" if damage is overwrite_tokens else "small_val_000000.npy"
    config = small_config(folder, tmp_path, resume="latest", max_steps=40)
    with pytest.raises(WrongContent, match=rf"{shard} has changed since the run opened it"):
        trainer.run(config, report=damage_at_7)
    assert status.read(tmp_path / "checkpoints").state == "stopped", "a restart would not help"
    assert "Traceback" not in caplog.text
    assert before < steps_kept(tmp_path)
    assert steps_kept(tmp_path)[-1] in range(7, 11)  # 10 is the next validation
    with pytest.raises(DataError, match=rf"{shard}: its SHA-256 differs"):
        trainer.run(small_config(folder, tmp_path, resume="latest", max_steps=50))


def test_the_first_step_that_may_have_read_it_is_named(folder: Path):
    index = load_index(Storage(str(folder)))
    data = TrainingData({"": index})
    sampler, state = Sampler((100, 50, 80), rows_per_step=8, seed=1), TrainState(step=20)
    second, third = (shard.file for shard in index.of("train")[1:3])

    def text(fault: Fault, state: TrainState = state) -> str:
        return data_faults.extent(fault, "", data, sampler, state)

    assert text(Fault("x: broken", second)) == "step 13 may have used it first"
    assert {int(row) for row in sampler.rows(12)[:, 0]} == {0, 1}
    assert 1 not in sampler.rows(11)[:, 0]
    assert text(Fault("x: broken", third), TrainState(step=18)) == "no step has used it"
    skipped = TrainState(step=20, left_out=(2, 5))
    assert text(Fault("x", second), skipped) == "step 8 may have used it first"
    assert text(Fault("x", index.of("val")[0].file)) == "validation may have used it"
    assert text(Fault("x")) == "no step has used it"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fingerprint_of_an_earlier_version_is_accepted_with_a_note(
    damage: Damage, folder: Path, tmp_path: Path, caplog
):
    out, config = tmp_path / "checkpoints", small_config(folder, tmp_path, max_steps=2)
    trainer.run(config)
    as_earlier_version(out, load_index(Storage(str(folder))).former_fingerprint())
    caplog.set_level("INFO")
    trainer.run(small_config(folder, tmp_path, max_steps=4, resume="latest"))
    assert "the checkpoint is of an earlier version" in caplog.text
    caplog.clear()
    trainer.run(small_config(folder, tmp_path, max_steps=6, resume="latest"))
    assert "earlier version" not in caplog.text
    name = damage(folder)
    with pytest.raises(DataError, match=name):
        trainer.run(small_config(folder, tmp_path, max_steps=8, resume="latest"))
    as_earlier_version(out, "0" * 16)
    with pytest.raises(CheckpointError, match=r"training data: .* \(0{16}\) in the checkpoint"):
        trainer.run(small_config(folder, tmp_path, max_steps=8, resume="latest"))


def as_earlier_version(folder: Path, fingerprint: str) -> None:
    """The newest checkpoint as an earlier version wrote it, in place of all."""
    newest = store.list_checkpoints(folder)[-1]
    state = store.load(newest.path) | {"data_fingerprint": fingerprint}
    for path in folder.glob("step_*"):
        path.unlink()
    store.save(folder, state, newest.training, keep_last=3)


def test_all_ranks_save_and_end(gpt2_tokens: Path, tmp_path: Path):
    """The shard is wrong from the beginning: rank 0 alone verifies it."""
    folder = Path(shutil.copytree(gpt2_tokens, tmp_path / "corpus"))
    (folder / digests.NAME).unlink(missing_ok=True)
    name = overwrite_tokens(folder)
    printed = forked_ranks.run(small_flags(folder, tmp_path), 2, tmp_path, expect=USER_ERROR)
    assert printed.count(f"error: {folder}/{name}: its SHA-256 differs") == 1
    ending = f"stopped after step {steps_kept(tmp_path)[-1]}, which is saved"
    assert f"may have used it first; {ending}" in printed or (
        f"no step has used it; {ending}" in printed
    )
    assert "lost the connection" not in printed
    assert "failed:" not in printed  # with which the watchdog begins a traceback


def test_a_repaired_shard_lets_the_run_go_on_bit_identically(
    folder: Path, tmp_path: Path, gpt2_tokens: Path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.run(small_config(gpt2_tokens, whole))
    trainer.run(
        small_config(folder, parts),
        report=lambda **metrics: "stop" if metrics["step"] == 7 else "go",
    )
    name = overwrite_tokens(folder)
    with pytest.raises(UserError, match=name):
        trainer.run(small_config(folder, parts, resume="latest"))
    shutil.copyfile(gpt2_tokens / name, folder / name)
    trainer.run(small_config(folder, parts, resume="latest"))
    assert loss_lines(parts / "logs/log.txt") == loss_lines(whole / "logs/log.txt")
