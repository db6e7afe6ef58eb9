"""Runs on several corpora, held against a brute-force reading of what the options say."""

import itertools
import json
import math
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import forked_ranks
import small_tokenizers
from gpt2.base.errors import CheckpointError, DataError
from gpt2.checkpoint import store
from gpt2.cli import data as data_command
from gpt2.cli import evaluate
from gpt2.config import options
from gpt2.config.run import RunConfig
from gpt2.data import prepare, tokenizer_files, training_data
from gpt2.data.mixture import BLOCK_ROWS
from gpt2.data.remote import Storage
from gpt2.data.shards import load_index
from gpt2.experiments.training import training_job
from gpt2.inspection import doctor
from gpt2.train import dataset, trainer
from gpt2.train.resume import Sampling, StartingPoint
from gpt2.train.state import RunResult, TrainState
from same_state import assert_same
from support import SMALL_CORPUS, losses, small_config, small_flags

ROW = 8
SIZES = {"code": (40, 33), "math": (25,), "web": (60, 7, 51)}
"""rows in the training shards of each corpus"""
PHASES = ("until=0.5 web=0.7 code=0.3", "until=0.75 code=0.2 math=0.3 web=0.5", "math=1")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which no token stands twice, with a small vocabulary: runs are quicker."""
    folder, token = tmp_path_factory.mktemp("corpora"), 0
    texts = dict(enumerate(map(chr, range(ord("一"), ord("一") + 2048))))
    meta = {"vocab_size": 2048, "itos": texts, "stoi": {text: n for n, text in texts.items()}}
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        (folder / name / "meta.pkl").write_bytes(pickle.dumps(meta))
        for number, rows in enumerate((5, *sizes)):
            split = "train" if number else "val"
            tokens = np.arange(token, token := token + rows * ROW + 3, dtype="<u2")
            np.save(folder / name / f"x_{split}_{number}.npy", tokens)
    return folder


def roots(corpora: Path, *names: str) -> list[str]:
    return [f"{name}={corpora / name}" for name in names or sorted(SIZES)]


def mixed(corpora: Path, out: Path, /, **changes: object) -> RunConfig:
    values = {"mixture": list(PHASES), "max_steps": 16, "block_size": ROW, "dropout": 0} | changes
    run = small_config(corpora / "web", out, **{"data_root": roots(corpora), **values})
    return options.overlay(run, {"total_batch_size": 5 * ROW, "n_embd": 16, "eval_rows": 6})


def sampling_of(run: RunConfig) -> tuple[training_data.MixedDataset, Sampling]:
    data = dataset.find(run)
    found = dataset.training_split(run, data)
    return found, StartingPoint().sampling(run, found.rows_per_shard, TrainState())


def weights_at(row: int, total_rows: int) -> tuple[int, dict[str, Fraction]]:
    """The first row and the weights of the phase in PHASES that `row` is in."""
    first = 0
    for phase in PHASES:
        values = dict(item.split("=") for item in phase.split())
        end = Fraction(values.pop("until", "1")) * total_rows
        if row < end or end == total_rows:
            return first, {name: Fraction(weight) for name, weight in values.items()}
        first = int(end)
    raise AssertionError


@pytest.mark.parametrize("shuffle", ["none", "shards", "rows", "global"])
def test_every_row_is_that_of_a_brute_force_reading(corpora: Path, tmp_path: Path, shuffle: str):
    """Counts of every phase and block, the epochs of each corpus, and the tokens in the files."""
    steps, rows_per_step = 800, 5
    found, order = sampling_of(mixed(corpora, tmp_path, max_steps=steps, shuffle=shuffle))
    files = [
        np.load(path)
        for name in sorted(SIZES)
        for path in sorted((corpora / name).glob("*_train_*.npy"))
    ]
    names = [name for name in sorted(SIZES) for _ in SIZES[name]]
    read: list[tuple[str, int, int]] = []
    for step in range(steps):
        rows = order.sampler.rows(step)
        for world_size in (2, 3):
            shares = [order.sampler.rows(step, rank, world_size) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(shares), rows)
        inputs, targets = found.read(rows)
        for (shard, row), given, wanted in zip(rows.tolist(), inputs, targets, strict=True):
            expected = files[shard][row * ROW : row * ROW + ROW + 1]
            assert np.array_equal(given, expected[:-1]) and np.array_equal(wanted, expected[1:])
            read.append((names[shard], shard, row))
    for end in range(0, len(read), 5):
        first, weights = weights_at(end, steps * rows_per_step)
        if (end - first) % BLOCK_ROWS == 0:
            for name, weight in weights.items():
                count = sum(one == name for one, _, _ in read[first:end])
                assert abs(count - weight / sum(weights.values()) * (end - first)) < 1
        assert read[end][0] in weights
    for name, sizes in SIZES.items():
        own = [(shard, row) for one, shard, row in read if one == name]
        whole = {
            (shard, row)
            for shard in range(len(names))
            if names[shard] == name
            for row in range(sizes[shard - names.index(name)])
        }
        epochs = [own[start : start + len(whole)] for start in range(0, len(own), len(whole))]
        assert len(epochs) > 3, "the order of several epochs is compared"
        for epoch in epochs[:-1]:
            assert len(epoch) == len(set(epoch)) and set(epoch) == whole
        assert (epochs[0] == sorted(whole)) == (shuffle in ("none", "shards"))
        assert (epochs[1] == epochs[2]) == (
            shuffle == "none" or (shuffle, name) == ("shards", "math")
        )


def test_phases_of_a_mixture_begin_at_the_same_steps_under_a_ramp(corpora: Path, tmp_path: Path):
    """Each corpus is read in the order of its own rows, none left out."""
    ramp = [f"3:{2 * ROW}", f"10:{3 * ROW}"]
    _, order = sampling_of(mixed(corpora, tmp_path, max_steps=40, batch_ramp=ramp))
    steps = [order.sampler.rows(step) for step in range(40)]
    assert [len(rows) for rows in steps] == [2] * 3 + [3] * 7 + [5] * 30
    assert [phase.first_step for phase in order.phases] == [0, 20, 30]
    names = [{sorted(SIZES)[n] for n in order.sampler.corpus_of(rows[:, 0])} for rows in steps]
    assert set.union(*names[:20]) == {"web", "code"}
    assert set.union(*names[20:30]) == {"web", "code", "math"}
    assert set.union(*names[30:]) == {"math"}
    read = np.concatenate(steps)
    of_rows = order.sampler.corpus_of(read[:, 0])
    for number, corpus in enumerate(order.sampler.corpora):
        own = read[of_rows == number] - (order.sampler.first_shards[number], 0)
        assert np.array_equal(own, corpus.at(np.arange(len(own))))


def state(folder: Path, step: int) -> dict[str, object]:
    kept = store.load(folder / "checkpoints" / f"step_{step:06d}.pt", trust=False)
    return {key: kept[key] for key in ("model", "optimizer", "progress", "mixture")}


def test_a_run_that_is_interrupted_is_the_same_as_one_that_is_not(corpora: Path, tmp_path: Path):
    """Also across the beginning of phases, and if it is resumed with other totals: `until` became a
    step when the run began."""
    trainer.run(mixed(corpora, tmp_path / "whole"))
    trainer.run(mixed(corpora, tmp_path / "parts", max_steps=16), report=stop_at(6))
    assert_same(state(tmp_path / "parts", 6)["mixture"], state(tmp_path / "whole", 16)["mixture"])
    for last, total in ((11, 20), (16, 16)):
        trainer.run(
            mixed(corpora, tmp_path / "parts", resume="latest", decay_steps=16, max_steps=total),
            report=stop_at(last),
        )
    assert_same(state(tmp_path / "whole", 16), state(tmp_path / "parts", 16))
    phases = state(tmp_path / "parts", 16)["mixture"]
    assert [phase["first_step"] for phase in phases] == [0, 8, 12]
    assert phases[1]["weights"] == {"code": 2, "math": 3, "web": 5}


def stop_at(last: int):
    return lambda **metrics: "stop" if metrics.get("step") == last else "go"


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_losses_are_the_same_on_any_number_of_ranks(corpora: Path, tmp_path: Path, ranks: int):
    one, several = tmp_path / "one", tmp_path / "several"
    trainer.run(mixed(corpora, one))
    flags = small_flags(corpora, several, block_size=ROW, total_batch_size=5 * ROW, dropout=0)
    flags += ["--max_steps", "16", "--eval_rows", "6", "--data_root", *roots(corpora)]
    forked_ranks.run([*flags, "--mixture", *PHASES], ranks, tmp_path)
    assert losses(one / "logs/log.txt") == pytest.approx(losses(several / "logs/log.txt"), abs=1e-4)
    for ours, theirs in zip(records(one), records(several), strict=True):
        assert ours["corpora"].keys() == theirs["corpora"].keys()
        if ours["kind"] == "step":
            assert ours["corpora"] == pytest.approx(theirs["corpora"], abs=1e-4)


def records(folder: Path) -> list[dict]:
    lines = (folder / "logs/metrics.jsonl").read_text().splitlines()
    return [one for line in lines if (one := json.loads(line))["kind"] in ("step", "validation")]


def test_the_loss_of_each_corpus_is_that_of_its_rows(corpora: Path, tmp_path: Path):
    run = mixed(corpora, tmp_path)
    trainer.run(run)
    _, order = sampling_of(run)
    for record in records(tmp_path):
        if record["kind"] == "validation":
            assert record["corpora"].keys() == SIZES.keys()
            losses_of = [one["loss"] for one in record["corpora"].values()]
            assert record["loss"] == pytest.approx(np.mean(losses_of), rel=1e-6)
            assert all(one["bits_per_byte"] > 0 for one in record["corpora"].values())
            continue
        numbers = order.sampler.corpus_of(order.sampler.rows(record["step"] - 1)[:, 0])
        counts = {name: int((numbers == n).sum()) for n, name in enumerate(sorted(SIZES))}
        assert record["corpora"].keys() == {name for name, count in counts.items() if count}
        mean = sum(loss * counts[name] for name, loss in record["corpora"].items()) / 5
        assert record["loss"] == pytest.approx(mean, rel=1e-6)


def test_weights_that_change_at_a_resume_begin_there(corpora: Path, tmp_path: Path):
    trainer.run(mixed(corpora, tmp_path, max_steps=4))
    weighted = [f"{root}:{weight}" for root, weight in zip(roots(corpora), (1, 0, 3), strict=True)]
    changed = {"data_root": weighted, "mixture": [], "resume": "latest"}
    trainer.run(mixed(corpora, tmp_path, max_steps=8, **changed))
    phases = [{"first_step": 0, "weights": {"code": 3, "web": 7}}]
    assert state(tmp_path, 4)["mixture"][:1] == phases
    begun = [phase for phase in state(tmp_path, 4)["mixture"] if phase["first_step"] < 4]
    new = {"first_step": 4, "weights": {"code": 1, "math": 0, "web": 3}}
    assert state(tmp_path, 8)["mixture"] == [*begun, new]
    trainer.run(mixed(corpora, tmp_path, max_steps=10, **changed))
    assert state(tmp_path, 10)["mixture"] == [*begun, new]


def test_corpora_are_added_but_never_taken_away(corpora: Path, tmp_path: Path):
    both = {"data_root": roots(corpora, "code", "web"), "mixture": []}
    trainer.run(mixed(corpora, tmp_path, max_steps=4, **both))
    before = sampling_of(mixed(corpora, tmp_path, **both))[1].sampler.rows(3)
    more = {"data_root": roots(corpora), "mixture": ["math=1"], "resume": "latest"}
    trainer.run(mixed(corpora, tmp_path, max_steps=6, **more))
    kept = state(tmp_path, 6)["mixture"]
    assert kept == [
        {"first_step": 0, "weights": {"code": 73, "web": 118}},
        {"first_step": 4, "weights": {"math": 1}},
    ]
    run = mixed(corpora, tmp_path, max_steps=6, **more)
    start = StartingPoint(
        tmp_path,
        {"config": run.to_dict(), "mixture": kept, "data_fingerprint": {"code": {}, "web": {}}},
    )
    sampler = start.sampling(run, sampling_of(run)[0].rows_per_shard, TrainState(step=6)).sampler
    # `math` lies between the others, which are read as before.
    assert (sampler.rows(3) - before)[:, 0].tolist() == [
        int(shard >= 2) for shard in before[:, 0].tolist()
    ]
    with pytest.raises(
        CheckpointError, match=r"corpora: code, math, web in the .*, without math \(the weight 0 .*"
    ):
        trainer.run(mixed(corpora, tmp_path, max_steps=8, **both, resume="latest"))
    one = {"data_root": str(corpora / "web"), "mixture": [], "resume": "latest"}
    with pytest.raises(DataError, match=r"has the shards of one corpus, the run trains on code, "):
        trainer.run(mixed(corpora, tmp_path, max_steps=8, **one))


def test_the_best_checkpoint_is_one_since_the_last_corpus_was_added(corpora: Path, tmp_path: Path):
    intervals = {"mixture": [], "eval_interval": 2, "checkpoint_interval": 2}
    one = {"data_root": [f"{root}:1" for root in roots(corpora, "code")], **intervals}
    first = trainer.run(mixed(corpora, tmp_path, max_steps=4, **one))
    added = {"data_root": [f"{root}:1" for root in roots(corpora, "code", "web")], **intervals}
    changes = {"max_steps": 8, "resume": "latest", "learning_rate": 1.0}
    result = trainer.run(mixed(corpora, tmp_path, **added, **changes))
    assert result.best_val_loss > first.best_val_loss, "the rate is far too high"
    best = store.find(tmp_path / "checkpoints", "best")
    assert best is not None and best.stem in ("step_000006", "step_000008")


def test_losses_before_a_corpus_was_added_do_not_compare_and_are_measured_anew(
    corpora: Path, tmp_path: Path, caplog
):
    """Shares are rounded up: of 6 rows, one corpus has 5, two have 3 each."""
    names = ["code"]

    def train(steps: int, **changes: object) -> RunResult:
        data = [f"{root}:1" for root in roots(corpora, *names)]
        intervals = {"mixture": [], "eval_interval": 2, "checkpoint_interval": 2, "keep_last": 9}
        changes |= {"max_steps": steps, "data_root": data, "resume": "latest"}
        return trainer.run(mixed(corpora, tmp_path, **intervals, **changes))

    def measured() -> list[tuple[str, int | None]]:
        kept = store.list_checkpoints(tmp_path / "checkpoints")
        return [(item.training.validated, item.training.val_rows) for item in kept]

    first = train(4)
    names.append("web")
    result = train(4)
    assert result.val_loss not in (None, first.val_loss)
    assert measured() == [("code", 5), ("code web", 6)]
    assert train(4).best_val_loss == result.val_loss
    assert "validation: on" not in caplog.text, "a note says it"
    assert "Validation: also of web from here" in caplog.text


def test_a_run_that_goes_back_to_before_a_corpus_was_added_takes_no_loss_from_there(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    common = {"mixture": [], "eval_interval": 2, "checkpoint_interval": 4, "max_bad_steps": 2}
    one = {"data_root": [f"{root}:1" for root in roots(corpora, "code")], **common}
    first = trainer.run(mixed(corpora, tmp_path, max_steps=4, **one))
    norm, updates = trainer.gradient_norm, itertools.count(1)
    monkeypatch.setattr(
        trainer, "gradient_norm", lambda net: norm(net) * (math.nan if next(updates) <= 2 else 1)
    )
    added = {"data_root": [f"{root}:1" for root in roots(corpora, "code", "web")], **common}
    changes = {"max_steps": 8, "resume": "latest", "learning_rate": 1.0}
    result = trainer.run(mixed(corpora, tmp_path, **added, **changes))
    assert "back to step 4" in caplog.text
    assert result.best_val_loss > first.best_val_loss, "the rate is far too high"


def test_a_glob_over_folders_is_a_mixture_by_size(corpora: Path, tmp_path: Path):
    glob = {"data_root": str(corpora / "*" / "*.npy"), "mixture": []}
    by_glob, by_name = (
        sampling_of(mixed(corpora, tmp_path, **{"mixture": [], **changes}))[1]
        for changes in (glob, {})
    )
    assert by_glob == by_name
    assert by_glob.phases[0].weights == {"code": 73, "math": 25, "web": 118}
    trainer.run(mixed(corpora, tmp_path, **glob), report=stop_at(3))
    trainer.run(mixed(corpora, tmp_path, **glob, resume="latest"))


def test_a_checkpoint_of_an_earlier_version_keeps_the_order_of_a_glob(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """Folder after folder, with a note."""
    glob = {"data_root": str(corpora / "*" / "*.npy"), "mixture": []}
    with monkeypatch.context() as earlier:
        earlier.setattr(training_data, "folders_of", lambda _root: {})
        earlier.setattr(training_data, "has_several_corpora", lambda _root: False)
        trainer.run(mixed(corpora, tmp_path / "whole", **glob))
        trainer.run(mixed(corpora, tmp_path / "parts", **glob), report=stop_at(7))
    trainer.run(mixed(corpora, tmp_path / "parts", **glob, resume="latest"))
    assert "is read folder after folder, as its run began" in caplog.text
    kept = [
        store.load(tmp_path / name / "checkpoints/step_000016.pt", trust=False)
        for name in ("whole", "parts")
    ]
    assert "mixture" not in kept[0]
    assert_same(kept[0]["model"], kept[1]["model"])


def test_a_new_folder_of_a_glob_is_no_part_of_a_run_that_goes_on(
    corpora: Path, tmp_path: Path, caplog
):
    for name in ("code", "web"):
        shutil.copytree(corpora / name, tmp_path / name)
    glob = {"data_root": str(tmp_path / "[cmw]*" / "*.npy"), "mixture": []}
    trainer.run(mixed(corpora, tmp_path / "run", **glob), report=stop_at(3))
    shutil.copytree(corpora / "math", tmp_path / "math")
    trainer.run(mixed(corpora, tmp_path / "run", **glob, resume="latest"))
    assert "math/*.npy is new in" in caplog.text
    assert state(tmp_path / "run", 16)["mixture"][0]["weights"] == {"code": 73, "web": 118}


def test_corpora_of_different_tokenizers_are_refused(
    corpora: Path, characters: Path, tmp_path: Path
):
    other = [f"web={corpora / 'web'}", f"abc={characters}"]
    run = mixed(corpora, tmp_path, data_root=other, mixture=[])
    with pytest.raises(DataError, match=r"different tokenizers: abc has those of .*, web those of"):
        dataset.find(run)


def test_gpt2_data_order_lists_the_rows_of_a_new_run_and_of_a_resumed_one(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    flags = small_flags(corpora, tmp_path, block_size=ROW, total_batch_size=5 * ROW, max_steps=16)
    flags += ["--data_root", *roots(corpora), "--mixture"]

    def listed(step: int, *more: str) -> list[dict]:
        typed = ["gpt2 data", "order", "--step", str(step), "--json", *more]
        monkeypatch.setattr("sys.argv", typed)
        assert data_command.data_main() == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]

    sampler = sampling_of(mixed(corpora, tmp_path))[1].sampler
    files = [
        (name, path.name)
        for name in sorted(SIZES)
        for path in sorted((corpora / name).glob("*_train_*.npy"))
    ]
    for step in (0, 9, 13):
        assert listed(step, *flags, *PHASES) == [
            {"corpus": files[shard][0], "shard": files[shard][1], "row": row}
            for shard, row in sampler.rows(step).tolist()
        ]
    trainer.run(mixed(corpora, tmp_path, max_steps=4, mixture=["web=1 code=1"]))
    folder = ["--out_dir", str(tmp_path), "--resume", "latest", "--preset", "demo"]
    assert {row["corpus"] for row in listed(20, *folder)} == {"web", "code"}
    assert {row["corpus"] for row in listed(20, *folder, "--mixture", "math=1")} == {"math"}
    before = listed(2, *folder)
    assert before == listed(2, *folder, "--mixture", "math=1")


def test_folders_with_validation_alone_are_left_out_of_a_glob(
    corpora: Path, tmp_path: Path, caplog
):
    for name in SIZES:
        shutil.copytree(corpora / name, tmp_path / "data" / name)
    (tmp_path / "data/held").mkdir()
    for name in ("x_val_0.npy", "meta.pkl"):
        shutil.copy(corpora / "web" / name, tmp_path / "data/held")
    for root in (tmp_path / "data", tmp_path / "data/*/*.npy", tmp_path / "data/**"):
        found = dataset.find(mixed(corpora, tmp_path, data_root=str(root), mixture=[]))
        assert list(found.corpora) == sorted(SIZES)
    assert "held has validation shards alone" in caplog.text
    for name in SIZES:  # one corpus in several folders, with its validation split in another
        (tmp_path / "data" / name / "x_val_0.npy").unlink()
    found = dataset.find(mixed(corpora, tmp_path, data_root=str(tmp_path / "data"), mixture=[]))
    assert not found.is_mixture and found.tokens("val") == 5 * ROW + 3


def test_a_corpus_may_have_a_folder_for_each_split(corpora: Path, tmp_path: Path):
    for name in SIZES:
        for path in (corpora / name).glob("*.npy"):
            target = tmp_path / name / path.stem.split("_")[1] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for root in (tmp_path, tmp_path / "*/*/*.npy", tmp_path / "**/*.npy"):
        found = dataset.find(mixed(corpora, tmp_path, data_root=str(root), mixture=[]))
        assert [len(index.of("train")) for index in found.corpora.values()] == [2, 1, 3]
    (tmp_path / "code").rename(tmp_path / "../elsewhere")
    (tmp_path / "math").rename(tmp_path / "../elsewhere too")
    found = dataset.find(mixed(corpora, tmp_path, data_root=str(tmp_path), mixture=[]))
    assert not found.is_mixture and found.shard_count("train") == 3


def test_folders_of_the_same_name_are_refused_but_go_on_as_they_began(
    corpora: Path, tmp_path: Path
):
    for name in SIZES:
        shutil.copytree(corpora / name, tmp_path / name / "tokens")
    run = mixed(corpora, tmp_path, data_root=str(tmp_path / "*/tokens/*.npy"), mixture=[])
    with pytest.raises(DataError, match=r"both be the corpus tokens; use --data_root NAME=FOLDER"):
        dataset.find(run)
    assert dataset.find(run, names=("",)).shard_count("train") == 6


def test_a_folder_of_a_glob_that_is_gone_is_named(corpora: Path, tmp_path: Path):
    glob = {"data_root": str(corpora / "*/*.npy"), "mixture": []}
    with pytest.raises(DataError, match=r"has no shards of more, which the run trains on"):
        dataset.find(mixed(corpora, tmp_path, **glob), names=("code", "more"))


def test_a_phase_that_is_shorter_than_a_step_is_left_out_with_a_warning(
    corpora: Path, tmp_path: Path, caplog
):
    sampling_of(mixed(corpora, tmp_path, max_steps=4))
    assert "shorter than a step" not in caplog.text
    _, sampling = sampling_of(mixed(corpora, tmp_path, max_steps=3))
    assert [phase.first_step for phase in sampling.phases] == [0, 2]
    assert "left out because they are shorter than a step: 1 of 3" in caplog.text


def test_a_name_without_a_weight_is_explained(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = f"web={corpora / 'web'}"
    with pytest.raises(DataError, match=f"add its weight: {root}:1$"):
        dataset.find(mixed(corpora, tmp_path, data_root=root, mixture=[]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"add its weight: web=data/python_stdlib:1$"):
        trainer.run(mixed(corpora, tmp_path, data_root="web=data/python_stdlib", mixture=[]))
    assert not list(tmp_path.glob("web*")), (
        "an embedded corpus is prepared in a folder of that name"
    )


def test_a_sweep_is_another_one_with_other_weights(corpora: Path, tmp_path: Path):
    def fixed(*weights: float) -> list[str]:
        typed = [f"{root}:{weight}" for root, weight in zip(roots(corpora), weights, strict=True)]
        return training_job.result_options(mixed(corpora, tmp_path, data_root=typed, mixture=[]))

    assert fixed(1, 1, 1) != fixed(2, 1, 1)


def test_a_sweep_over_folders_is_another_one_than_before(corpora: Path, tmp_path: Path):
    one = training_job.result_options(
        mixed(corpora, tmp_path, data_root=str(corpora / "web"), mixture=[])
    )
    glob = training_job.result_options(mixed(corpora, tmp_path, data_root=str(corpora), mixture=[]))
    assert "mixture" not in one and glob["mixture"] == "folders by size"


def test_evaluate_has_each_corpus_and_the_mean(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    result = trainer.run(mixed(corpora, tmp_path, max_steps=2))
    folder, out = str(tmp_path / "checkpoints"), tmp_path / "results.json"
    typed = ["--checkpoint_dir", folder, "--tasks", "val", "--device", "cpu", "--output", str(out)]
    monkeypatch.setattr("sys.argv", ["gpt2 evaluate", *typed])
    assert evaluate.evaluate_main() == 0
    found = json.loads(out.read_text())["results"]
    assert found.keys() == {"val", "val/code", "val/math", "val/web"}
    assert found["val"]["loss"] == pytest.approx(result.val_loss, rel=1e-5)
    assert found["val/web"]["data"] == f"web in {corpora / 'web'}"
    losses_of = [found[f"val/{name}"]["loss"] for name in SIZES]
    assert found["val"]["loss"] == pytest.approx(np.mean(losses_of), rel=1e-6)


def test_looking_at_a_glob_over_folders(corpora: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for arguments, code, said in (
        (["verify", str(corpora)], 0, "web train: 3 shards"),
        (["show", str(corpora), "--step", "1"], 2, "type gpt2 data order --data_root"),
    ):
        monkeypatch.setattr("sys.argv", ["gpt2 data", *arguments])
        assert data_command.data_main() == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_shards_of_a_glob_have_the_tokenizer_of_their_manifest(tmp_path: Path):
    tokenizer = tokenizer_files.parse(small_tokenizers.trained(), "tok")
    prepare.prepare(SMALL_CORPUS, tmp_path / "data", workers=1, tokenizer=tokenizer)
    index = load_index(Storage(str(tmp_path / "data" / "*.npy")))
    assert index.tokenizer.identity == tokenizer.identity and not index.has_manifest


def test_doctor_names_each_corpus(corpora: Path, tmp_path: Path):
    data, found = doctor.find_data(mixed(corpora, tmp_path))
    assert data is not None and found.level == "ok"
    for name in SIZES:
        assert f"{name} in {corpora / name}: " in found.fact


def test_doctor_shows_the_weights_of_each_corpus_now_and_later(corpora: Path, tmp_path: Path):
    def shown(run: RunConfig) -> list[str]:
        data, _ = doctor.find_data(run)
        found = [*doctor.find_checkpoints(run, data)]
        assert [item.level for item in found] == ["ok"] * len(found)
        return [item.fact for item in found if item.what == "mixture"]

    run = mixed(corpora, tmp_path)
    sampler = sampling_of(run)[1].sampler
    read = np.concatenate([sampler.corpus_of(sampler.rows(step)[:, 0]) for step in range(16)])
    code, math, web = (np.bincount(read) / (73, 25, 118)).tolist()
    assert shown(run) == [
        "code: 30.0% of the rows now, 20.0% from step 8 on, 0.0% from step 12 on; 73 rows of 8 "
        f"tokens, {code:.2f} epochs in 16 steps",
        "math: 0.0% of the rows now, 30.0% from step 8 on, 100.0% from step 12 on; 25 rows of 8 "
        f"tokens, {math:.2f} epochs in 16 steps",
        "web: 70.0% of the rows now, 50.0% from step 8 on, 0.0% from step 12 on; 118 rows of 8 "
        f"tokens, {web:.2f} epochs in 16 steps",
    ]
    trainer.run(mixed(corpora, tmp_path), report=stop_at(9))
    first, *_ = shown(mixed(corpora, tmp_path, resume="latest"))
    assert first.startswith("code: 20.0% of the rows now, 0.0% from step 12 on; 73 rows")
    one = small_config(corpora / "web", tmp_path / "one", block_size=ROW)
    assert shown(one) == []
