import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.base.errors import ConfigError
from gpt2.data.batch_ramp import BatchRamp, RampPhase, ramp_of
from gpt2.train.state import TrainState

RAMP = ramp_of(["3:16", "7:40"], total_batch_size=64, block_size=8)
SIZES = [2] * 3 + [5] * 4 + [8] * 93
"""rows of the first 100 steps"""


def test_phases_are_what_their_texts_say():
    assert BatchRamp(8, (RampPhase(3, 2), RampPhase(7, 5))) == RAMP
    assert [RAMP.rows_of(step) for step in range(100)] == SIZES
    assert ramp_of([], 64, 8) == BatchRamp(8)


def test_rows_are_counted_step_by_step():
    reading = [step for step, size in enumerate(SIZES) for _ in range(size)]
    assert [RAMP.step_of(row) for row in range(len(reading))] == reading
    assert [RAMP.rows_before(step) for step in range(101)] == [
        sum(SIZES[:step]) for step in range(101)
    ]
    for rows in range(200):
        steps = RAMP.steps_for(rows)
        assert sum(SIZES[:steps]) >= rows and (steps == 0 or sum(SIZES[: steps - 1]) < rows)


@given(
    rows=st.integers(1, 10**9),
    step=st.integers(0, 10**12),
    count=st.integers(0, 10**30),
)
def test_without_phases_it_multiplies(rows: int, step: int, count: int):
    ramp = BatchRamp(rows)
    assert (ramp.rows_of(step), ramp.rows_before(step)) == (rows, step * rows)
    assert (ramp.steps_for(count), ramp.step_of(count)) == (-(-count // rows), count // rows)


@given(first=st.integers(0, 20), count=st.integers(1, 9), step=st.integers(0, 40))
def test_rows_that_are_left_out_after_a_divergence_do_not_count(first: int, count: int, step: int):
    state = TrainState(left_out=(first, count))
    trained = sum(SIZES[state.data_step(before)] for before in range(step))
    assert state.rows_until(step, RAMP) == trained
    assert TrainState().rows_until(step, RAMP) == sum(SIZES[:step])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["200"], "expected STEP:TOKENS, got '200'; use for example"),
        (["3:16 7:40"], "expected STEP:TOKENS, got '3:16 7:40'"),
        (["0:16"], "expected STEP:TOKENS, got '0:16'"),
        (["-3:16"], "expected STEP:TOKENS"),
        (["3:1e3"], "expected STEP:TOKENS"),
        (["03:16"], "expected STEP:TOKENS"),
        (["3:20"], "20 tokens are not a multiple of block_size=8; nearest: 16 or 24"),
        (["7:16", "3:40"], "3:40 does not ascend; expected STEP:TOKENS with a step after 7"),
        (["3:40", "7:16"], "7:16 does not ascend; .* more than 40 tokens, less than"),
        (["3:64"], "3:64 does not ascend; .* less than total_batch_size=64"),
        (["9999999999999:16"], "does not ascend; .* 1000000000000 at most"),
    ],
)
def test_what_is_no_ramp_is_refused(texts: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        ramp_of(texts, total_batch_size=64, block_size=8)
