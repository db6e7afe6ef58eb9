"""What a run and its resume leave in `metrics.jsonl`, read back."""

import json
from pathlib import Path

import pytest

from gpt2.config.lr_schedule import lr_at
from gpt2.metrics import log_reader
from gpt2.train import trainer
from support import losses, small_config


def test_a_resumed_run_reads_back_as_one_in_full_precision(data_root: Path, tmp_path: Path):
    options = {"checkpoint_interval": 3, "eval_interval": 3, "eval_batches": 1}
    config = small_config(data_root, tmp_path, **options, max_steps=8)
    trainer.run(config)
    trainer.run(small_config(data_root, tmp_path, **options, max_steps=8, resume="6"))

    text, records = tmp_path / "logs/log.txt", tmp_path / "logs/metrics.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert [line["step"] for line in lines if line["kind"] == "run"] == [0, 6]
    assert (kinds.count("step"), kinds.count("validation")) == (8 + 2, 4 + 1)
    messages = [line["message"] for line in lines if line["kind"] == "event"]
    assert all(message in text.read_text() for message in messages)
    assert "Resuming from:" in messages

    (run,) = log_reader.read_runs(text)
    schedule = config.lr_schedule(8)
    rates = {step: item.learning_rate for step, item in run.steps.items()}
    assert rates == {step: lr_at(step - 1, schedule) for step in range(1, 9)}
    written = {step: item.loss for step, item in run.steps.items()}
    assert written == pytest.approx(losses(text), abs=1e-6)
    assert written != losses(text)  # which has six digits
    assert list(run.val_losses) == list(run.bits_per_byte) == [0, 3, 6, 8]
    ratios = [bits / run.val_losses[step] for step, bits in run.bits_per_byte.items()]
    assert ratios == pytest.approx([ratios[0]] * 4), "of the same rows"
