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


def test_colons_and_brackets_stay_as_they_are(capsys: pytest.CaptureFixture[str]):
    """Rich would print :boom: as an emoji, and take [red] for a style."""
    words = "odd:boom: [red] 3"
    table = text.fitted(words, ["job", ":key:"], [[words, ":fire:"]], 80, elastic="job")
    out = text.console()
    out.print(words)
    out.print(table)
    printed = capsys.readouterr().out
    assert printed.count(words) == 3
    assert ":key:" in printed and ":fire:" in printed
