"""A user's function, as Python has it, and as a worker imports and calls it."""

import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.experiments.pool import worker
from gpt2.experiments.pool.messages import json_ready

TEXT = (str, "str")
OPTIONAL_TEXT = (str | None, "str | None", "None | str", "Optional[str]", "typing.Optional[str]")
"""annotations of parameters; strings under `from __future__ import annotations`"""


@dataclass(frozen=True)
class Call:
    """A function, and the keyword arguments that every call of it has."""

    target: str
    """`module:function`, as a worker imports it"""
    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[..., Any] | str) -> "Call":
        """Of a function, of `functools.partial` of one, or of `module:function`.

        Raises ConfigError for what another process cannot import: a lambda, a method, a function
        inside another one.
        """
        if isinstance(function, str):
            return cls(function, worker.find_function(function))
        kwargs: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            if function.args:
                raise ConfigError(f"{function}: expected a partial with keyword arguments only")
            kwargs = {**function.keywords, **kwargs}
            function = function.func
        name = getattr(function, "__qualname__", "")
        if not name.isidentifier():
            raise ConfigError(
                f"{name or function} cannot be imported by another process; expected a function at "
                "the top level of a module"
            )
        return cls(f"{_module(function)}:{name}", function, plain(kwargs))

    def annotated(self, annotations: Container[Any]) -> set[str]:
        """The parameters that have one of these annotations, such as TEXT."""
        parameters = self._parameters().values()
        return {item.name for item in parameters if item.annotation in annotations}

    def require(self, names: Iterable[str]) -> None:
        """Raises ConfigError if the function cannot be called with these arguments added."""
        parameters, given = self._parameters(), [*names]
        filled = dict.fromkeys([*self.kwargs, *given, *({"report"} & set(parameters))])
        try:
            inspect.signature(self.function).bind(**filled)
        except TypeError as error:
            raise ConfigError(
                f"{self.target} cannot be called with {', '.join(given) or 'nothing'}: {error}"
            ) from error

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.function).parameters
        except ValueError as error:
            raise ConfigError(f"{self.target}: {error}; wrap it in a function") from error


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as another process receives them; raises ConfigError for what JSON cannot hold."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = json_ready(value, strict=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}: {error}; expected finite numbers, strings, and lists and dicts of them"
            ) from error
    return found


def _module(function: Callable[..., Any]) -> str:
    """The name by which a worker imports the function's module; for a script, that of its file,
    whose folder comes first in Python's search path."""
    if function.__module__ != "__main__":
        return function.__module__
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):  # python -m package.module
        return str(spec.name)
    if file := getattr(main, "__file__", None):
        return Path(file).stem
    raise ConfigError(
        f"{function.__qualname__} must be defined in a file, from which other processes import it"
    )
