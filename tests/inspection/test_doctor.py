import io
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gpt2.base import folder_lock
from gpt2.checkpoint import metadata, store
from gpt2.cli import main
from gpt2.config import flops, options, presets
from gpt2.config.run import RunConfig
from gpt2.data import digests
from gpt2.data.digests import DigestMemory
from gpt2.data.manifest import Manifest, Shard
from gpt2.data.remote import Storage
from gpt2.data.shards import load_index
from gpt2.inspection import checks, doctor, machine
from gpt2.inspection.checks import Finding, Need
from inspection import written_runs
from support import small_config, small_flags, write_tasks

GB = 10**9
GPT2_124M = flops.state_bytes(presets.preset("gpt2-124m").model, "adamw")


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_disks_hold_what_the_run_keeps(tmp_path: Path):
    run = options.overlay(presets.preset("gpt2-124m"), {"checkpoint_dir": tmp_path})
    (need,) = doctor.disk_needs(run, None)
    assert need.what == "12 checkpoints of 1.5 GB"
    assert need.bytes == 12 * GPT2_124M
    facts = metadata.TrainingMetadata(1, 0, 1, None, None, 1, "run", "0")
    store.save(tmp_path, {"filler": [0] * 1000}, facts, keep_last=10)
    has = (tmp_path / "step_000001.pt").stat().st_size
    assert doctor.disk_needs(run, None)[0].bytes == 12 * GPT2_124M - has
    assert checks.check_disk(need.bytes, [need]).level == "ok"
    full = checks.check_disk(need.bytes, [need, Need("copies", tmp_path, 1, "lower --cache_gb")])
    assert full.level == "PROBLEM"
    assert full.remedy.endswith("choose another --checkpoint_dir; lower --cache_gb")


def test_folders(tmp_path: Path):
    folders = {"log_dir": tmp_path / "not yet" / "logs", "runs_dir": Path("/proc/1/fd/runs")}
    refused = {flag: machine.unwritable(folder) for flag, folder in folders.items()}
    problem, good = checks.check_folders(folders, refused)
    assert problem.remedy == "choose another with --runs_dir"
    assert good.fact == f"can be written: {tmp_path}/not yet/logs"
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_data_is_opened_as_the_run_will(tmp_path: Path, data_root: Path):
    run = small_config(data_root, tmp_path)
    data, found = doctor.find_data(run)
    assert found.level == "ok"
    assert f"{data.tokens('train'):,} training tokens" in found.fact
    assert found.fact.endswith("all in the manifest: 20 steps")
    broken = Path(shutil.copytree(data_root, tmp_path / "small"))
    (broken / "small_train_000001.npy").unlink()
    data, found = doctor.find_data(small_config(broken, tmp_path))
    assert (data, found.level) == (None, "PROBLEM")
    assert "small_train_000001.npy is in the manifest, but the file is missing" in found.fact
    _, found = doctor.find_data(small_config(tmp_path / "python_stdlib", tmp_path))
    assert found.fact.endswith("when the run starts")
    _, found = doctor.find_data(small_config(tmp_path / "nothing", tmp_path))
    assert "make it with: gpt2 data" in found.fact


@pytest.fixture
def verified(data_root: Path, tmp_path: Path) -> Path:
    """A copy of the small corpus, an hour old, that has been verified."""
    folder = tmp_path / "small"
    shutil.copytree(data_root, folder, ignore=shutil.ignore_patterns(digests.NAME))
    memory = DigestMemory(folder)
    for path in folder.glob("*.npy"):
        os.utime(path, (time.time() - 3600,) * 2)
        with path.open("rb") as file:
            memory.add(path.name, *digests.hash_file(file))
    return folder


def damage(path: Path) -> None:
    """Other tokens in the middle of a shard."""
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(bytes(6000))


def test_a_shard_with_other_content_is_a_problem(tmp_path: Path, data_root: Path, verified: Path):
    before = {path.name: path.read_bytes() for path in verified.iterdir()}
    damage(verified / "small_val_000000.npy")
    data, found = doctor.find_data(small_config(verified, tmp_path))
    assert (data, found.level) == (None, "PROBLEM")
    assert "small_val_000000.npy: its SHA-256 differs from the manifest's" in found.fact
    after = {path.name: path.read_bytes() for path in verified.iterdir()}
    assert after.keys() == before.keys()
    assert after[digests.NAME] == before[digests.NAME], "it has remembered something"
    (verified / "manifest.json").unlink()
    run = small_config(verified, tmp_path)
    data, found = doctor.find_data(run)
    assert found.level == "ok"  # nothing says what new shards of another tool should hold
    facts = metadata.TrainingMetadata(7, 0, 1, None, None, 1, "run", "0")
    fingerprint = load_index(Storage(str(data_root))).fingerprint()
    state = state_of(run) | {"data_fingerprint": fingerprint}
    run.checkpoint.checkpoint_dir.mkdir()
    store.save(run.checkpoint.checkpoint_dir, state, facts, keep_last=10)
    (found,) = doctor.find_checkpoints(options.overlay(run, {"resume": "latest"}), data)
    assert found.level == "PROBLEM"
    assert "validation data: " in found.fact
    assert "first small_val_000000.npy now" in found.fact


def test_a_shard_that_has_changed_and_holds_the_same_is_read_again_and_good(
    tmp_path: Path, verified: Path
):
    os.utime(verified / "small_train_000001.npy")
    before = (verified / digests.NAME).read_bytes()
    data, found = doctor.find_data(small_config(verified, tmp_path))
    assert found.level == "ok"
    assert list(doctor.find_unverified(data)) == []
    assert (verified / digests.NAME).read_bytes() == before


def test_shards_that_were_never_verified_are_named_with_the_command(verified: Path, tmp_path: Path):
    folder = verified.rename(tmp_path / "my data")
    (folder / digests.NAME).unlink()
    damage(folder / "small_val_000000.npy")
    data, found = doctor.find_data(small_config(folder, tmp_path))
    assert found.level == "ok"
    (note,) = doctor.find_unverified(data)
    shards = data.corpora[""].shards
    count, first = len(shards), ", ".join(shard.file for shard in shards[:3])
    assert note.level == "note"
    assert f"{count} of {count} shards were never verified ({first}, …)" in note.fact
    assert note.remedy.endswith(f"type gpt2 data verify '{folder}'")
    for shard in shards[1:]:
        DigestMemory(folder).add(shard.file, (1, 2, 3), shard.sha256)
    (note,) = doctor.find_unverified(data)
    assert f"1 of {count} shards were never verified (small_val_000000.npy);" in note.fact


def test_of_verified_shards_only_a_few_bytes_are_read(tmp_path: Path, monkeypatch):
    """Files with holes, of the size of a real corpus: to read them takes long."""
    tokens, files = 100_000_000, ["big_val_000000.npy", "big_train_000001.npy"]
    for name in files:
        with (tmp_path / name).open("wb") as file:
            shape = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
            np.lib.format.write_array_header_1_0(file, shape)
            size = file.tell() + 2 * tokens
            file.truncate(size)
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
        version = digests.version_of((tmp_path / name).stat())
        DigestMemory(tmp_path).add(name, version, "0" * 64)
    splits = dict(zip(files, ("val", "train"), strict=True))
    listed = tuple(Shard(name, splits[name], tokens, size, "0" * 64) for name in files)
    recipe = (tokens, tokens, None, 1, 0, 0, "0")
    Manifest("big", "holes", "gpt2", 50257, "uint16", *recipe, listed).write(tmp_path)
    read: list[int] = []
    pread = os.pread

    def counted(handle: int, count: int, place: int) -> bytes:
        read.append(count)
        return pread(handle, count, place)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(digests, "hash_file", lambda *_: pytest.fail("a whole shard was read"))
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("a shard was mapped"))
    data, found = doctor.find_data(options.overlay(RunConfig(), {"data_root": str(tmp_path)}))
    assert found.level == "ok"
    assert list(doctor.find_unverified(data)) == []
    assert len(read) == 5 * len(files)  # of each, a seek and a page or two
    assert max(read) <= 4096


def test_remote_data_is_opened_and_its_copies_need_room(tmp_path: Path, data_root: Path):
    far = {"data_root": f"file://{data_root}", "cache_dir": tmp_path / "cache"}
    run = options.overlay(small_config(data_root, tmp_path), far)
    data, found = doctor.find_data(run)
    assert found.level == "ok"
    assert doctor.writable_folders(run)["cache_dir"] == tmp_path / "cache"
    copies = doctor.disk_needs(run, data)[1]
    assert copies.bytes == sum(shard.bytes for shard in data.corpora[""].shards)
    too_small = {"shuffle": "global", "cache_gb": copies.bytes / 1e9 / 2}
    _, found = doctor.find_data(options.overlay(run, too_small))
    assert found.level == "PROBLEM" and "use --shuffle rows" in f"{found.fact} {found.remedy}"
    _, found = doctor.find_data(options.overlay(run, {"data_root": "http://127.0.0.1:9/none"}))
    assert found.level == "PROBLEM"


def test_hellaswag(tmp_path: Path):
    run = presets.preset("gpt2-124m")
    assert doctor.find_hellaswag(run, tmp_path).level == "note"
    path = write_tasks(tmp_path / "hellaswag_val.jsonl")
    assert doctor.find_hellaswag(run, tmp_path) == Finding("ok", "HellaSwag", f"{path}: 6 tasks")
    path.write_text("{")
    assert doctor.find_hellaswag(run, tmp_path).level == "PROBLEM"
    off = options.overlay(run, {"hellaswag_interval": None})
    assert doctor.find_hellaswag(off, tmp_path).level == "ok"


def state_of(run: RunConfig) -> dict:
    progress = {"step": 7}
    return {"model": {}, "config": run.to_dict(), "data_fingerprint": "x", "progress": progress}


def test_where_the_run_begins_is_checked(tmp_path: Path, data_root: Path):
    run = small_config(data_root, tmp_path)
    folder = run.checkpoint.checkpoint_dir
    folder.mkdir()
    (found,) = doctor.find_checkpoints(run, None)
    assert found.fact == f"a new run: no checkpoint in {folder}"
    facts = metadata.TrainingMetadata(7, 0, 1, None, None, 1, "run", "0")
    path = store.save(folder, state_of(run), facts, keep_last=10)
    (found,) = doctor.find_checkpoints(run, None)
    assert "continue it with --resume latest" in found.fact
    resumed = options.overlay(run, {"resume": "latest"})
    with folder_lock.held(folder):
        running, found = doctor.find_checkpoints(resumed, None)
    assert (running.level, running.what) == ("note", "running")
    assert (found.level, found.fact) == ("ok", f"at step 7, with {path}, which is whole")
    (found,) = doctor.find_checkpoints(options.overlay(resumed, {"n_embd": 32}), None)
    assert "n_embd: 16 in the checkpoint, 32 now" in found.fact
    path.write_bytes(b"x")
    *warnings, found = doctor.find_checkpoints(resumed, None)
    assert levels(warnings) == ["note"]
    assert found.level == "PROBLEM"
    assert path.exists()  # looked at, not set aside


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_wrong_list_of_gpus_is_a_problem_on_a_cpu_too(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3-1")
    run_config = small_config(tmp_path, tmp_path, device=device)
    found = next(item for item in doctor.examine(run_config) if item.what == "GPU")
    assert found.level == "PROBLEM" and "'3-1' is not a GPU" in found.fact


def test_without_gpus_there_are_as_many_ranks_as_the_resumed_run_had(
    data_root: Path, tmp_path: Path
):
    run = small_config(data_root, tmp_path, device="cpu")
    folder = run.checkpoint.checkpoint_dir
    on_cpu = replace(written_runs.PLAN, device="cpu")
    written_runs.write_run(folder, 1, on_cpu)

    def batch(run_config: RunConfig, ranks: int | None = None) -> str:
        found = doctor.examine(run_config, ranks)
        return next(item.fact for item in found if item.what == "batch")

    assert batch(run).startswith("1 rank of 4 rows")  # a new run; python starts one rank
    resumed = options.overlay(run, {"resume": "latest"})
    assert batch(resumed).startswith("2 ranks of 2 rows")
    assert batch(resumed, 1).startswith("1 rank of 4 rows")
    named = options.overlay(resumed, {"experiment_name": "a"})
    assert batch(named).startswith("1 rank of 4 rows")
    elsewhere = options.overlay(run, {"resume": str(tmp_path / "other" / "step_000001.pt")})
    assert batch(elsewhere).startswith("1 rank of 4 rows")
    written_runs.write_run(folder, 1, replace(on_cpu, device="cuda"))
    assert batch(resumed).startswith("1 rank of 4 rows")


def test_without_an_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert machine.own_address() is None


def test_memory_within_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = machine.memory_bytes()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    assert machine.memory_bytes() == 150_000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes() > 150_000


@pytest.mark.parametrize(
    ("line", "group", "limit", "used"),
    [
        ("0::/user/run.scope", "user", "memory.max", "memory.current"),
        ("4:memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_memory_of_a_job(tmp_path: Path, monkeypatch, line: str, group: str, limit: str, used: str):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "groups")
    (tmp_path / "groups").write_text(f"3:cpu:/x\n{line}\n")
    (tmp_path / group).mkdir(parents=True)
    for name, text in {limit: "900000", used: "500000", "memory.stat": "inactive_file 0"}.items():
        (tmp_path / group / name).write_text(f"{text}\n")
    assert machine.memory_bytes() == 400_000


def test_initial_weights_that_cannot_be_loaded_are_a_problem(data_root: Path, tmp_path: Path):
    for source in ("hf:/nowhere", "/nowhere.pt"):
        run = small_config(data_root, tmp_path, init_from=source)
        assert [found.level for found in doctor.find_checkpoints(run, None)] == ["PROBLEM"]


def test_problems_are_red_on_a_terminal_and_counted():
    findings = [Finding("ok", "a", "b"), Finding("PROBLEM", "c", "[d]", "type e")]
    plain = Console(file=io.StringIO(), width=9)
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    assert doctor.print_findings(findings, plain) == 1
    expected = "ok       a             b\nPROBLEM  c             [d]; type e\n\n1 problem found\n"
    assert plain.file.getvalue() == expected
    doctor.print_findings(findings, screen)
    assert "\x1b[1;31m" in screen.file.getvalue()


def test_the_command_takes_the_options_of_the_run(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def call(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpt2", "doctor", *flags])
        return main.main()

    flags = ("--device", "cpu", "--nproc_per_node=2", "--use_tensorboard")
    assert call(*small_flags(data_root, tmp_path), *flags) == 0
    printed = capsys.readouterr().out
    assert "2 ranks of 2 rows per step, 2 at once, gradient accumulation 1" in printed
    assert f"can be written: {tmp_path}/checkpoints, {tmp_path}/logs, {tmp_path}/runs" in printed
    assert printed.endswith("No problem found\n")
    assert list(tmp_path.iterdir()) == []
    assert call(*small_flags(tmp_path / "none", tmp_path), *flags) == 1
    assert "PROBLEM  data" in capsys.readouterr().out
    assert call("--total_batch_size", "500000") == 2
    assert "nearest: 499712 or 500736" in capsys.readouterr().err
