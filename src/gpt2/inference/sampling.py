"""How text is drawn from a model: the flags, their defaults and their limits. Pure.

Values that cannot work raise ConfigError.
"""

from dataclasses import dataclass

from gpt2.base.errors import ConfigError
from gpt2.base.validation import require_at_least


@dataclass(frozen=True)
class Sampling:
    """What is drawn, and how each token is chosen."""

    num_samples: int = 1
    """how many continuations, made side by side"""
    max_new_tokens: int = 100
    """tokens of each, at most; the end of the document ends it earlier"""
    temperature: float = 0.8
    """below 1 likely tokens become likelier; 0 takes the likeliest"""
    top_k: int | None = 50
    """choose among this many likeliest tokens; None is off"""
    top_p: float | None = None
    """then among the fewest likeliest that have this probability together, after temperature"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} must be 0 (the likeliest token) or a number above"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be more than 0 and at most 1; None is off")
