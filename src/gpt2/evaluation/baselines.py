"""Published results of GPT-2 124M, to compare a model with. Pure."""

from typing import Literal

PromptStyle = Literal["completion", "harness"]
"""text of HellaSwag's tasks (see evaluation.hellaswag)"""
# acc and acc_norm on the 10,042 tasks of the validation split: completion from Karpathy's
# build-nanogpt, harness from lm-evaluation-harness.
HELLASWAG: dict[PromptStyle, tuple[float, float]] = {
    "completion": (0.2859, 0.2955),
    "harness": (0.2892, 0.3114),
}
# Nats per token on a validation shard, by corpus: from build-nanogpt (play.ipynb) and llm.c
# (dev/vislog.ipynb), both by Karpathy. They do not apply to other text.
LOSS: dict[str, float] = {"fineweb_edu": 3.2924, "fineweb": 3.4250}
