import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.base.errors import ConfigError
from gpt2.experiments import grid


def test_grid_values_have_the_types_that_they_look_like():
    parsed = grid.parse_grid(
        ["learning-rate=1e-3,3e-4", "n_layer=2,4", "bias=true,False", "x=a,None"]
    )
    assert parsed == {
        "learning_rate": [1e-3, 3e-4],
        "n_layer": [2, 4],
        "bias": [True, False],
        "x": ["a", None],
    }


def test_only_usual_spellings_are_numbers():
    texts = [
        "007",
        "1_0",
        "+1",
        "0x1",
        "1e",
        "1.2.3",
        "\N{FULLWIDTH DIGIT TWO}",
        "null",
        "-",
        "1e1_0",
    ]
    assert grid.parse_grid([f"a={','.join(texts)}"]) == {"a": texts}
    numbers = {"0": 0, "-3": -3, "0.10": 0.1, ".5": 0.5, "5.": 5.0, "1E-5": 1e-5, "-2e3": -2000.0}
    (parsed,) = grid.parse_grid([f"a={','.join(numbers)}"]).values()
    assert parsed == [*numbers.values()]
    assert [type(value) for value in parsed] == [type(value) for value in numbers.values()]


def test_the_values_of_a_text_are_as_they_were_typed():
    parsed = grid.parse_grid(["a=7,007,1_0,True,None,1e3", "b=7"], {"a"})
    assert parsed == {"a": ["7", "007", "1_0", "True", "None", "1e3"], "b": [7]}


def test_1_and_true_are_two_values():
    assert grid.parse_grid(["a=1,True"]) == {"a": [1, True]}
    with pytest.raises(ConfigError, match="duplicate"):
        grid.parse_grid(["a=1,1.0"])


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "-nan", "inf", "+Infinity", "-inf", "1e400", "-1e999", "1" + 5000 * "0"]
)
def test_what_is_not_finite_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"--grid x=1.*: expected a finite number, got "):
        grid.parse_grid([f"x=1,{text}"])


@pytest.mark.parametrize("items", [["n_layer"], ["=2"], ["a=1,"], ["a="], ["../b=1"]])
def test_invalid_grids_are_refused(items: list[str]):
    with pytest.raises(ConfigError, match="--grid"):
        grid.parse_grid(items)


@pytest.mark.parametrize("items", [["a=1,2,2"], ["a=1", "a=2"]])
def test_duplicates_in_a_grid_are_refused(items: list[str]):
    with pytest.raises(ConfigError, match=f"--grid {items[-1]}: duplicate name or value"):
        grid.parse_grid(items)


def test_points_are_all_combinations():
    assert grid.points({}) == [{}]
    assert grid.points({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_names_of_points_say_what_they_are():
    assert grid.point_name({"learning_rate": 0.001, "n_layer": 2}) == (
        "learning_rate=0.001,n_layer=2"
    )
    assert grid.point_name({}) == ""


@given(st.dictionaries(st.from_regex(r"[a-z_]\w*", fullmatch=True), st.text()))
def test_job_names_are_safe_as_names_of_files(point: dict[str, str]):
    name = grid.point_name(point)
    assert "/" not in name and "\0" not in name and name.isascii() and not name.startswith(".")
