import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.checkpoint import store
from gpt2.cli import main
from gpt2.cli.evaluate import EvaluateCommand
from gpt2.evaluation import hellaswag
from gpt2.train import trainer
from support import run_command, small_config, write_tasks


@pytest.fixture(scope="module")
def trained(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    tasks = write_tasks(out / "tasks.jsonl")
    flags = {"hellaswag_interval": 10, "hellaswag_path": tasks}
    trainer.run(small_config(data_root, out, **flags))
    return out


def evaluate(trained: Path, monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> int:
    common = ["--checkpoint_dir", str(trained / "checkpoints"), "--output", str(out)]
    command = ["gpt2", "evaluate", *common, "--hellaswag_path", str(trained / "tasks.jsonl")]
    monkeypatch.setattr("sys.argv", [*command, *flags])
    return main.main()


def results(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text())["results"]


def test_it_finds_what_training_found(trained: Path, tmp_path: Path, monkeypatch, capsys):
    assert evaluate(trained, monkeypatch, tmp_path / "results.json") == 0
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 20
    found = results(tmp_path / "results.json")
    log = (trained / "logs/log.txt").read_text()
    assert found["hellaswag"]["of"] == "6 tasks"
    norm, acc = re.findall(r"step 20 .*hellaswag: (\S+) acc_norm \| (\S+) acc", log)[0]
    assert found["hellaswag"]["acc_norm"] == pytest.approx(float(norm), abs=1e-4)
    assert found["hellaswag"]["acc"] == pytest.approx(float(acc), abs=1e-4)
    loss = float(re.findall(r"step 20 .*val loss: (\S+)", log)[0])
    assert found["val"]["loss"] == pytest.approx(loss, abs=1e-5)
    bits_per_byte = float(re.findall(r"step 20 .*bits per byte: (\S+)", log)[0])
    assert found["val"]["bits_per_byte"] == pytest.approx(bits_per_byte, abs=1e-5)
    assert 0 < found["val"]["loss_stderr"] < 1
    shown = capsys.readouterr().out
    row = r"hellaswag \(completion\) +acc_norm +0\.\d{4} +0\.\d{4} +6 tasks +0\.2955"
    assert re.search(row, shown)
    assert f"{loss:.4f}" in shown
    assert re.search(rf"val .* bits_per_byte +{bits_per_byte:.4f} +0\.\d{{4}} ", shown)


def test_style_limit_and_task(trained: Path, tmp_path: Path, monkeypatch, capsys):
    flags = ("--tasks", "hellaswag", "--style", "harness", "--limit", "3", "--batch_tokens", "1")
    assert evaluate(trained, monkeypatch, tmp_path / "results.json", *flags) == 0
    found = results(tmp_path / "results.json")
    assert list(found) == ["hellaswag"]
    assert (found["hellaswag"]["style"], found["hellaswag"]["of"]) == ("harness", "3 tasks")
    assert "0.3114" in capsys.readouterr().out


def test_models_of_other_tools(trained: Path, data_root: Path, tmp_path: Path, monkeypatch, capsys):
    checkpoints = str(trained / "checkpoints")
    export = ["gpt2", "export", str(tmp_path / "hf"), "--checkpoint_dir", checkpoints]
    monkeypatch.setattr("sys.argv", export)
    assert main.main() == 0
    assert evaluate(trained, monkeypatch, tmp_path / "ours.json", "--tasks", "hellaswag") == 0
    model = ("--checkpoint", f"hf:{tmp_path / 'hf'}")
    theirs = tmp_path / "theirs.json"
    assert evaluate(trained, monkeypatch, theirs, "--tasks", "hellaswag", *model) == 0
    assert results(tmp_path / "ours.json") == results(theirs)
    monkeypatch.setattr(hellaswag, "evaluate", None)  # what cannot be done is known before that
    assert evaluate(trained, monkeypatch, theirs, *model) == 2
    assert "name shards with --data_root" in capsys.readouterr().err
    remote = ("--tasks", "val", "--limit", "3", "--data_root", f"file://{data_root}")
    assert evaluate(trained, monkeypatch, theirs, *model, *remote) == 0
    assert results(theirs)["val"]["of"] == "3 rows"


@pytest.mark.soak
def test_several_ranks(trained: Path, tmp_path: Path, monkeypatch):
    batches = ("--batch_tokens", "60")  # of two tasks each
    assert evaluate(trained, monkeypatch, tmp_path / "one.json", *batches) == 0
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module", "gpt2"]
    flags = [flag.replace("one.json", "two.json") for flag in sys.argv[1:]]
    run_command([sys.executable, "-m", *launcher, "evaluate", *flags])
    one, two = (results(tmp_path / name) for name in ("one.json", "two.json"))
    assert one["hellaswag"] == two["hellaswag"]
    for name in ("loss", "bits_per_byte", "bits_per_byte_stderr"):
        assert one["val"][name] == pytest.approx(two["val"][name])


def test_figures(trained: Path, data_root: Path, tmp_path: Path, monkeypatch):
    """Of two rows, with standard errors; and of one row, which has none."""
    found = []
    for limit in ("2", "1"):
        flags = ("--tasks", "val", "--limit", limit)
        assert evaluate(trained, monkeypatch, tmp_path / "results.json", *flags) == 0
        found.append(results(tmp_path / "results.json")["val"])
    two, one = found
    assert one["loss_stderr"] is None
    other = 2 * two["loss"] - one["loss"]  # both begin with the same row
    assert two["loss_stderr"] == pytest.approx(abs(one["loss"] - other) / 2, rel=1e-4)
    assert two["perplexity"] == pytest.approx(math.exp(two["loss"]))
    assert one["bits_per_byte_stderr"] is None
    of_one, of_two = (  # the rows have 8 tokens
        rows * 8 * of["loss"] / math.log(2) / of["bits_per_byte"]
        for rows, of in ((1, one), (2, two))
    )
    assert (of_one, of_two) == (pytest.approx(round(of_one)), pytest.approx(round(of_two)))
    off_the_ratio = of_one * abs(one["bits_per_byte"] - two["bits_per_byte"])
    assert two["bits_per_byte_stderr"] == pytest.approx(off_the_ratio / (of_two / 2), rel=1e-4)


def test_bfloat16(trained: Path, tmp_path: Path, monkeypatch):
    losses = []
    for dtype in ("float32", "bfloat16"):
        flags = ("--tasks", "val", "--limit", "2", "--dtype", dtype)
        assert evaluate(trained, monkeypatch, tmp_path / "results.json", *flags) == 0
        losses.append(results(tmp_path / "results.json")["val"]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_a_model_that_diverged(trained: Path, tmp_path: Path, monkeypatch, capsys):
    folder = Path(shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints", symlinks=True))
    newest = store.list_checkpoints(folder)[-1]
    state = store.load(newest.path)
    state["model"]["final_norm.bias"] = torch.full_like(state["model"]["final_norm.bias"], math.nan)
    store.save(folder, state, newest.training, keep_last=2)
    assert evaluate(tmp_path, monkeypatch, tmp_path / "results.json") == 2
    assert "has NaN or infinite weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": "hellaswg"}, "task 'hellaswg' is unknown; did you mean hellaswag"),
        ({"limit": 0}, "limit=0 is too small"),
        ({"batch_tokens": 0}, "batch_tokens=0 is too small"),
    ],
)
def test_wrong_flags(flags: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        EvaluateCommand(**flags)


def test_results_that_cannot_be_written(trained: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "results.json"
    assert evaluate(trained, monkeypatch, out, "--tasks", "hellaswag") == 2
    assert "choose another file with --output" in capsys.readouterr().err
