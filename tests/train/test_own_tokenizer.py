"""A run on tokens that are not GPT-2's, and everything that follows from its checkpoint."""

import json
from pathlib import Path

import pytest

import own_tokens
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import store
from gpt2.cli import main
from gpt2.config.run import RunConfig
from gpt2.data import saved_tokenizer
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.inspection import doctor
from gpt2.train import trainer
from gpt2.train.state import RunResult
from support import small_config, write_tasks

PROMPT = "def calendar("


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The name is that of a corpus on which GPT-2's loss is known.
    return own_tokens.prepared(tmp_path_factory.mktemp("own") / "data", corpus="fineweb_edu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(data: Path, out: Path) -> RunConfig:
    return small_config(
        data,
        out,
        max_steps=4,
        hellaswag_interval=4,
        hellaswag_path=write_tasks(out / "tasks.jsonl"),
        sample_interval=4,
        sample_prompt=PROMPT,
    )


@pytest.fixture(scope="module")
def result(config: RunConfig) -> RunResult:
    return trainer.run(config)


@pytest.fixture
def newest(result: RunResult, out: Path) -> Path:
    return store.list_checkpoints(out / "checkpoints")[-1].path


def gpt2(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpt2", *map(str, arguments)])
    return main.main()


def test_everything_is_measured_in_its_tokens(result: RunResult, newest: Path, out: Path):
    assert (result.state, result.step) == ("finished", 4)
    assert result.val_loss is not None and result.hellaswag is not None
    state = store.load(newest)
    assert state["model"]["token_embedding.weight"].shape == (own_tokens.ROWS, 16)
    assert state["config"]["model"]["vocab_size"] == own_tokens.ROWS
    recorded = saved_tokenizer.of_checkpoint(state)
    assert recorded == own_tokens.trained() and recorded.name == own_tokens.NAME
    records = [json.loads(line) for line in (out / "logs/metrics.jsonl").read_text().splitlines()]
    (samples,) = [item for item in records if item["kind"] == "samples"]
    assert all(text.startswith(PROMPT) for text in samples["texts"])
    validations = [item for item in records if item["kind"] == "validation"]
    assert validations and all(item["bits_per_byte"] for item in validations)


def test_the_checkpoint_is_continued_generated_from_and_measured(
    result: RunResult,
    data: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
):
    source = ("--checkpoint_dir", out / "checkpoints")
    capsys.readouterr()
    assert gpt2(monkeypatch, "generate", *source, "--prompt", PROMPT, "--max_new_tokens", 9) == 0
    assert capsys.readouterr().out.startswith(PROMPT)
    tasks = ("--hellaswag_path", out / "tasks.jsonl")
    results = tmp_path / "results.json"
    assert gpt2(monkeypatch, "evaluate", *source, *tasks, "--output", results) == 0
    found = json.loads(results.read_text())["results"]
    assert found["val"]["loss"] == pytest.approx(result.val_loss, abs=1e-4)
    assert found["hellaswag"]["acc_norm"] == pytest.approx(result.hellaswag, abs=1e-4)
    shown = capsys.readouterr().out
    assert "0.2955" in shown, "GPT-2's share of right endings is by text"
    assert "3.2924" not in shown, "GPT-2's loss is per token"
    flags = ["--resume", "latest", "--out_dir", out, "--max_steps", 5, "--hellaswag_interval", None]
    assert gpt2(monkeypatch, "doctor", *flags) == 0
    assert f"tokens of {saved_tokenizer.described(own_tokens.trained())}" in capsys.readouterr().out
    assert gpt2(monkeypatch, "train", *flags) == 0
    assert "Step: 4" in capsys.readouterr().out


def test_other_tokens_are_refused_by_name(
    newest: Path, gpt2_tokens: Path, out: Path, tmp_path: Path, monkeypatch, capsys
):
    own, gpt2s = map(saved_tokenizer.described, (own_tokens.trained(), GPT2_TOKENIZER))
    resumed = small_config(gpt2_tokens, out, max_steps=9, resume="latest")
    with pytest.raises(CheckpointError) as refused:
        trainer.run(resumed)
    assert f"tokenizer: {own} in the checkpoint, {gpt2s} now" in str(refused.value)

    smaller = own_tokens.trained(400)
    data_of = {gpt2s: gpt2_tokens, saved_tokenizer.described(smaller): tmp_path / "smaller"}
    own_tokens.prepared(tmp_path / "smaller", smaller)
    for name, root in data_of.items():
        with pytest.raises(CheckpointError) as refused:
            trainer.run(small_config(root, tmp_path / "new", init_from=str(newest)))
        expected = f"{newest} are for the tokens of {own}, {root} has those of {name}"
        assert expected in str(refused.value)
        flags = ("--checkpoint_dir", out / "checkpoints", "--tasks", "val", "--data_root", root)
        output = ("--output", tmp_path / "results.json")
        assert gpt2(monkeypatch, "evaluate", *flags, *output) == 2
        error = capsys.readouterr().err
        assert f"{root} has tokens of {name}, {newest} was trained on those of {own}" in error


def test_the_export_is_used_in_the_place_of_the_checkpoint(
    newest: Path, data: Path, gpt2_tokens: Path, out: Path, tmp_path: Path, monkeypatch, capsys
):
    folder, source = tmp_path / "hf", ("--checkpoint_dir", out / "checkpoints", "--checkpoint", 4)
    assert gpt2(monkeypatch, "export", folder, *source) == 0
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == own_tokens.VOCAB_SIZE
    prompt = ("--prompt", PROMPT, "--temperature", 0, "--num_samples", 1, "--max_new_tokens", 12)
    texts = []
    for flags in (source, ("--checkpoint", f"hf:{folder}")):
        capsys.readouterr()
        assert gpt2(monkeypatch, "generate", *flags, *prompt) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]

    begun = small_config(data, tmp_path / "begun", init_from=f"hf:{folder}", max_steps=1)
    assert trainer.run(begun).state == "finished"
    state = store.load(store.list_checkpoints(tmp_path / "begun" / "checkpoints")[-1].path)
    assert state["config"]["model"]["vocab_size"] == own_tokens.ROWS
    refused = small_config(gpt2_tokens, tmp_path / "refused", init_from=f"hf:{folder}")
    with pytest.raises(CheckpointError, match="has those of gpt2"):
        trainer.run(refused)
    (finding,) = doctor.find_checkpoints(refused, None)
    assert finding.level == "ok", "without data nothing is compared"
    finding = list(doctor.find_checkpoints(refused, doctor.find_data(refused)[0]))[-1]
    assert finding.level == "PROBLEM" and "has those of gpt2" in finding.fact
    assert gpt2(monkeypatch, "export", tmp_path / "nano", "--format", "nanogpt", *source) == 2
    assert "use --format hf" in capsys.readouterr().err
