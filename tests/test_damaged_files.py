"""Whatever a file holds, what reads it gives a result or a UserError: never another exception.

Each test damages a file of one kind in one place (`mutations`), again and again, and calls in this
process what reads it. MUTATIONS=2000 in the environment looks for faults for longer.
"""

import io
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mutations
import support
from experiments.progress.tracked import Tracker, event
from gpt2.base import folder_lock
from gpt2.base.errors import CheckpointError, ConfigError, DataError, UserError
from gpt2.base.text import PlainConsole
from gpt2.checkpoint import measurements, store
from gpt2.checkpoint.metadata import TrainingMetadata
from gpt2.cli import loading, search, train
from gpt2.cli.model_source import ModelSource
from gpt2.cli.parse import USER_ERROR
from gpt2.cli.status import STATUS_CODES
from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.data import digests, prepare, shards, tokenizer_files
from gpt2.data.digests import DigestMemory
from gpt2.data.manifest import MANIFEST, PROGRESS, Split
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex, TokenDataset
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.tokenizer_copy import TokenizerCopy
from gpt2.data.verification import Verification
from gpt2.evaluation import hellaswag
from gpt2.experiments import results
from gpt2.experiments.compare import models
from gpt2.experiments.progress import listing, state
from gpt2.experiments.progress.listing import ExperimentView
from gpt2.experiments.results import ExperimentDescription, JobResult
from gpt2.experiments.search import best, spec, study, trial
from gpt2.inference import interchange
from gpt2.inspection import checkpoints, estimate, run_status
from gpt2.inspection.watch import RunView
from gpt2.metrics import log_reader
from gpt2.metrics.jsonl import RECORDS_NAME, JsonLines
from gpt2.metrics.log_file import LOG_NAME, LogFile
from gpt2.train import launch, status, trainer
from gpt2.train.saved_run import SavedRun
from inspection.written_runs import PLAN
from support import small_config


def check(path: Path, mutate: mutations.Mutate, read: Callable[[], object]) -> None:
    """Calls `read` for one damaged version of `path` after the other."""
    for content in mutations.each(mutate):
        path.write_bytes(content)
        with mutations.named(content):
            read()


def accepted(function, *arguments, **options):
    """The result of a call; None where it raises a UserError."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        assert str(error)


def paper() -> PlainConsole:
    console = PlainConsole(width=100)
    console.file = io.StringIO()
    return console


def save_checkpoint(folder: Path, step: int) -> Path:
    training = TrainingMetadata(step, 0, step * 10, 2.0, 1.5, 1, "run", "0", 0.25, 0.9, True, "id")
    state = {"model": {"weight": torch.zeros(3)}}
    return store.save(folder, state, training, keep_last=10)


def test_checkpoint_metadata(tmp_path: Path):
    """Without the newest checkpoint, the one before it is used."""
    older, newest = (save_checkpoint(tmp_path, step) for step in (1, 2))
    metadata, weights = newest.with_suffix(".json"), newest.read_bytes()

    def read() -> None:
        newest.write_bytes(weights)
        checkpoints.print_checkpoints(tmp_path, paper())
        for which in ("best", "2"):
            accepted(store.find, tmp_path, which)
        accepted(store.load, newest)
        if store.list_checkpoints(tmp_path)[-1].path == newest:
            measurements.add(newest, val_loss=1.0)
        found = store.find(tmp_path, "latest", set_aside=True)
        assert found in (older, newest)
        assert newest.exists() == (found == newest)

    check(metadata, mutations.of_json(json.loads(metadata.read_text())), read)


def test_the_status_of_a_run(tmp_path: Path):
    path = tmp_path / status.NAME
    status.write(tmp_path, PLAN, "running", 3, "reason", ("samples",))

    def read() -> None:
        out = paper()
        if run := run_status.newest_run(tmp_path):
            run_status.print_state(run, out)
            assert run.state in STATUS_CODES
            accepted(estimate.print_run_forecast, run, out)
        listing.print_list(tmp_path, out)
        view = RunView(tmp_path)
        view.update()
        out.print(view.render(100, 40))

    check(path, mutations.of_json(json.loads(path.read_text())), read)


def write_experiment(folder: Path) -> None:
    description = ExperimentDescription("seeds", {"target": "a:b"}, 3)
    tracker = Tracker(3, kind="seeds")
    tracker.update(event("started", 0, "c"))
    tracker.update(event("reported", 0, "c", at=1.0, metrics={"step": 1, "total_steps": 9}))
    tracker.update(event("failed", 1, "b", at=1.0, reason="why"))
    with results.opened(folder, description) as kept:
        kept.add(JobResult("a", "finished", {"seed": 0}, {"loss": 1.5}))
        kept.add(JobResult("b", "failed", {"seed": 1}, reason="why", traceback="where"))
        state.write(folder, tracker.current)


@pytest.mark.parametrize("name", [state.FILE, results.RESULT_LINES_FILE, results.EXPERIMENT_FILE])
def test_an_experiment(tmp_path: Path, name: str):
    write_experiment(tmp_path)
    path = tmp_path / name
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def read() -> None:
        out = paper()
        listing.print_list(tmp_path, out)
        if (item := accepted(listing.read, tmp_path)) is not None:
            listing.print_experiment(item, out, last=None)
            listing.print_failures(item, out, last=None)
            json.dumps([listing.summary_json(item), listing.full_json(item)])
            view = ExperimentView(tmp_path)
            view.update()
            out.print(view.render(100, 40))
        accepted(reopen)
        for file, content in files.items():
            if file != path:
                file.write_bytes(content)

    def reopen() -> None:
        with results.opened(tmp_path, ExperimentDescription("seeds", {"target": "a:b"}, 3)) as kept:
            kept.add(JobResult("d", "finished", {}, 1.0))
            kept.save(metric="loss")

    text = path.read_text()
    if path.suffix == ".jsonl":
        mutate = mutations.of_lines([json.loads(line) for line in text.splitlines()])
    else:
        mutate = mutations.of_json(json.loads(text))
    check(path, mutate, read)


def test_results_of_models(tmp_path: Path):
    """What trainings returned is compared where it is a number."""
    result: dict[str, Any] = dict.fromkeys(models.RETURNED, 1.5)
    written = asdict(JobResult("gpt2", "finished", {"model": "gpt2"}, result))
    path = tmp_path / results.RESULT_LINES_FILE

    def read() -> None:
        if found := accepted(results.read_results, tmp_path):
            rows = [models.row(item, 10) for item in found]
            paper().print(models.models_table(rows))
            models.as_csv(rows)

    check(path, mutations.of_lines([written, written]), read)


def test_what_a_search_was(tmp_path: Path):
    """The options of a search, and its space, are compared with those that are typed."""
    path = tmp_path / results.EXPERIMENT_FILE
    fixed = {"seed": 1, "space": {"n_layer": "1, 2", "learning_rate": "0.1 to 1.0, log"}}
    description = ExperimentDescription("search", fixed, 3)

    def read() -> None:
        with results.opened(tmp_path, description, spec.differences):
            pass

    content = json.loads(json.dumps(asdict(description)))
    check(path, mutations.of_json(content), lambda: accepted(read))


def test_which_command_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / launch.FILE
    launch.saved_before_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not launch.saved_before_restart(tmp_path)
    content = json.loads(path.read_text())
    check(path, mutations.of_json(content), lambda: launch.saved_before_restart(tmp_path))


def test_a_manifest(characters: Path, gpt2_tokens: Path, tmp_path: Path):
    shutil.copytree(gpt2_tokens, tmp_path, dirs_exist_ok=True)
    path = tmp_path / MANIFEST

    def read() -> None:
        storage = Storage(str(tmp_path))
        if (index := accepted(shards.load_index, storage)) is not None:
            accepted(Verification(storage).run, lambda _: None)
            accepted(index.fingerprint)
            for split in ("train", "val"):
                accepted(read_row, index, split)
        accepted(prepare.prepare, support.SMALL_CORPUS, tmp_path, workers=1)
        path.with_name(PROGRESS).unlink(missing_ok=True)

    def read_row(index: DatasetIndex, split: Split) -> None:
        dataset = TokenDataset(index, split, 8)
        if sum(dataset.rows_per_shard):
            dataset.read(np.array([[0, 0]]))

    check(path, mutations.of_json(json.loads(path.read_text())), read)


def test_an_unfinished_preparation(gpt2_tokens: Path, tmp_path: Path):
    shutil.copytree(gpt2_tokens, tmp_path, dirs_exist_ok=True)
    made = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).unlink()
    recipe = prepare._recipe(support.SMALL_CORPUS, GPT2_TOKENIZER, None, None, None)
    content = {
        "command": "gpt2 data small",
        "recipe": asdict(recipe),
        "counts": asdict(prepare.Counts(9)),
        "place": [0, 9],
        "tokens": 0,
        "shards": made["shards"],
    }

    def read() -> None:
        accepted(shards.load_index, Storage(str(tmp_path)))
        accepted(prepare._ProgressFile(tmp_path, recipe, "gpt2 data small").begin)
        TokenizerCopy(tmp_path, GPT2_TOKENIZER)

    check(tmp_path / PROGRESS, mutations.of_json(content), read)


def test_a_shard(tmp_path: Path):
    path = tmp_path / "a_train_000000.npy"
    np.save(path, np.arange(200, dtype=np.uint16))
    (tmp_path / "a_val_000000.npy").write_bytes(whole := path.read_bytes())
    storage = Storage(str(tmp_path))

    def read() -> None:
        if (index := accepted(shards.load_index, storage)) is not None:
            accepted(index.fingerprint)
        accepted(Verification(storage).run, lambda _: None)

    head = mutations.of_bytes(whole[:128])
    check(path, lambda rng: head(rng) + whole[128:], read)


def test_digests_of_shards(tmp_path: Path):
    version = digests.version_of(tmp_path.stat())
    memory = DigestMemory(tmp_path)
    for number in range(2):
        memory.add(f"a_train_{number}.npy", version, "0" * 64)
    lines = [json.loads(line) for line in (tmp_path / digests.NAME).read_text().splitlines()]

    def read() -> None:
        found = DigestMemory(tmp_path)
        for line in lines:
            assert found.get(line["file"], version) in (None, "0" * 64)

    check(tmp_path / digests.NAME, mutations.of_lines(lines), read)


def test_hellaswag(tmp_path: Path):
    path = support.write_tasks(tmp_path / "tasks.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    check(path, mutations.of_lines(lines), lambda: accepted(hellaswag.load, path))


def test_toml(tmp_path: Path):
    """Options of a run, and the space of a search."""
    run, path = presets.preset("demo"), tmp_path / "a.toml"

    def read() -> None:
        accepted(train.with_file, run, path)
        accepted(search.read_space, path, run)

    options_ = b"learning_rate = 1e-3\n[data]\ntotal_batch_size = 64\n[[mixture]]\nweb = 1\n"
    space_ = b"[learning_rate]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n[n_layer]\nchoices = [2, 4]\n"
    for content in (options_, space_):
        check(path, mutations.of_bytes(content), read)


@pytest.mark.parametrize("read", [folder_lock.owner, study.folder_id, best.read_config])
def test_small_files(tmp_path: Path, read: Callable[[Path], object]):
    names = {
        folder_lock.owner: folder_lock.OWNER_NAME,
        study.folder_id: study.FOLDER_FILE,
        best.read_config: trial.CONFIG,
    }
    path = tmp_path / names[read]
    content = asdict(folder_lock.Owner.this_process()) | {"id": "1", "study": "s", "trial": 3}
    target = path if read is best.read_config else tmp_path
    check(path, mutations.of_json(content), lambda: accepted(read, target))


def test_fifos_and_folders_in_place_of_files(tmp_path: Path):
    """Nothing waits for another process to write."""
    run = presets.preset("demo")
    names = ("step_000002.json", "a.toml", status.NAME, state.FILE, folder_lock.OWNER_NAME)
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / make.__name__
        folder.mkdir()
        for name in (*names, results.RESULT_LINES_FILE, results.EXPERIMENT_FILE):
            make(folder / name)
        for read in (status.read, state.read, folder_lock.owner):
            assert read(folder) is None
        for path in (folder / "a.toml", folder / "none.toml"):
            with pytest.raises(ConfigError, match="cannot read --config"):
                train.with_file(run, path)
        for read in (listing.read, results.read_results, store.list_checkpoints):
            with pytest.raises(CheckpointError, match="cannot read"):
                read(folder)
        assert folder_lock.is_held(folder) is False
        with (
            pytest.raises(CheckpointError, match=r"cannot read .*owner\.json"),
            folder_lock.held(folder),
        ):
            pass
        (folder / "step_000002.json").rename(folder / "step_000002.pt")
        with pytest.raises(CheckpointError, match="cannot read"):
            store.unpickle(folder / "step_000002.pt")


def test_links_that_form_a_circle(tmp_path: Path):
    """In place of a checkpoint, its folder, and what a run appends to."""
    for name in ("a.pt", "checkpoints", LOG_NAME, status.NAME, "a.toml"):
        (tmp_path / name).symlink_to(name)
    for path in ("a.pt", "checkpoints", "x" * 300, "a\0b"):
        with pytest.raises(CheckpointError, match="cannot read"):
            store.find(tmp_path, str(tmp_path / path))
    with pytest.raises(OSError, match="symbolic links"):
        LogFile(tmp_path / LOG_NAME, "run", 0)
    assert status.read(tmp_path) is None
    with pytest.raises(ConfigError, match="cannot read --config"):
        train.with_file(presets.preset("demo"), tmp_path / "a.toml")


NO_FILE = r"FIFO|not a regular file|directory"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_fifos_and_folders_in_place_of_logs_and_data(tmp_path: Path, gpt2_tokens: Path, make):
    for name in (LOG_NAME, RECORDS_NAME, digests.NAME, "tasks.jsonl", tokenizer_files.FILE):
        make(tmp_path / name)
    for open_sink in (
        lambda: LogFile(tmp_path / LOG_NAME, "run", 0),
        lambda: JsonLines(tmp_path / RECORDS_NAME, "run", 0, {}),
        lambda: log_reader.read_runs(tmp_path / LOG_NAME),
    ):
        with pytest.raises(OSError, match=NO_FILE):
            open_sink()
    view = RunView(None, tmp_path / RECORDS_NAME)
    view.update()
    DigestMemory(tmp_path).add("a", (1, 2, 3), "0" * 64)
    for load in (hellaswag.load, tokenizer_files.load):
        with pytest.raises(DataError, match=NO_FILE):
            load(tmp_path / "tasks.jsonl" if load is hellaswag.load else tmp_path)
    data = Path(shutil.copytree(gpt2_tokens, tmp_path / "data"))
    storage = Storage(str(data))
    shard = shards.load_index(storage).of("train")[0]
    (data / shard.file).unlink()
    make(data / shard.file)
    (fault,) = [report for report in Verification(storage).run(lambda _: None) if report.wrong]
    assert fault.file == shard.file
    with pytest.raises(DataError, match=NO_FILE):
        TokenDataset(shards.load_index(storage), "train", 8).read(np.array([[0, 0]]))
    make(data / "none.json")
    with pytest.raises(DataError, match=NO_FILE):
        storage.read_if_any("none.json")


def test_hugging_face(tmp_path: Path):
    path = tmp_path / "config.json"
    content = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 8}
    content |= {"vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None}
    check(
        path,
        mutations.of_json(content),
        lambda: accepted(interchange.read, f"hf:{tmp_path}", trust=False),
    )


def test_nanogpt(tmp_path: Path):
    path = tmp_path / "ckpt.pt"
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 8, "vocab_size": 50257}
    content = {"model": {"transformer.wpe.weight": torch.zeros(8, 4)}, "model_args": shape}

    def mutate(rng: random.Random) -> Any:
        return mutations.changed(rng, content, rng.choice(("value", "missing", "extra")), ODD_PARTS)

    for damaged in mutations.each(mutate):
        torch.save(damaged, path)
        with mutations.named(damaged):
            accepted(interchange.read, f"nanogpt:{path}", trust=False)


def test_metrics(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    usage = [{"memory_gb": 1.0, "utilisation_percent": 9.0}]
    step = {"loss": 2.0, "learning_rate": 0.1, "elapsed_s": 1.0, "tokens_per_s": 9.0, "epoch": 0}
    more = {"grad_norm": 1.0, "left_s": 3.0, "steps_left": 8, "mfu": 0.5, "rank_gpu": usage}
    lines = [
        {"kind": "run", "run": "a", "step": 0, "time": 1.0},
        {"kind": "step", "run": "a", "step": 1, "time": 2.0} | step | more,
        {"kind": "validation", "run": "a", "step": 1, "loss": 2.0, "bits_per_byte": 1.0},
        {"kind": "event", "run": "a", "level": "WARNING", "message": "m", "time": 2.0},
    ]

    def read() -> None:
        accepted(log_reader.read_runs, path)
        view = RunView(None, path)
        view.update()
        paper().print(view.render(100, 40))

    check(path, mutations.of_lines(lines), read)


ODD_PARTS = (None, -1, "text", [], {}, math.inf, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int))
"""in place of tensors and plain values"""


def test_a_checkpoint_of_ours_with_other_content(characters: Path, tmp_path: Path):
    """It is signed, and lacks a part, or has something else in its place."""
    config = small_config(characters, tmp_path, max_steps=2, resume="latest", warmup_steps=1)
    trainer.run(config)
    (complete,) = store.list_checkpoints(tmp_path / "checkpoints")
    whole = store.load(complete.path)
    parts = {part.name for part in fields(SavedRun)}

    def configure(stored: Mapping[str, Any] | None) -> RunConfig:
        return config if stored is None else options.on_stored(config, stored)

    def mutate(rng: random.Random) -> dict[str, Any]:
        name = rng.choice(sorted(parts & whole.keys()))
        kind = rng.choice(("value", "missing"))
        is_whole = rng.random() < 0.3 or not whole[name] or isinstance(whole[name], str)
        if is_whole:
            return mutations.changed(rng, {name: whole[name]}, kind, ODD_PARTS)
        return {name: mutations.changed(rng, whole[name], kind, ODD_PARTS)}

    for content in mutations.each(mutate, mutations.EXAMPLES // 3):
        with mutations.named(content):
            state = {name: part for name, part in whole.items() if name not in content}
            store.save(complete.path.parent, state | content, complete.training, keep_last=10)
            accepted(loading.load_model, ModelSource(str(complete.path)))
            accepted(trainer.run, config, configure=configure)


@pytest.mark.parametrize(
    ("command", "name", "content"),
    [
        ("status --checkpoint_dir .", status.NAME, b'{"plan": []}'),
        ("experiments show .", results.EXPERIMENT_FILE, b"[" * 200_000),
        ("data show .", "a_train_0.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', (" * 9),
        ("plot .", "logs/log.txt", b"\xff\xfe\x00" * 99),
        ("train --config a.toml", "a.toml", b'preset = "d\xe9mo"'),
        ("generate --checkpoint a.pt --log_level error", "a.pt", store.ZIP + bytes(range(256)) * 9),
    ],
)
def test_a_command_in_a_process_of_its_own(tmp_path: Path, command: str, name: str, content: bytes):
    """From the shell: exit code 2 and one line, whatever the file holds."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    words = [sys.executable, "-m", "gpt2", *command.split()]
    ran = support.run_command(words, tmp_path, expect=USER_ERROR)
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert len(ran.stderr) < 500 and ran.stderr.rstrip("\n").isprintable()
