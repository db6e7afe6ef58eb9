import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import config
from gpt2.errors import ConfigError
from gpt2.experiments import space

RUN = config.preset("demo")
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
"""


def test_a_space_is_read():
    found = {item.name: item for item in space.parse(MIXED, RUN, "space.toml")}
    assert found["learning_rate"].log and not found["learning_rate"].is_whole
    assert list(found["n_layer"].values() or ()) == [2, 4, 6]
    assert found["grad_clip"].choices == (1.0, None)
    assert str(found["learning_rate"]) == "0.0001 to 0.01, log"


@given(
    heads=st.sampled_from([2, 3, 8]),
    width=st.sampled_from(range(48, 97, 8)),
    batch=st.integers(512, 4000),
    modern=st.booleans(),
)
def test_every_draw_gives_a_model_of_values_of_the_space(
    heads: int, width: int, batch: int, modern: bool
):
    run = config.overlay(RUN, {"architecture": "modern" if modern else "gpt2"})
    drawn = {"n_head": heads, "n_embd": width, "total_batch_size": batch}
    found = space.fitted(run, space.parse(MIXED, run, "space.toml"), drawn)
    assert found.model.n_head in (2, 3, 8) and found.model.n_embd == width
    assert abs(found.data.total_batch_size - batch) <= RUN.model.block_size
    tokens = found.data.total_batch_size * (found.data.max_steps or 0)
    assert abs(tokens / (500 * 1024) - 1) < 0.01, "all trials see as many tokens"
    if width % heads == 0 and not modern:
        assert found.model.n_head == heads, "what fits is not changed"


def test_a_width_of_a_range_moves_to_the_nearest_that_fits():
    found = space.parse("[n_embd]\nlow = 31\nhigh = 64", RUN, "space.toml")
    assert space.fitted(RUN, found, {"n_embd": 31}).model.n_embd == 32
    assert space.fitted(RUN, found, {"n_embd": 63}).model.n_embd in (62, 64)


def test_validations_are_at_the_same_tokens():
    drawn = {"total_batch_size": 2048}
    found = space.fitted(RUN, space.default(RUN), drawn)
    assert (found.data.max_steps, found.evaluation.eval_interval) == (250, 50)
    searched = space.parse("[max_steps]\nlow = 10\nhigh = 20", RUN, "space.toml")
    assert space.fitted(RUN, searched, {"max_steps": 12}).data.max_steps == 12


@pytest.mark.parametrize("name", list(config.PRESETS))
def test_the_default_space_of_every_preset_fits(name: str):
    run = config.preset(name)
    found = space.default(run)
    assert len(found) == 8
    assert set(tomllib.loads(space.default_text(run))) == {item.name for item in found}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[learning_rat]\nlow = 1\nhigh = 2", "learning_rat; did you mean learning_rate"),
        ("[model.learning_rate]\nlow = 1\nhigh = 2", "unknown option model.learning_rate"),
        ("[learning_rate]\nlow = 1e-3\nhig = 1e-2", "unknown word hig; did you mean high"),
        ("[learning_rate]\nlow = 1e-3", "needed are low and high, or choices"),
        ("[learning_rate]\nlow = 2e-3\nhigh = 1e-3", "low=0.002 must be less than high=0.001"),
        ("[learning_rate]\nlow = 0\nhigh = 1", "learning_rate=0.0 must be more"),
        ("[weight_decay]\nlow = 0\nhigh = 1\nlog = true", "low=0 must be more than 0 with log"),
        ("[learning_rate]\nlow = inf\nhigh = 1", "needed is a finite number"),
        ("[beta2]\nlow = 0.9\nhigh = 1.5", "beta2=1.5 must be at least 0 and less than 1"),
        ("[n_layer]\nlow = 1.5\nhigh = 3", "low=1.5; needed is a whole number"),
        ("[n_layer]\nchoices = [2, 'x']", "n_layer='x' does not fit"),
        ("[n_layer]\nchoices = [2, 2]", "a choice stands there twice"),
        ("[n_layer]\nchoices = [2]\nlow = 3", "choices stand alone"),
        ("[shuffle]\nlow = 1\nhigh = 3", "shuffle has no range"),
        ("n_layer = 3", "needed is a table"),
        ("[checkpoint_dir]\nchoices = ['a', 'b']", "checkpoint_dir cannot be searched"),
        ("[n_embd]\nchoices = [32, 33]", "nothing in the space fits to n_embd=33"),
        ("[n_head]\nchoices = [3, 5]", "n_embd=64 is not a multiple of n_head=3"),
        ("[n_head]\nchoices = [2, 3]", "n_head=3 fits to no n_embd of the space"),
        ("", "it names no option"),
        ("[n_layer", "space.toml: "),
    ],
)
def test_mistakes_are_named(text: str, words: str):
    with pytest.raises(ConfigError) as caught:
        space.parse(text, RUN, "space.toml")
    assert words in str(caught.value) and str(caught.value).startswith("space.toml: ")


def test_differences_of_two_spaces():
    before = space.described(space.parse("[n_layer]\nlow = 2\nhigh = 3", RUN, ""))
    now = space.described(space.parse("[n_layer]\nlow = 2\nhigh = 4", RUN, ""))
    assert space.differences(before, now) == ["n_layer: 2 to 3 before, 2 to 4 now"]
    assert space.differences({}, now) == ["n_layer: not searched before, 2 to 4 now"]
