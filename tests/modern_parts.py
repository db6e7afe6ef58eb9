"""All parts of the architecture `modern`."""

from typing import Any

PARTS: dict[str, Any] = {
    "zero_init": True,
    "untied_head": True,
    "logit_softcap": 5.0,
    "value_embeddings": True,
    "embedding_skip": True,
    "layer_skip": True,
    "sliding_window": 3,
}
