import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.base.errors import ConfigError
from gpt2.cli import search
from gpt2.config import options, presets
from gpt2.experiments.search import space, spec

RUN = options.overlay(presets.preset("demo"), {"max_steps": 500, "eval_interval": 100})
MIXED = """
[optim.learning_rate]
low = 1e-4
high = 1e-2
log = true
[n_layer]
low = 2
high = 7
step = 2
[n_head]
choices = [2, 3, 8]
[n_embd]
low = 48
high = 96
step = 8
[total_batch_size]
low = 512
high = 4000
[grad_clip]
choices = [1.0, "None"]
[shuffle]
choices = ["none", "rows"]
"""
MIXED_SPACE = space.parse(MIXED, RUN, "space.toml")


def test_a_space_is_read():
    assert space.describe(MIXED_SPACE) == {
        "learning_rate": "0.0001 to 0.01, log",
        "n_layer": "2 to 6, step 2",
        "n_head": "2, 3, 8",
        "n_embd": "48 to 96, step 8",
        "total_batch_size": "512 to 4000",
        "grad_clip": "1.0, None",
        "shuffle": "none, rows",
    }
    assert MIXED_SPACE["shuffle"].choices == ("none", "rows")
    assert list(space.values(MIXED_SPACE["n_layer"]) or ()) == [2, 4, 6]


@given(
    heads=st.sampled_from([2, 3, 8]),
    width=st.sampled_from(range(48, 97, 8)),
    batch=st.integers(512, 4000),
    modern=st.booleans(),
)
def test_every_draw_gives_a_model_with_values_of_the_space(
    heads: int, width: int, batch: int, modern: bool
):
    run = options.overlay(RUN, {"architecture": "modern" if modern else "gpt2"})
    drawn = {"n_head": heads, "n_embd": width, "total_batch_size": batch}
    found = space.apply(run, MIXED_SPACE, drawn)
    assert found.model.n_head in (2, 3, 8) and found.model.n_embd == width
    assert abs(found.data.total_batch_size - batch) <= RUN.model.block_size
    tokens = found.data.total_batch_size * (found.data.max_steps or 0)
    assert abs(tokens / (500 * 1024) - 1) < 0.01, "all trials see as many tokens"
    if width % heads == 0 and not modern:
        assert found.model.n_head == heads, "what fits is not changed"


def test_a_width_of_a_range_becomes_the_nearest_that_fits():
    found = space.parse("[n_embd]\nlow = 31\nhigh = 64", RUN, "space.toml")
    assert space.apply(RUN, found, {"n_embd": 31}).model.n_embd == 32
    assert space.apply(RUN, found, {"n_embd": 63}).model.n_embd in (62, 64)


def test_validations_follow_the_same_numbers_of_tokens():
    drawn = {"total_batch_size": 2048}
    found = space.apply(RUN, space.default(RUN), drawn)
    assert (found.data.max_steps, found.evaluation.eval_interval) == (250, 50)
    searched = space.parse("[max_steps]\nlow = 10\nhigh = 20", RUN, "space.toml")
    assert space.apply(RUN, searched, {"max_steps": 12}).data.max_steps == 12


@given(
    rows=st.integers(1, 40),
    eval_batches=st.integers(1, 20),
    interval=st.integers(1, 40),
    data=st.data(),
)
def test_all_trials_validate_on_the_same_rows_after_the_same_tokens(
    rows: int, eval_batches: int, interval: int, data: st.DataObject
):
    asked = {"total_batch_size": rows * 128, "eval_batches": eval_batches}
    run = options.overlay(RUN, {**asked, "eval_interval": interval})
    found = space.default(run)
    drawn = {
        name: data.draw(st.sampled_from(space.values(found[name]) or ()))
        for name in ("n_head", "n_embd")
    }
    for batch in space.values(found["total_batch_size"]) or ():
        trial = space.apply(run, found, drawn | {"total_batch_size": batch})
        assert trial.eval_rows == run.eval_rows == eval_batches * rows
        every = trial.evaluation.eval_interval
        assert every and every * batch == interval * rows * 128


@given(batch=st.integers(128, 8000), block_size=st.sampled_from([32, 64, 128]))
def test_rows_of_validation_for_odd_batches(batch: int, block_size: int):
    text = "[total_batch_size]\nlow = 128\nhigh = 8000\n[block_size]\nchoices = [32, 64, 128]"
    found = space.parse(text, RUN, "space.toml")
    trial = space.apply(RUN, found, {"total_batch_size": batch, "block_size": block_size})
    assert trial.eval_rows == RUN.eval_rows * 128 // block_size
    tokens = (trial.evaluation.eval_interval or 0) * trial.data.total_batch_size
    assert abs(tokens / (100 * 1024) - 1) <= space.TOKEN_TOLERANCE


@pytest.mark.parametrize(
    ("interval", "text", "words"),
    [
        (5, "choices = [512, 2048]", "nearest: 4 or 6"),
        (1, "choices = [512, 2048]", "nearest: 2"),
        (100, "choices = [1024, 1536, 3584]", "nearest: 84 or 105"),
        (19, "low = 512\nhigh = 2048", "use at least 20"),
    ],
)
def test_validations_after_different_numbers_of_tokens_are_refused(
    interval: int, text: str, words: str
):
    run = options.overlay(RUN, {"eval_interval": interval})
    with pytest.raises(ConfigError, match=words):
        space.parse(f"[total_batch_size]\n{text}", run, "space.toml")


def test_a_ramp_belongs_to_one_batch_size():
    run = options.overlay(RUN, {"batch_ramp": ["10:512"]})
    assert "total_batch_size" not in space.default(run)
    for name in ("total_batch_size", "block_size"):
        with pytest.raises(ConfigError, match=f"{name} cannot be searched beside --batch_ramp"):
            space.parse(f"[{name}]\nchoices = [1024, 2048]", run, "space.toml")
    with pytest.raises(ConfigError, match="batch_ramp cannot be searched"):
        space.parse("[batch_ramp]\nchoices = ['10:512', '20:512']", RUN, "space.toml")


def test_a_batch_size_that_no_trial_uses_is_not_checked():
    text = "[total_batch_size]\nchoices = [1000, 1024]"
    assert space.parse(text, RUN, "space.toml")


def test_rates_of_the_default_space_are_those_of_the_optimizer():
    for optimizer, rates in (("adamw", "0.0001 to 0.01, log"), ("muon", "0.0004 to 0.04, log")):
        found = space.default(options.overlay(RUN, {"optimizer": optimizer}))
        assert space.describe(found)["learning_rate"] == rates


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_the_default_space_of_every_preset_fits(name: str):
    run = presets.preset(name)
    found = space.default(run)
    assert len(found) == 8
    assert set(tomllib.loads(space.default_text(run))) == set(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[learning_rat]\nlow = 1\nhigh = 2", "learning_rat; did you mean learning_rate"),
        ("[model.learning_rate]\nlow = 1\nhigh = 2", "unknown option model.learning_rate"),
        ("[learning_rate]\nlow = 1e-3\nhig = 1e-2\nhigh = 1", "choices alone, got low, hig, high"),
        (
            "[learning_rate]\nlow = 1e-3",
            "expected [learning_rate] with low, high and perhaps step or log, or with choices "
            "alone, got low",
        ),
        (
            "[learning_rate]\nlow = 2e-3\nhigh = 1e-3",
            "learning_rate: expected low <= high, got low=0.002, high=0.001",
        ),
        ("[learning_rate]\nlow = 0\nhigh = 1", "learning_rate=0.0 is invalid; expected more"),
        ("[weight_decay]\nlow = 0\nhigh = 1\nlog = true", "weight_decay: expected low above 0"),
        ("[beta2]\nlow = 0.1\nhigh = 0.9\nlog = 'no'", "expected true or false for log, got 'no'"),
        ("[n_layer]\nlow = 1\nhigh = 9\nlog = true\nstep = 2", "step or log = true, not both"),
        ("[n_layer]\nlow = 1\nhigh = 9\nstep = 0", "n_layer: expected a step above 0, got 0"),
        ("[n_layer]\nchoices = []", "expected a list of at least one value for choices, got []"),
        ("[n_layer]\nchoices = 4", "expected a list of at least one value for choices, got 4"),
        ("[n_layer]\nchoices = [[1]]", "n_layer: expected int, got [1]"),
        ("[learning_rate]\nlow = inf\nhigh = 1", "expected a number for low, got inf"),
        ("[beta2]\nlow = 0.9\nhigh = 1.5", "beta2=1.5 is invalid; expected 0 <= beta2 < 1"),
        ("[n_layer]\nlow = 1.5\nhigh = 3", "expected an integer for low, got 1.5"),
        ("[n_layer]\nchoices = [2, 'x']", "n_layer: expected int, got 'x'"),
        ("[n_layer]\nchoices = [2]\nlow = 3", "or with choices alone"),
        ("[shuffle]\nlow = 1\nhigh = 3", "shuffle has no range"),
        (
            "n_layer = 3",
            "low, high and perhaps step or log, or with choices alone, got 3",
        ),
        ("[checkpoint_dir]\nchoices = ['a', 'b']", "checkpoint_dir cannot be searched"),
        ("[trust_checkpoint]\nchoices = [true]", "trust_checkpoint cannot be searched"),
        ("[n_embd]\nchoices = [32, 33]", "no values of the space fit to n_embd=33"),
        ("[n_head]\nchoices = [3, 5]", "n_embd=64 is not a multiple of n_head=3"),
        ("[n_head]\nchoices = [2, 3]", "n_head=3 divides no n_embd of the space"),
        ("", "expected a table such as [learning_rate], got none"),
        ("[n_layer", "space.toml: "),
    ],
)
def test_mistakes_are_named(text: str, words: str):
    with pytest.raises(ConfigError) as caught:
        space.parse(text, RUN, "space.toml")
    assert words in str(caught.value) and str(caught.value).startswith("space.toml: ")


def test_differences_of_two_searches():
    """A space is its text, which an earlier version may have written with other decimals."""

    def fixed(rates: str, layers: str) -> dict[str, Any]:
        return {"seed": 1, "space": {"weight_decay": rates, "n_layer": layers}}

    now = fixed("0.0 to 0.9, step 0.3", "2 to 4")
    assert spec.differences(fixed("0 to 0.8999999999999999, step 0.3", "2 to 4, step 1"), now) == []
    assert spec.differences({"n_layer": 2, "space": {}}, now) == [
        "n_layer: 2 before, 2 to 4 now",
        "seed: None before, 1 now",
        "weight_decay: None before, 0 to 0.9, step 0.3 now",
    ]
    assert spec.differences(fixed("0 to 0.9, step 0.3", "2 to 4, step 10"), now) == [
        "n_layer: 2 to 4, step 10 before, 2 to 4 now"
    ]


def test_differences_are_real_ones_in_the_words_of_options():
    """With the same value, a single choice is none; nor is what the search derives from options."""
    plain: dict[str, Any] = {"n_head": 1, "n_layer": 2, "total_batch_size": 512, "space": {}}
    derived = {"tokens_per_step": 512, "eval_tokens": 1024}
    searched: dict[str, Any] = {
        **derived,
        "space": {
            "n_head": "1",
            "n_layer": "2, 3",
            "layer_skip": "False",
            "total_batch_size": "512, 1024",
        },
    }
    assert spec.differences(plain, searched) == [
        "n_layer: 2 before, 2, 3 now",
        "total_batch_size: 512 before, 512, 1024 now",
    ]
    assert spec.differences(searched, searched | {"tokens_per_step": 2048}) == [
        "tokens per step (--total_batch_size): 512 before, 2048 now"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xef\xbb\xbf[n_layer]\nchoices = [2]", ""), (b"# \xe4\n[n_layer]", "is not text in UTF-8")],
)
def test_encodings_of_the_space_file(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "space.toml"
    path.write_bytes(content)
    if words:
        with pytest.raises(ConfigError, match=f"--space {path} {words}"):
            search.read_space(path, RUN)
    else:
        assert space.describe(search.read_space(path, RUN)) == {"n_layer": "2"}


@pytest.mark.parametrize(
    ("low", "high", "step", "values"),
    [
        ("0.0", "0.3", "0.1", {0.0, 0.1, 0.2, 0.3}),
        ("0.1", "0.7", "0.2", {0.1, 0.3, 0.5, 0.7}),
        ("0.9", "0.95", "0.01", {0.9, 0.91, 0.92, 0.93, 0.94, 0.95}),
        ("1e-5", "8e-5", "1e-5", {1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 8e-5}),
        ("0", "0.35", "0.1", {0.0, 0.1, 0.2, 0.3}),
    ],
)
def test_a_range_with_steps_has_the_numbers_that_were_written(
    low: str, high: str, step: str, values: set[float]
):
    """In trials and in tables; without a warning, as all of them are errors here."""
    chosen = space.parse(f"dropout = {{low = {low}, high = {high}, step = {step}}}", RUN, "space")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask(), chosen)["dropout"] for _ in range(60)]
    assert set(drawn) == values
    used = [space.used_values(item)["dropout"] for item in study.get_trials()]
    assert used == drawn


def test_a_value_between_two_steps_stays():
    chosen = space.parse("dropout = {low = 0.1, high = 0.7, step = 0.2}", RUN, "space")
    assert space.exact(chosen["dropout"], 0.2) == 0.2
    assert space.exact(chosen["dropout"], 0.1 + 0.2) == 0.3
