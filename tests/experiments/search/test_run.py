import contextlib
import csv
import io
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console

from experiments import small_search
from experiments.search.played import RUN, SLOT, Played, trial_of
from gpt2 import model
from gpt2.base.errors import ConfigError
from gpt2.cli import main, train
from gpt2.config import options, presets
from gpt2.config.model import ModelConfig
from gpt2.experiments import results
from gpt2.experiments.pool.job import Event, Slot
from gpt2.experiments.search import (
    run,
    space,
    study,
    trial,
    trial_report,
    trial_source,
)
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.study import Heartbeat
from support import ROOT, loss_lines, small_flags


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path / "search", startup_trials=2, patience=3)


def test_patience_finishes_a_trial_with_its_best_value(played: Played):
    job = played.next()
    played.tell(job, "reported", metrics={"step": 0, "val_loss": 1.0})
    answers = played.validates(job, 9.0, 8.0, 8.5, 8.0, 8.1)
    assert answers == ["go", "go", "go", "go", "prune"], "step 0 does not count: nothing is learnt"
    assert played.tell(job, "reported", metrics={"step": 51, "loss": 3.0}) == "prune"
    event = Event("pruned", SLOT, job, result={"tokens": 5})
    played.source.event(event)
    assert played.source.as_in_study(event).kind == "finished"
    ended = trial_of(played.study, job)
    assert (ended.state, ended.value) == (TrialState.COMPLETE, 8.0)
    record = played.store.results["trial_000"]
    assert record.state == "finished" and record.result == {"val_loss": 8.0, "tokens": 5}


def test_worse_than_the_median_is_pruned_but_not_at_the_end(played: Played):
    for best in (5.0, 6.0):
        played.finishes(played.next(), 9.0, best)
    job = played.next()
    assert played.validates(job, 9.5) == ["prune"]
    played.tell(job, "pruned", result={})
    last = played.next()
    metrics = {"step": 500, "val_loss": 9.9, "total_steps": 500}
    assert played.tell(last, "reported", metrics=metrics) == "go"
    played.tell(last, "finished", result={})
    assert played.states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert played.source.next() is None


def test_a_trial_that_diverges_counts_as_pruned(played: Played):
    """COMPLETE needs a finite value, and the sampler does not learn from FAILED trials."""
    first, second = played.next(), played.next()
    assert played.validates(first, 9.0, None) == ["go", "prune"]  # null is what JSON makes of NaN
    played.tell(first, "pruned", result={})
    played.tell(second, "finished", result={"diverged": "5 updates in a row"})
    assert played.states == ["PRUNED", "PRUNED"]
    assert played.store.results["trial_001"].reason == "5 updates in a row"


def test_failed_trials_are_replaced_up_to_a_limit_in_a_row(played: Played):
    played.tell(played.next(), "failed", reason="out of disk space")
    played.finishes(played.next(), 5.0)
    for _ in range(trial_source.MAX_FAILURES):
        assert not played.source.has_given_up
        played.tell(played.next(), "failed", reason="no memory")
    assert played.source.has_given_up and played.source.next() is None
    assert played.source.done == 1


def test_interrupted_trials_continue(played: Played, tmp_path: Path):
    done, running = played.next(), played.next()
    played.finishes(done, 5.0)
    played.validates(running, 9.0, 8.0)
    asked = played.study.ask()  # killed before it had any values
    played.study.tell(played.study.ask().number, 3.0)  # killed before the results store had it
    drawn = trial_of(played.study, running).params
    del played.store.results["trial_000"]

    again = Played(tmp_path / "search", n_trials=5, patience=3)
    again.source.catch_up()
    assert sorted(again.store.results) == ["trial_000", "trial_003"]
    jobs = [again.next(), again.next()]
    assert [job.name for job in jobs] == [running.name, f"trial_{asked.number:03d}"]
    assert jobs[0].kwargs["run"]["optim"]["learning_rate"] == drawn["learning_rate"]
    assert jobs[0].kwargs["run"] == running.kwargs["run"], "the same training in the same folder"
    assert trial_of(again.study, jobs[1]).params["learning_rate"] > 0
    report = {"step": 20, "val_loss": 7.0, "total_steps": 500}
    assert again.tell(jobs[0], "reported", metrics=report) == "go"
    assert trial_of(again.study, running).intermediate_values == {10: 9.0, 20: 8.0}, "known"
    assert again.validates(jobs[0], 8.5, 8.5, 8.5) == ["go", "go", "prune"], "patience is kept"
    third = again.next()
    assert third.name == "trial_004" and again.source.next() is None
    values = {item.params["learning_rate"] for item in again.study.get_trials() if item.params}
    assert len(values) == 4, "the sampler does not repeat itself"

    # Killed when the answer was given: it is given again, at the first report.
    resumed = Played(tmp_path / "search", n_trials=5, patience=3)
    job = resumed.next()
    assert resumed.tell(job, "reported", metrics={"step": 51, "loss": 3.0}) == "prune"
    fewer = Played(tmp_path / "search", n_trials=2)
    assert fewer.source.next() is None, "fewer are requested now than had started"


def test_a_search_that_is_stopped_with_nothing_finished_has_no_table(
    played: Played, monkeypatch: pytest.MonkeyPatch
):
    """Neither before the first validation nor after it."""
    monkeypatch.setattr(trial_report, "write", lambda *_: [])
    for losses in ((), (9.0,)):
        played.validates(played.next(), *losses)
        printed = Console(file=io.StringIO())
        search, source = played.search, played.source
        assert run.summarize(search, played.study, source, signal.SIGINT, printed) == 130
        said = printed.file.getvalue()
        assert "The best of" not in said and "val loss" not in said
        assert "Stopped: 4 trials left; run the same command to continue" in said


def test_another_space_is_refused(played: Played, tmp_path: Path):
    other = space.parse("[n_layer]\nchoices = [2, 3]", RUN, "space")
    with pytest.raises(ConfigError, match="n_layer: 4 before, 2, 3 now"):
        study.open_study(Search(RUN, other, folder=tmp_path / "search"))


@pytest.fixture(scope="module")
def space_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.toml"
    path.write_text(
        "[learning_rate]\nlow = 1e-3\nhigh = 1e-1\nlog = true\n"
        "[n_head]\nchoices = [1, 2, 4]\n[n_embd]\nchoices = [8, 10]\n[bias]\nchoices = [true]\n"
    )
    return path


def flags_of(data_root: Path, out: Path, space_file: Path, count: int) -> list[str]:
    small = {"max_steps": 4, "eval_interval": 2, "warmup_steps": 1, "mini_batch_size": 8}
    own = ["--space", str(space_file), "--n_trials", str(count), "--no_prune", "--slots", "1"]
    return [*small_flags(data_root, out, **small), *own]


def command(flags: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "src" / "parallel_search.py"), *flags]


def kill_within_its_first_trial(flags: list[str], folder: Path) -> None:
    """Starts a search, and kills it once its first trial has saved a checkpoint."""
    with subprocess.Popen(command(flags), stdout=subprocess.DEVNULL) as running:
        while not (folder / "trial_000" / "step_000002.json").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_search_of_small_trainings(data_root: Path, tmp_path: Path, space_file: Path, killed: bool):
    folder = tmp_path / "checkpoints" / "search"
    if killed:
        kill_within_its_first_trial(flags_of(data_root, tmp_path, space_file, 1), folder)
    code, said = call(flags_of(data_root, tmp_path, space_file, 2))
    assert code == 0, said
    assert list((folder / "logs").glob("worker_cpu0_*.log"))
    assert [
        (item.number, item.state.name) for item in small_search.study_in(folder).get_trials()
    ] == [
        (0, "COMPLETE"),
        (1, "COMPLETE"),
    ]
    assert not study.last_beat(small_search.study_in(folder))
    log = (folder / "trial_000" / "log.txt").read_text()
    assert ("  - Step: 2\n" in log or "  - Step: 4\n" in log) == killed, "it went on where it was"
    assert len(loss_lines(folder / "trial_000" / "log.txt")) == 4 + 3
    require_files(folder, said)

    for arguments, expected, words in (
        ([], 0, "  - done already: 2\n"),
        (["--n_layer", "3"], 2, "n_layer: 2 before, 3 now"),
        (
            ["--space", str(changed(space_file))],
            2,
            "0.001 to 0.1, log before, 0.001 to 1, log now",
        ),
        (["--eval_interval", "None"], 2, "a search compares validation losses"),
        (["--space", "nowhere.toml"], 2, "--print_space > nowhere.toml makes one"),
    ):
        code, said = call([*flags_of(data_root, tmp_path, space_file, 2), *arguments])
        assert code == expected and words in said and "begins" not in said


def test_a_second_owner_ends_with_exit_code_2(data_root: Path, tmp_path: Path, space_file: Path):
    address = f"sqlite:///{tmp_path}/shared.db"
    shared = optuna.create_study(storage=address, study_name="search")
    Heartbeat(shared, tmp_path / "first")
    flags = [*flags_of(data_root, tmp_path, space_file, 1), "--storage", address]
    code, said = call(flags)
    assert code == 2 and "another search runs the study search: process " in said
    assert "begins" not in said and study.last_beat(shared)


def changed(space_file: Path) -> Path:
    other = space_file.with_name("other.toml")
    other.write_text(space_file.read_text().replace("1e-1", "1"))
    return other


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code and the output of `gpt2 search`."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2", "search", *arguments])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main.main(), said.getvalue()


@pytest.mark.parametrize(
    ("trials", "gpus", "ranks", "text"),
    [
        (24, ["0", "1"], 1, "12 trials per GPU"),
        (10, ["0", "1", "2"], 1, "3 or 4 trials per GPU"),
        (8, ["0", "0", "1", "1"], 1, "4 trials per GPU"),
        (1, ["5"], 1, "1 trial per GPU"),
        (6, ["0,1", "2,3"], 2, "3 trials per 2 GPUs"),
        (6, [None, None], 2, "3 trials per slot"),
        (6, ["", ""], 1, "3 trials per slot"),
    ],
)
def test_the_banner_has_the_trials_of_each_gpu(
    trials: int, gpus: list[str | None], ranks: int, text: str
):
    slots = [
        Slot(index, f"slot{index}", {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        for index, gpu in enumerate(gpus)
    ]
    assert run.per_gpu(trials, slots, ranks) == text


def require_files(folder: Path, said: str) -> None:
    """Checks the files that a search documents."""
    best = min(small_search.study_in(folder).get_trials(), key=lambda item: item.value)
    mine = folder / trial.name_of(best.number)
    assert sorted(path.name for path in folder.glob("*/*.pth*")) == ["best_model.pth"] * 3
    assert not list(folder.glob("trial_*/step_*")), "checkpoints of finished trials are dropped"
    about = json.loads((mine / "config.json").read_text())
    assert about["trial"] == best.number
    assert about["model"]["n_embd"] % about["model"]["n_head"] == 0
    rows = list(csv.DictReader((mine / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    losses = [float(row["val_loss"]) for row in rows[1:] if row["val_loss"]]
    assert min(losses) == pytest.approx(best.value, abs=1e-5)

    overall = folder / "best_overall"
    net = model.build(ModelConfig(**about["model"]))
    net.load_state_dict(torch.load(overall / "best_model.pth", weights_only=True))
    assert json.loads((overall / "config.json").read_text()) == about
    typed = shlex.split((overall / "train.sh").read_text().splitlines()[-1])
    assert typed[:2] == ["gpt2", "train"] and "  " + shlex.join(typed) in said
    full = train.parse_train(typed[2:]).run
    assert full.model == options.of_stored(about).model
    assert full.optim == options.of_stored(about).optim
    assert full.data.max_steps == presets.preset("demo").data.max_steps

    summary = folder / "summary"
    for name in (
        "all_trials_comparison.png",
        "optimization_history.png",
        "hyperparameter_relationships.png",
    ):
        assert (summary / name).read_bytes().startswith(b"\x89PNG")
    top = list(csv.DictReader((summary / "top5_trials.csv").read_text().splitlines()))
    assert len(top) == 2 and float(top[0]["val_loss"]) == best.value
    assert (summary / "report.html").read_text().count("data:image/png;base64,") == 3
    assert re.search(
        r"cpu0 begins trial_\d+: process \d+, log \S+/worker_cpu0_\d{8}_\d{6}.log", said
    )


def killed_search(out: Path, count: int, chosen: random.Random, kills: int) -> None:
    """Kills the search at random times, then lets it end; every trial has run exactly once."""
    out.mkdir(exist_ok=True)
    for kill in range(kills):
        running, lines = small_search.start(out, count), small_search.starts(out)
        while len(small_search.starts(out)) == len(lines) and running.poll() is None:
            time.sleep(0.01)
        time.sleep(chosen.uniform(0, 1.5))
        running.send_signal(signal.SIGINT if kill % 4 == 3 else signal.SIGKILL)
        running.wait()
    last = small_search.start(out, count)
    assert last.wait() == 0, (out / "output.txt").read_text()
    found = small_search.study_in(out / "search").get_trials()
    assert [item.number for item in found] == list(range(count))
    assert {item.state for item in found} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for item in found:
        mine = [
            int(line.split()[2])
            for line in small_search.starts(out)
            if line.split()[1] == str(item.number)
        ]
        assert mine == sorted(mine), "a trial goes on where it was"
        if item.state == TrialState.COMPLETE:
            assert sorted(item.intermediate_values) == [1, 2, 3, 4, 5, 6]
    records = results.read_results(out / "search")
    assert sorted({record.job for record in records}) == [trial.name_of(n) for n in range(count)]
    drawn = [tuple(item.params.values()) for item in found]
    assert len(set(drawn)) == count


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(5))
def test_60_kills(tmp_path: Path, number: int):
    killed_search(tmp_path, 16, random.Random(number), kills=12)
