"""Addresses of storage and databases without what is secret in them. Pure."""

import re
from typing import Any

ADDRESS = re.compile(r"(?<![\w+.-])[\w+.-]++://\S+")
USER_PART = re.compile(r"(?<=://)(?!user:password@)(?:[^\s/@?#]*:\S*|[^\s/@?#]*)@")
"""up to the last @: a password that is typed as it is may have / and @ in it, too; that of the
example in messages is none"""
WORD = re.compile(r"\S+")
USER = re.compile(r"(?<=://)[^\s/@?#:]+:(?!\d*(?:[\s/?#]|$))")
"""with a colon, but not a host with its port"""
WORDS_OF_PASSWORD = re.compile(r"[^\S\n](?:(?!://)[^\n@])*@")
"""what follows the first word of a user part whose password has spaces, which end an address"""
QUERY_VALUE = re.compile(
    r"(?<=[?&;#])([\w.%~\[\]-]+=)[^&;\s'\"]+?(?=(?::[\d.]*)?(?:[&;,)\s'\"]|$))"
)
"""without the weight of a corpus, as in `web=http://host/data?key=secret:0.5`"""


def without_secrets(text: str) -> str:
    """`text`; addresses in it without users, passwords and the values of queries (tokens and
    signatures): `s3://…@host/data?key=…`. Globs and local paths stay as they are."""
    if "://" not in text:
        return text
    return ADDRESS.sub(lambda found: _shown(found[0]), _without_passwords_of_words(text))


def public(value: Any) -> Any:
    """`value` with `without_secrets` of each text in it; dicts and lists may be nested."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def has_secret(address: str) -> bool:
    """Whether an address has something secret, or had it before `without_secrets`."""
    shown = without_secrets(address)
    return shown != address or "://…@" in shown or "=…" in shown


def _without_passwords_of_words(text: str) -> str:
    """`text` without user parts whose password has spaces."""
    shown, end = list[str](), 0
    for word in WORD.finditer(text):
        start = max(word.start(), end, text.rfind("@", *word.span()) + 1)
        user = USER.search(text, start, word.end())
        if user and (rest := WORDS_OF_PASSWORD.match(text, word.end())):
            shown += [text[end : user.start()], "…@"]
            end = rest.end()
    return "".join([*shown, text[end:]])


def _shown(address: str) -> str:
    # No user part ends after the last @; the expression would look for one at each "://".
    before, at, after = address.rpartition("@")
    return QUERY_VALUE.sub(r"\1…", USER_PART.sub("…@", before + at) + after)
