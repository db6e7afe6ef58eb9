"""How many lines or rows that cannot be read a corpus may have. Pure."""

import math

from gpt2.base.errors import DataError
from gpt2.base.text import counted

MAX_SHARE = 0.001
"""share of the lines that may be left out because they cannot be read"""
CLEARLY_WRONG = 100
"""bad lines after which a corpus is refused before its end, if they are more than the good ones"""


def require_few(bad: int, documents: int, example: str, max_share: float) -> None:
    """Raises DataError if more than that share of the lines cannot be read, such as `example`."""
    share = bad / max(1, bad + documents)
    if share > max_share and not documents:
        raise DataError(
            f"none of {counted(bad, 'line')} can be read, such as {example}; expected a record "
            "with a text in each"
        )
    if share > max_share:
        enough = math.ceil(share * 1000) / 1000
        raise DataError(
            f"{bad:,} of {bad + documents:,} lines cannot be read, such as {example}; mend them, "
            f"or leave them out by the same command with --max_bad_lines {enough:g} (now "
            f"{max_share:g})"
        )


def require_few_so_far(bad: int, documents: int, example: str, max_share: float) -> None:
    """As `require_few`, before the end: for a corpus that is clearly wrong."""
    if bad > (max(documents, CLEARLY_WRONG) if max_share else 0):
        require_few(bad, documents, example, max_share)
