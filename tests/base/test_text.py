from pathlib import Path

import pytest

from gpt2.base import text


@pytest.mark.parametrize("place", ["logs/log.txt", Path("/long" + "x" * 4000)])
def test_a_reason_is_one_short_line_with_the_place_of_the_whole(place: object):
    assert text.brief("CUDA error:\n  it \x1b[31mfailed", place) == "CUDA error: it [31mfailed"
    assert text.brief("x" * 300, place) == "x" * 300
    line = text.brief("word\n" * 100, place)
    assert len(line) <= text.LONGEST_REASON and line.startswith("word word ")
    assert line.endswith(f"… (whole in {place})" if len(str(place)) < 99 else ")")
