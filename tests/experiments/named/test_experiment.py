"""Names and flags of experiments."""

from pathlib import Path

import pytest

from gpt2.experiments.named import experiment


def test_flags_of_all_come_before_its_own():
    (parsed,) = experiment.parse_all(["  a --x 'two  words'\n--y ''"], ["--seed", "1"])
    assert parsed == experiment.Experiment("a", ("--seed", "1", "--x", "two  words", "--y", ""))


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
    (parsed,) = experiment.parse_all([f"a {flags}"])
    assert parsed.folder({"CUDA_VISIBLE_DEVICES": "2,3"}) == Path(folder, "a_gpu_2")
