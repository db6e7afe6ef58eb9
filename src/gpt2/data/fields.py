"""Which field of a record, or column of a table, has the text. Pure."""

import logging
from collections.abc import Sequence

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError

logger = logging.getLogger(__name__)

USUAL = ("text", "content", "raw_content", "body", "document", "article", "story", "code")
"""where a corpus usually has its text; the first that a file has is taken"""
MOST_NAMES = 12
"""fields that a message lists"""


def choose(names: Sequence[str], wanted: str | None, source: str) -> str:
    """`wanted`, or the usual name of the field with the text; raises DataError without one."""
    lowered = {name.lower(): name for name in reversed(names)}
    usual = [lowered[name] for name in USUAL if name in lowered]
    if wanted in names or (wanted is None and usual):
        return wanted or usual[0]
    if wanted is None and len(names) == 1:
        logger.warning(
            "%s: its only field, '%.40s', is taken for the text", source, printable(names[0])
        )
        return names[0]
    missing = f"field {wanted!r}" if wanted else f"field {', '.join(USUAL[:3])} or the like"
    raise DataError(f"{source} has no {missing}; choose one of {listed(names)} with --text_field")


def column(names: Sequence[str], field: str, source: str) -> int:
    """The number of the column with the text. Raises DataError if it is missing, or not alone."""
    count = names.count(field)
    if not count:
        raise DataError(f"{source} has no column {field!r}; it has {listed(names)}")
    if count > 1:
        raise DataError(f"{source} has {count} columns {field!r}; rename those without the text")
    return names.index(field)


def instead(names: Sequence[str]) -> str:
    """The end of a message about a field that does not hold text: the way out by those that do."""
    return f", or choose one of {listed(names)} with --text_field" if names else ""


def listed(names: Sequence[str]) -> str:
    """The first names of fields, each shortened: in a file without names they are texts."""
    shown = [printable(f"{name:.40}") for name in names[:MOST_NAMES]]
    return ", ".join([*shown, "…"] if len(names) > MOST_NAMES else shown)
