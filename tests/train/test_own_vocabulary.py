"""A run on a nanoGPT data set of characters: nothing takes its tokens for GPT-2's."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import foreign_shards
from gpt2.base.errors import CheckpointError, DataError
from gpt2.checkpoint import store
from gpt2.cli import evaluate, loading, main
from gpt2.cli.model_source import ModelSource
from gpt2.config import flops, options, presets
from gpt2.data import saved_tokenizer
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.vocabulary import Characters
from gpt2.distributed.world import World
from gpt2.experiments.compare import models
from gpt2.experiments.results import JobResult
from gpt2.experiments.training import training_job
from gpt2.inference.generate import IN_TRAINING
from gpt2.train import dataset, trainer
from support import small_config, write_tasks


def gpt2(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpt2", *map(str, arguments)])
    return main.main()


def test_what_needs_gpt2_tokens_is_off_and_samples_are_of_the_vocabulary(
    gpt2_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
):
    characters, out = tmp_path / "char", tmp_path / "out"
    splits = foreign_shards.nanogpt_characters(characters)
    size = len({*splits["train"], *splits["val"]})
    flags = {
        "hellaswag_interval": 2,
        "hellaswag_path": write_tasks(tmp_path / "tasks.jsonl"),
        "sample_interval": 2,
        "sample_prompt": splits["train"][:5],
        "max_steps": 4,
    }
    result = trainer.run(small_config(characters, out, **flags))
    assert (result.state, result.step, result.hellaswag) == ("finished", 4, None)
    assert result.val_loss is not None
    log = (out / "logs" / "log.txt").read_text()
    assert log.count("training continues without HellaSwag: the data's meta.pkl") == 1
    records = (out / "logs" / "metrics.jsonl").read_text().splitlines()
    samples = [item for item in map(json.loads, records) if item["kind"] == "samples"]
    assert [item["step"] for item in samples] == [2, 4]
    for text in samples[-1]["texts"]:
        assert text.startswith(splits["train"][:5])
        assert len(text) == 5 + IN_TRAINING.max_new_tokens
        assert set(text) <= {*splits["train"], *splits["val"]}
    newest = store.list_checkpoints(out / "checkpoints")[-1].path
    characters_of_run = sorted({*splits["train"], *splits["val"]})
    assert store.load(newest)["vocabulary"] == tuple(characters_of_run)

    source = ("--checkpoint_dir", out / "checkpoints")
    tokens = saved_tokenizer.described(Characters(tuple(characters_of_run)))
    assert tokens.startswith(f"meta.pkl ({size} tokens, ")
    refused = f"was trained on the tokens of {tokens}; expected a model of tokens that any text has"
    results = ("--output", tmp_path / "results.json")
    capsys.readouterr()
    for command, way_out in (
        (("export", tmp_path / "export", *source), ""),
        (("evaluate", *source, *results), "; use --tasks val"),
    ):
        assert gpt2(monkeypatch, *command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(f"{refused}, as GPT-2's{way_out}")
    other = ("--tasks", "val", "--data_root", gpt2_tokens)
    assert gpt2(monkeypatch, "evaluate", *source, *results, *other) == 2
    expected = (
        rf"{gpt2_tokens} has tokens of gpt2 .*, .* was trained on those of {re.escape(tokens)}; "
    )
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "export").exists()
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    loaded = loading.load_model(ModelSource(checkpoint_dir=out / "checkpoints"))
    for other_tokens in (GPT2_TOKENIZER, Characters(("a", "b"))):
        model = replace(loaded, recorded_tokenizer=other_tokens)
        with pytest.raises(DataError, match=f"^{characters} has tokens of {re.escape(tokens)}, "):
            evaluate.MEASURES["val"](evaluate.EvaluateCommand(), model, alone)
    earlier = replace(loaded, recorded_tokenizer=None)
    assert evaluate.MEASURES["val"](evaluate.EvaluateCommand(), earlier, alone)
    assert gpt2(monkeypatch, "evaluate", *source, *results, "--tasks", "val") == 0
    measured = json.loads((tmp_path / "results.json").read_text())["results"]["val"]["loss"]
    assert measured == pytest.approx(result.val_loss, abs=1e-4)
    capsys.readouterr()
    few = ("--max_new_tokens", "7", "--num_samples", "1")
    assert gpt2(monkeypatch, "generate", *source, *few, "--prompt", splits["train"][:5]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith(splits["train"][:5])
    assert len(text) == 5 + 7
    assert gpt2(monkeypatch, "generate", *source, *few, "--prompt", "") == 0
    assert len(capsys.readouterr().out) == 7 + 1
    assert gpt2(monkeypatch, "generate", *source, "--prompt", "\N{SNOWMAN}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: '\N{SNOWMAN}' is not in the vocabulary of {size} tokens"
    assert gpt2(monkeypatch, "data", "show", characters, "--tokens", "9") == 0
    assert splits["train"][:9] in capsys.readouterr().out

    (characters / "meta.pkl").unlink()
    resumed = small_config(characters, out, **flags | {"max_steps": 5, "resume": "latest"})
    with pytest.raises(
        CheckpointError, match=rf"tokenizer: {re.escape(tokens)} in the checkpoint, "
    ):
        trainer.run(resumed)


def test_a_prompt_that_is_not_in_the_vocabulary_is_one_warning(tmp_path: Path):
    foreign_shards.nanogpt_characters(tmp_path / "char")
    flags = {"hellaswag_interval": None, "sample_interval": 1, "max_steps": 1}
    trainer.run(small_config(tmp_path / "char", tmp_path, **flags, sample_prompt="\N{SNOWMAN}"))
    log = (tmp_path / "logs" / "log.txt").read_text()
    assert log.count("training continues without samples: '\N{SNOWMAN}' is not in the vocab") == 1
    assert "sampling failed" not in log


def test_a_model_needs_no_more_tokens_than_its_data(
    gpt2_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    splits = foreign_shards.nanogpt_characters(tmp_path / "char")
    size = len({*splits["train"], *splits["val"]})
    flags = {"sample_interval": 2, "sample_prompt": splits["train"][:5], "max_steps": 2}
    trainer.run(small_config(tmp_path / "char", tmp_path / "out", **flags, vocab_size=size))
    resumed = {**flags, "max_steps": 3, "resume": "latest"}
    trainer.run(small_config(tmp_path / "char", tmp_path / "out", **resumed))
    assert rows_of_newest(tmp_path / "out") == size
    source = ("--checkpoint_dir", tmp_path / "out" / "checkpoints")
    output = ("--output", tmp_path / "results.json")
    assert gpt2(monkeypatch, "evaluate", *source, *output, "--tasks", "val") == 0
    capsys.readouterr()
    assert gpt2(monkeypatch, "generate", *source, "--prompt", splits["train"][:5]) == 0
    assert capsys.readouterr().out.startswith(splits["train"][:5])

    small = tmp_path / "small"  # GPT-2's tokens, of which it has the smallest
    small.mkdir()
    for split in ("train", "val"):
        np.arange(200, dtype=np.uint16).tofile(small / f"{split}.bin")
    for data, needed in ((gpt2_tokens, 50257), (small, 50257), (tmp_path / "char", size)):
        expected = rf"token ids up to {needed - 1}, .* use --vocab_size {needed} or more"
        with pytest.raises(DataError, match=expected):
            trainer.run(small_config(data, tmp_path, vocab_size=size - 1))


def test_the_vocabulary_size_of_a_run_is_that_of_its_data(gpt2_tokens: Path, tmp_path: Path):
    foreign_shards.nanogpt_characters(tmp_path / "char")
    flags = {"hellaswag_interval": None, "max_steps": 1, "eval_interval": None}
    characters = small_config(tmp_path / "char", tmp_path / "out", **flags)
    trainer.run(characters)
    assert rows_of_newest(tmp_path / "out") == 128
    weights = str(store.list_checkpoints(tmp_path / "out" / "checkpoints")[-1].path)
    started = small_config(tmp_path / "char", tmp_path / "begun", **flags, init_from=weights)
    trainer.run(started)
    assert rows_of_newest(tmp_path / "begun") == 128

    larger = small_config(tmp_path / "char", tmp_path / "larger", **flags, vocab_size=200)
    trainer.run(larger)
    assert rows_of_newest(tmp_path / "larger") == 200
    of_gpt2_tokens = flops.parameter_count(characters.model)
    words, nothing = small_config(gpt2_tokens, tmp_path), small_config(tmp_path / "none", tmp_path)
    for run, rows in ((characters, 128), (larger, 200), (words, 50304), (nothing, 50304)):
        assert training_job.result_options(run)["vocab_size"] == rows
        assert dataset.with_vocab_size_if_known(run).model.embedding_rows == rows
        models_of_run = models.group(run, {"gpt2": {}}, tmp_path / "models", log_dir=tmp_path)
        item = JobResult("gpt2", "finished", {}, result={"train_loss": 1.0})
        (row,) = models_of_run.summarize({"gpt2": item}).content["summary"]
        assert row["parameters"] == of_gpt2_tokens - (50304 - rows) * run.model.n_embd


def rows_of_newest(out: Path) -> int:
    """The rows of the embedding in the newest checkpoint, whose configuration says the same."""
    state = store.load(store.list_checkpoints(out / "checkpoints")[-1].path)
    rows: int = state["model"]["token_embedding.weight"].size(0)
    assert state["config"]["model"]["vocab_size"] == rows
    return rows


def test_without_what_needs_gpt2_tokens_there_is_no_warning(tmp_path: Path, caplog):
    foreign_shards.nanogpt_characters(tmp_path / "char")
    flags = {"hellaswag_interval": None, "sample_interval": None, "max_steps": 1}
    trainer.run(small_config(tmp_path / "char", tmp_path / "out", **flags))
    assert "meta.pkl" not in caplog.text


def test_the_size_of_a_vocabulary_that_the_run_will_learn(tmp_path: Path):
    missing = str(tmp_path / "python_stdlib_4k")
    run = options.overlay(presets.PRESETS["demo-fast"], {"data_root": [missing]})
    assert dataset.with_vocab_size_if_known(run).model.embedding_rows == 4096
