"""Names, flags and slots of named experiments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.experiments.named import experiments


def test_flags_of_all_come_before_its_own():
    (parsed,) = experiments.parse_all(["  a --x 'two  words'\n--y ''"], ["--seed", "1"])
    assert parsed == experiments.Experiment("a", ("--seed", "1", "--x", "two  words", "--y", ""))


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("", "logs"),
        ("--out_dir out", "out/logs"),
        ("--out-dir=out --log-dir kept", "kept"),
        ("--log_dir first --log_dir=second", "second"),
        ("--seed 1 --log_dir", "logs"),  # its training refuses that
    ],
)
def test_folder_of_its_logs(flags: str, folder: str):
    (parsed,) = experiments.parse_all([f"a {flags}"])
    assert parsed.folder({"CUDA_VISIBLE_DEVICES": "2,3"}) == Path(folder, "a_gpu_2")


@pytest.mark.parametrize("hidden", ["-1", "", "none", "NoDevFiles"])
def test_shares_of_the_cores_see_no_gpu(monkeypatch: pytest.MonkeyPatch, hidden: str):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = experiments.slots_of()
    assert [slot.name for slot in shares] == ["cpu0", "cpu1"]
    assert shares[0].environment == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    assert [slot.name for slot in experiments.slots_of(max_gpus=1)] == ["cpu0"]


def test_each_gpu_is_a_slot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-89/1/0, 3,-1,4")
    named = experiments.slots_of()
    visible = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in named]
    assert visible == ["MIG-GPU-89/1/0", "3"] and named[1].name == "gpu3"
    assert [slot.name for slot in experiments.slots_of(["5", "7", "8"], max_gpus=2)] == [
        "gpu5",
        "gpu7",
    ]


def test_a_failure_is_told_by_the_last_line_or_the_head_of_the_last_frame(tmp_path: Path):
    log = tmp_path / "console.log"
    wrong = {"--learning_rat 3 --se 1": "Unrecognized options: ", "--seed x": "Error parsing "}
    for flags, begins in wrong.items():
        with log.open("w") as output:
            command = [sys.executable, "-m", "gpt2", "train", *flags.split()]
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
        assert done.returncode == 2
        told = experiments.printed_last(log)
        assert told.startswith(begins + flags.split()[0])
        assert not set(told) & set("─│╰\n") and "help" not in told
    log.write_text("a\n╭─ b ─╮\n│ c   │\n╰─────╯\nd")
    assert experiments.printed_last(log) == "its last line: d"
    log.write_text("")
    assert experiments.printed_last(log) == "its last line: "
