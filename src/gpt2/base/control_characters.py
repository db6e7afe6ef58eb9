"""Control characters, which would let the content of a file move a terminal's cursor, rename its
window or type into it. Pure."""

import re

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text` with control characters as `\\x1b`, except line breaks and tabs."""
    return CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def printable(path: object) -> str:
    """A file's name as one line: with escapes, in quotes, if it has characters such as a line
    break, or bytes that are not UTF-8."""
    name = str(path)
    return name if name.isprintable() else repr(name)
