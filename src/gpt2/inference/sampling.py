"""Options of sampling: the flags, their defaults and their limits. Pure.

Invalid values raise ConfigError.
"""

from dataclasses import dataclass

from gpt2.base.errors import ConfigError
from gpt2.base.validation import LARGEST, require_within


@dataclass(frozen=True)
class Sampling:
    """How many texts are sampled, and how each token is chosen."""

    num_samples: int = 1
    """number of continuations, sampled as one batch"""
    max_new_tokens: int = 100
    """at most so many tokens each; <|endoftext|> ends a text earlier"""
    temperature: float = 0.8
    """below 1, likely tokens become likelier; 0 always takes the likeliest"""
    top_k: int | None = 50
    """choose among the K likeliest tokens; None is off"""
    top_p: float | None = None
    """then among the fewest likeliest tokens with this total probability, after temperature"""

    def __post_init__(self) -> None:
        require_within(self, 1, 10**6, "num_samples")
        require_within(self, 1, LARGEST, "max_new_tokens", "top_k")
        require_within(self, 0, 100, "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p={self.top_p} is invalid; expected more than 0 and at most 1, or None (off)"
            )
