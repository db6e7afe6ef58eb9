"""Addresses of storage and databases without what is secret in them. Pure."""

import re
from typing import Any

ADDRESS = re.compile(r"[\w+.-]+://\S+")
USER_PART = re.compile(r"(?<=://)(?!user:password@)(?:[^\s/@?#]*:\S*|[^\s/@?#]*)@")
"""up to the last @: a password that is typed as it is may have / and @ in it, too; that of the
example in messages is none"""
WITH_SPACES = re.compile(
    r"(?<=://)[^\s/@?#:]+:(?!\d*(?:[\s/?#]|$))[^\s@]*[^\S\n](?:(?!://)[^\n@])*@"
)
"""a user part whose password has spaces, which ends the address otherwise; a host with its port is
none"""
QUERY_VALUE = re.compile(
    r"(?<=[?&;#])([\w.%~\[\]-]+=)[^&;\s'\"]+?(?=(?::[\d.]*)?(?:[&;,)\s'\"]|$))"
)
"""without the weight of a corpus, as in `web=http://host/data?key=secret:0.5`"""


def without_secrets(text: str) -> str:
    """`text`; addresses in it without users, passwords and the values of queries (tokens and
    signatures): `s3://…@host/data?key=…`. Globs and local paths stay as they are."""
    if "://" not in text:
        return text
    return ADDRESS.sub(lambda found: _shown(found[0]), WITH_SPACES.sub("…@", text))


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


def _shown(address: str) -> str:
    return QUERY_VALUE.sub(r"\1…", USER_PART.sub("…@", address))
