"""What a search leaves for people: the best trial, its command, tables and files."""

import csv
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial
from rich.console import Console

from experiments.search.played import RUN, Played
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.experiments.pool.job import Job
from gpt2.experiments.search import best, run, space, trial, trial_report


def trained(folder: Path, job: Job, **parameters: Any) -> None:
    """The files of a trial that has ended."""
    mine = folder / job.name
    mine.mkdir()
    (mine / trial.WEIGHTS).write_text(job.name)
    about = {"trial": int(job.name[-3:]), "parameters": parameters, **RUN.to_dict()}
    (mine / trial.CONFIG).write_text(json.dumps(about))


def flags(config: RunConfig, *searched: str) -> list[str]:
    return shlex.split(best.command_of(config, Path("out dir"), searched))


def test_the_command_of_the_best_trial():
    short = {"max_steps": 7, "decay_steps": 7, "init_from": "hf:gpt2", "cache_dir": "x"}
    run = options.overlay(presets.preset("demo"), short)
    assert flags(run)[4:] == ["--out_dir", "out dir", "--init_from", "hf:gpt2"]
    searched = flags(run, "max_steps", "decay_steps")
    assert searched[6:10] == ["--max_steps", "7", "--decay_steps", "7"]


def test_best_overall_has_the_best_trial_or_nothing(tmp_path: Path):
    address = f"sqlite:///{tmp_path}/shared.db"
    one = Played(tmp_path / "one", storage=address)
    first = one.next()
    trained(tmp_path / "one", first)
    one.finishes(first, 5.0)
    overall = tmp_path / "one" / best.FOLDER
    assert (overall / trial.WEIGHTS).read_text() == "trial_000"
    (overall / "training").mkdir()
    one.heartbeat.end()
    two = Played(tmp_path / "two", storage=address)
    second = two.next()
    trained(tmp_path / "two", second)
    two.finishes(second, 4.0)
    assert best.export(one.study.get_trials(), tmp_path / "one") is None
    assert [path.name for path in overall.iterdir()] == ["training"], "begun by hand: it stays"
    said = summary_of(one)
    top = csv.DictReader((tmp_path / "one/summary/top5_trials.csv").read_text().splitlines())
    theirs, ours = (row["folder"] for row in top)
    assert ours == str(tmp_path / "one/trial_000")
    assert theirs.endswith(":" + str(tmp_path / "two/trial_001"))
    assert f"{tmp_path}/two/trial_001, without files in {tmp_path}/one" in said
    assert "training in full" not in said


def test_an_exported_trial_outlives_its_folder(tmp_path: Path):
    played = Played(tmp_path / "search")
    job = played.next()
    trained(tmp_path / "search", job)
    played.finishes(job, 5.0)
    shutil.rmtree(tmp_path / "search" / job.name)
    command = best.export(played.study.get_trials(), tmp_path / "search")
    assert command and command.startswith("gpt2 train --preset demo")
    trained(tmp_path / "search", job, beta2=0.5)
    best.export(played.study.get_trials(), tmp_path / "search")
    exported = json.loads((tmp_path / "search" / best.FOLDER / trial.CONFIG).read_text())
    assert exported["parameters"] == {"beta2": 0.5}, "a trial of that number in another search"
    shutil.rmtree(tmp_path / "search" / job.name)
    shutil.rmtree(tmp_path / "search" / best.FOLDER)
    assert "trial_000, without files in " in summary_of(played)


def test_a_best_trial_that_cannot_be_exported_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    played = Played(tmp_path / "search")
    job = played.next()
    trained(tmp_path / "search", job)
    (tmp_path / "search" / best.FOLDER).write_text("in the way")
    played.finishes(job, 5.0)
    assert played.states == ["COMPLETE"]
    summary_of(played)
    assert caplog.messages[-1].startswith("the summary could not be written completely: ")


def summary_of(played: Played, width: int = 300) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    run.summarize(played.search, played.study, played.source, 0, out)
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_no_summary_without_results(tmp_path: Path):
    played = Played(tmp_path / "search")
    job = played.next()
    assert "Summary" not in summary_of(played)
    assert not (tmp_path / "search" / trial_report.FOLDER).exists()
    played.validates(job, 9.0)
    assert trial_report.COMPARISON in summary_of(played), "it has a curve"


def test_exit_code_1_is_explained(tmp_path: Path):
    played = Played(tmp_path / "search", n_trials=2)
    played.finishes(played.next(), 5.0)
    assert "Ended: 1 trial left; run the same command to continue" in summary_of(played)


def trials_of_the_default_space() -> list[FrozenTrial]:
    searched = space.default(RUN)
    values: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta2": 0.95}
    values |= {name: found[0] for name, kind in searched.items() if (found := space.values(kind))}
    study = optuna.create_study()
    for place in range(6):
        study.add_trial(
            optuna.trial.create_trial(
                value=5.0803 + place,
                params=values,
                distributions=dict(searched),
                user_attrs={"result": {"train_s": 60.0}},
            )
        )
    return study.trials


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_table_never_cuts_job_and_loss(width: int):
    out = Console(file=io.StringIO(), width=width)
    out.print(trial_report.best_trials_table(trials_of_the_default_space(), out))
    said = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in said.splitlines()) and "…" not in said
    assert "trial_000" in said and "5.0803" in said and "1m 00s" in said
    assert "weight_decay" in said and ("n_layer=2" in said) == (width < 200)


def test_trials_without_values_are_shown_too(tmp_path: Path):
    """The user may enqueue trials, and tell the study their values."""
    played = Played(tmp_path / "search")
    played.study.tell(played.study.ask().number, 1.0)
    played.finishes(played.next(), 5.0)
    written = trial_report.write(played.study, tmp_path / "search", None)
    assert len(written) == 5
    top = list(csv.DictReader(written[0].read_text().splitlines()))
    assert [bool(row["learning_rate"]) for row in top] == [False, True]


def test_the_time_of_a_trial_is_the_sum_of_its_steps(tmp_path: Path):
    played = Played(tmp_path / "search")
    job = played.next()
    played.validates(job, 5.0)
    played.tell(job, "finished", result={"train_s": 77.0})
    assert trial_report.train_s(played.study.get_trials()[0]) == 77.0


def test_the_dashboard_command_is_quoted(tmp_path: Path):
    played = Played(tmp_path / "a $b {x}")
    line = summary_of(played, width=40).splitlines()
    command = next(item for item in line if "optuna-dashboard" in item).split(": ", 1)[1]
    assert shlex.split(command)[0] == "optuna-dashboard"
    assert len(shlex.split(command)) == 2
