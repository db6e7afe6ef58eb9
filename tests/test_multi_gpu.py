"""Four seeds on two slots, by the command that users type: GPUs if there are two, else shares of
the cores (or of one GPU).

`python tests/test_multi_gpu.py` shows a sweep of small trainings.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt2.cli import seeds
from gpt2.data import prepare
from gpt2.experiments import results
from support import ROOT, SMALL_CORPUS, run_command, small_flags

FLAGS = ("--num_seeds", "4", "--slots", "2", "--max_gpus", "2")


def training(folder: Path) -> list[str]:
    """The command that sweeps a small training, with all its files in `folder`."""
    prepare.prepare(SMALL_CORPUS, folder / "data", workers=1)
    script = str(ROOT / "src" / "main_multi_gpu.py")
    return [sys.executable, script, *FLAGS, *small_flags(folder / "data", folder, device="auto")]


def require_four_seeds_on_two_slots(folder: Path) -> list[str]:
    """The names of both slots; fails unless every seed has finished and both slots had jobs."""
    records = results.read_results(folder)
    assert sorted(item.values["seed"] for item in records) == [0, 1, 2, 3]
    assert {item.state for item in records} == {"finished"}
    used = sorted({item.slot for item in records})
    assert len(used) == 2
    return used


def test_four_seeds_on_two_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Seeds 0 and 1, then 2 and 3, wait for each other: they end only if two run at once."""
    flags = ("--target", "side_by_side:meets", "--checkpoint_dir", "sweep", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["main_multi_gpu.py", *FLAGS, *flags])
    monkeypatch.chdir(tmp_path)
    assert seeds.seeds_main() == 0
    assert "4 of 4 done" in capsys.readouterr().out
    assert require_four_seeds_on_two_slots(tmp_path / "sweep") == ["cpu0", "cpu1"]
    assert len(list((tmp_path / "logs").glob("worker_*.log"))) == 2


@pytest.mark.soak
def test_four_seeds_of_a_training(tmp_path: Path):
    said = run_command(training(tmp_path)).stdout
    require_four_seeds_on_two_slots(tmp_path / "checkpoints" / "seeds")
    assert re.search(r"val_loss over seeds.*\n.*\n.*seeds", said)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        code = subprocess.run(training(Path(name))).returncode
        if code == 0:
            used = require_four_seeds_on_two_slots(Path(name, "checkpoints", "seeds"))
            print(f"✓ 4 seeds trained on 2 slots: {', '.join(used)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
