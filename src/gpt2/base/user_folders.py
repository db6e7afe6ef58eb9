"""Folders of this user: for configuration and for caches, as the XDG Base Directory
Specification names them."""

import os
from pathlib import Path

OWN = "gpt2-from-scratch"


def config() -> Path | None:
    """This package's folder for configuration, which may not exist; None without a home."""
    return _own("XDG_CONFIG_HOME", ".config")


def cache() -> Path | None:
    """This package's folder for caches, which may not exist; None without a home."""
    return _own("XDG_CACHE_HOME", ".cache")


def _own(variable: str, default: str) -> Path | None:
    """This package's folder below the one that `variable` names, else below `default` at home.

    Relative paths are not used: keys and compiled code would come from the current folder, which
    may be another user's.
    """
    folder = Path(os.environ.get(variable, ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / default
        except RuntimeError:
            return None
    return folder / OWN if folder.is_absolute() else None
