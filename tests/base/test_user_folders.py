from pathlib import Path

import pytest

from gpt2.base import user_folders


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CONFIG_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/gpt2-from-scratch"),
        ({"XDG_CONFIG_HOME": "", "HOME": "/home/me"}, "/home/me/.config/gpt2-from-scratch"),
        ({"XDG_CONFIG_HOME": "here", "HOME": "/home/me"}, "/home/me/.config/gpt2-from-scratch"),
        ({"XDG_CONFIG_HOME": "./here", "HOME": "."}, None),
        ({"XDG_CONFIG_HOME": "", "HOME": "me"}, None),
    ],
)
def test_relative_paths_are_not_used(monkeypatch, variables: dict[str, str], expected: str | None):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.replace("CONFIG", "CACHE"), value)
    assert user_folders.config() == (expected and Path(expected))
    cache = expected and Path(expected.replace(".config", ".cache"))
    assert user_folders.cache() == cache
