"""Folders of experiments that the version before this one wrote are continued.

The values are those of real folders: experiment.json, results.jsonl, state.json, study.json and the
attributes of the study.
"""

import functools
import io
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
from rich.console import Console

from experiments import jobs, small_search
from experiments.measured import ENGINE, begun
from gpt2.config import options, presets
from gpt2.experiments import api, job_group, results
from gpt2.experiments.compare import models
from gpt2.experiments.progress import listing

FOLDER_ID = "41d771bb79004d6c8664edd159a63764"
TRAINING: dict[str, Any] = {
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 50304,
    "block_size": 16,
    "window": 16,
    "bias": True,
    "total_batch_size": 128,
    "shuffle": "shards",
    "optimizer": "adamw",
    "seed": 1337,
    "dropout": 0.1,
    "min_lr_ratio": 0.1,
    "warmup_steps": 5,
    "schedule": "cosine",
    "decay_steps": None,
    "cooldown": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "max_bad_steps": 5,
    "dtype": "auto",
    "fast": True,
    "max_steps": 20,
    "epochs": 5,
    "init_from": "scratch",
    "eval_interval": 5,
    "eval_batches": 2,
    "eval_rows": None,
}
MODELS = {"n_layer": 2, "learning_rate": 0.006, **TRAINING}
SEARCH = {
    **TRAINING,
    "architecture": "gpt2",
    "n_embd": 64,
    "block_size": 128,
    "total_batch_size": 1024,
    "optimizer": "muon",
    "dropout": 0.0,
    "warmup_steps": 40,
    "max_steps": 350,
    "eval_interval": 1,
    "eval_batches": 16,
    "space": {"learning_rate": "0.0001 to 0.01, log", "n_layer": "1 to 4"},
}
"""of the search in `small_search.py`"""


def write_folder(
    folder: Path, kind: str, fixed: dict[str, Any], total: int, *ended: dict[str, Any]
) -> None:
    """experiment.json, results.jsonl and the state.json of an owner that was killed."""
    folder.mkdir(parents=True)
    about = {"kind": kind, "fixed": fixed, "total": total}
    (folder / "experiment.json").write_text(json.dumps(about, indent=1) + "\n")
    lines = [json.dumps(line) + "\n" for line in ended]
    (folder / "results.jsonl").write_text("".join(lines))
    slot = {
        "slot": "cpu0",
        "in_service": True,
        "reason": "",
        "job": "a",
        "pid": 32290,
        "attempt": 1,
        "began": 1764337641.9152215,
        "metrics": {"step": 3, "total_steps": 6},
        "first_step": 1,
        "first_s": 0.5,
        "step_s": 1.5,
        "log": "/logs/worker_cpu0_20261128_134718.log",
    }
    state = {
        "kind": kind,
        "total": total,
        "places": [slot, {**slot, "slot": "cpu1", "job": None}],
        "before": 0,
        "finished": 2,
        "pruned": 0,
        "failed": 1,
        "retried": 0,
        "failures": [{"job": "b", "slot": "cpu1", "reason": "ValueError: no"}],
        "state": "running",
        "reason": "",
        "host": "elsewhere",
        "pid": 32107,
        "began": 1764337638.1096122,
        "written": 1764337642.1462157,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def line(job: str, values: dict[str, Any], result: Any, **changes: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    return {
        "job": job,
        "state": "finished",
        "values": values,
        "result": result,
        "reason": "",
        "traceback": "",
        "attempt": 1,
        "elapsed_s": 2.9835,
        "slot": "cpu0",
        "time": 1764337641.6403925,
        **changes,
    }


def failed(job: str, values: dict[str, Any]) -> dict[str, Any]:
    reason = "RuntimeError: three is bad"
    return line(job, values, None, state="failed", reason=reason, traceback=f"Traceback\n{reason}")


def add_trial(
    study: optuna.Study, state: TrialState, rate: float, layers: int, *losses: float
) -> None:
    attributes = {"owner": FOLDER_ID}
    if state == TrialState.COMPLETE:
        attributes |= {"result": {"tokens": 1}}
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            value=min(losses) if state == TrialState.COMPLETE else None,
            params={"learning_rate": rate, "n_layer": layers},
            distributions={
                "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
                "n_layer": IntDistribution(1, 4),
            },
            user_attrs=attributes,
            intermediate_values=dict(enumerate(losses, 1)),
        )
    )


def test_a_search_that_was_killed(tmp_path: Path):
    """Two trials have finished, one has a step in its folder, one is only in the study."""
    folder = tmp_path / "search"
    values = [
        {"learning_rate": 0.0003342330176505329, "n_layer": 1},
        {"learning_rate": 0.0003599590019512365, "n_layer": 2},
    ]
    write_folder(
        folder,
        "search",
        {**SEARCH, "data_root": "data/python_stdlib"},
        5,
        line("trial_000", values[0], {"val_loss": 4.0, "tokens": 1}),
        line("trial_001", values[1], {"val_loss": -2.0, "tokens": 1}),
    )
    study_file = {"id": FOLDER_ID, "study": "search in /old/search/optuna_study.db"}
    (folder / "study.json").write_text(json.dumps(study_file) + "\n")
    study = optuna.create_study(
        study_name="search", storage=f"sqlite:///{folder}/optuna_study.db", direction="minimize"
    )
    study.set_user_attr(f"folder {FOLDER_ID}", "elsewhere:/old/search")
    study.set_user_attr("fixed", SEARCH)
    add_trial(study, TrialState.COMPLETE, 0.0003342330176505329, 1, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
    add_trial(study, TrialState.COMPLETE, 0.0003599590019512365, 2, 8.0, 6.0, 4.0, 2.0, 0.0, -2.0)
    add_trial(study, TrialState.RUNNING, 0.00043853178936141372, 3, 7.0)
    add_trial(study, TrialState.RUNNING, 0.00033410721258471209, 4)
    for number, step in ((0, 6), (1, 6), (2, 1)):
        (folder / f"trial_{number:03d}").mkdir()
        (folder / f"trial_{number:03d}" / "step").write_text(str(step))
    found = listing.read(folder)
    assert (found.current.state, found.done) == ("dead", 2)
    assert found.current is not None and found.current.slots[0].job == "a"

    assert small_search.main(tmp_path, 5, 0.05) == 0
    ended = [item.state for item in small_search.study_in(folder).get_trials()]
    assert len(ended) == 5 and set(ended) <= {TrialState.COMPLETE, TrialState.PRUNED}
    begun_at = sorted(tuple(map(int, item.split()[1:3])) for item in small_search.starts(tmp_path))
    assert begun_at == [(2, 1), (3, 0), (4, 0)], "trial 2 continues from its step"
    assert [result.job for result in results.read_results(folder)[:2]] == ["trial_000", "trial_001"]
    assert listing.read(folder).done == 5


def test_a_sweep_with_failed_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    fixed = {"target": "experiments.jobs:measured", "grid": "rate"}
    values = [{"rate": rate, "seed": seed} for seed in range(4) for rate in (1.5, 2)]
    names = [f"rate={item['rate']},seed={item['seed']}" for item in values]
    lines = [
        line(name, item, {"value": item["seed"] * item["rate"], "nan": None})
        if item["seed"] < 3
        else failed(name, item)
        for name, item in zip(names, values, strict=True)
    ]
    write_folder(tmp_path / "seeds", "seeds", fixed, 8, *lines)
    swept = api.sweep(
        jobs.measured,
        {"rate": [1.5, 2]},
        4,
        folder=tmp_path / "seeds",
        log_dir=tmp_path / "logs",
        engine=ENGINE,
        out=Console(file=io.StringIO()),
    )
    assert begun(tmp_path / "trace") == ["1.5 3", "2 3"], "only what has failed"
    assert swept.exit_code == 0
    assert [item.values for item in swept.points] == [
        {0: 0, 1: 1.5, 2: 3.0, 3: 4.5},
        {0: 0, 1: 2, 2: 4, 3: 6},
    ]


def test_jobs_side_by_side_with_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    seeds = {"first": 1, "second": 3}
    values = {
        name: {"target": "experiments.jobs:measured", "seed": seed} for name, seed in seeds.items()
    }
    lines = [
        failed("second", values["second"]),
        line("first", values["first"], {"value": 1.0, "nan": None}),
    ]
    write_folder(tmp_path / "jobs", "jobs", {}, 2, *lines)
    ended = api.together(
        {name: functools.partial(jobs.measured, seed=seed) for name, seed in seeds.items()},
        folder=tmp_path / "jobs",
        log_dir=tmp_path / "logs",
        engine=ENGINE,
        out=Console(file=io.StringIO()),
    )
    assert begun(tmp_path / "trace") == ["1.0 3"]
    assert {name: record.result["value"] for name, record in ended.records.items()} == seeds


def test_models_that_have_finished(data_root: Path, tmp_path: Path):
    folder = tmp_path / "models"
    result = {
        "step": 20,
        "train_loss": 8.859624147415161,
        "val_loss": 9.40881896018982,
        "best_val_loss": 9.40881896018982,
        "hellaswag": None,
        "tokens": 2560,
        "tokens_per_s": 411.0,
        "train_s": 6.36,
        "peak_memory_gb": 0.317038592,
    }
    lines = [
        line("gpt2", {"model": "gpt2"}, result),
        line("mlp", {"model": "mlp"}, {**result, "val_loss": 9.5}),
    ]
    write_folder(folder, "models", {**MODELS, "data_root": str(data_root)}, 2, *lines)
    typed = {name: value for name, value in MODELS.items() if name != "vocab_size"}
    run = options.overlay(presets.preset("demo"), {**typed, "data_root": data_root})
    compared = {name: models.MODELS[name] for name in ("gpt2", "mlp")}
    out = Console(file=io.StringIO(), width=160)
    group = models.group(run, compared, folder, log_dir=tmp_path / "logs")
    assert job_group.run(group, ENGINE, api.Limits(), out).exit_code == 0
    said = out.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of them are done already" in said and "9.4088 *" in said
    assert json.loads((folder / "results.json").read_text())["summary"][1]["val_loss"] == 9.5
    assert (folder / "results.jsonl").read_text() == "".join(json.dumps(x) + "\n" for x in lines)
