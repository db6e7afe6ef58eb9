"""What GPT-2 124M reaches, as others have measured it, to compare one's own model with. Pure."""

from typing import Literal

Style = Literal["completion", "harness"]
"""how HellaSwag's tasks are put (see evaluation.hellaswag)"""
# acc and acc_norm on the 10,042 tasks of the validation split: completion from Karpathy's
# build-nanogpt, harness from lm-evaluation-harness.
HELLASWAG: dict[Style, tuple[float, float]] = {
    "completion": (0.2859, 0.2955),
    "harness": (0.2892, 0.3114),
}
# Nats per token on a validation shard, by corpus: from build-nanogpt (play.ipynb) and llm.c
# (dev/vislog.ipynb), both of Karpathy. On other text they say nothing.
LOSS: dict[str, float] = {"fineweb_edu": 3.2924, "fineweb": 3.4250}
