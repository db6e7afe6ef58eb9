import csv
import io

import numpy as np
import pytest
from rich.console import Console

from gpt2.experiments.compare import models
from gpt2.experiments.results import JobResult
from gpt2.metrics.log_reader import LoggedRun, LoggedStep

RESULT = {"train_loss": 3.5, "val_loss": 3.6, "tokens_per_s": 1234.5, "train_s": 190.0, "step": 9}

LOSSES = (("a", 2.0), ("b", 1.0))


def logged(first: int = 0, steps: int = 40, validated: bool = True) -> LoggedRun:
    run = LoggedRun("run", first)
    for step in range(first + 1, first + steps + 1):
        run.steps[step] = LoggedStep(step, 9.0 / step, 1e-3, 0.5, 500.0)
        if validated and step % 10 == 0:
            run.val_losses[step] = 9.0 / step
    return run


def ended(name: str, result: dict[str, float] | None) -> JobResult:
    return JobResult(name, "finished" if result else "failed", {}, result)


def shown(rows: list[models.Row]) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(models.models_table(rows))
    return console.file.getvalue().splitlines()


def test_the_table_marks_the_best_and_shows_what_failed():
    rows = [
        models.row(ended("gpt2", RESULT), 124_439_808),
        models.row(ended("modern", RESULT | {"val_loss": 3.4, "train_loss": 3.9}), 124e6),
        models.row(ended("mlp", None), 60e6),
    ]
    _, _, _, _, gpt2, modern, mlp, *_ = shown(rows)
    assert gpt2.split() == ["gpt2", "124.4", "M", "3.5000", "3.6000", "1,234", "-", "3m", "10s"]
    assert "3.9000   3.4000 *" in modern
    assert mlp.split() == ["mlp", "60.0", "M", "-", "-", "-", "-", "failed"]


def test_without_validation_the_training_loss_decides():
    rows = [models.row(ended(name, {"train_loss": loss}), 1) for name, loss in LOSSES]
    assert "1.0000 *" in shown(rows)[5] and "*" not in shown(rows)[4] + shown(rows[:1])[4]


def test_the_file_has_all_digits():
    (row,) = csv.DictReader(models.as_csv([models.row(ended("gpt2", RESULT), 5)]).splitlines())
    assert row["tokens_per_s"] == "1234.5" and row["hellaswag"] == "" and "step" not in row


def test_time_is_that_of_the_steps():
    run = logged(steps=4)
    assert list(60 * models.minutes_at(run, np.array([0.0, 1, 4]))) == [0, 0.5, 2]
    late = logged(first=100, steps=4)  # the log before it is lost
    assert list(60 * models.minutes_at(late, np.array([100.0, 102]))) == [0, 1]


@pytest.mark.parametrize("validated", [True, False])
def test_panels_have_every_model_against_tokens_and_time(validated: bool):
    runs = [logged(steps=steps, validated=validated) for steps in (40, 10)]
    panels = models.draw(runs, lambda step: 1_000_000 * step).axes
    assert len(panels) == (4 if validated else 2)
    tokens, time = panels[-2:]
    assert tokens.get_xlabel() == "million tokens" and time.get_xlabel() == "minutes"
    for panel, ends in ((tokens, {40.0, 10.0}), (time, {20.0 / 60, 5.0 / 60})):
        assert ends <= {float(max(line.get_xdata())) for line in panel.lines}
