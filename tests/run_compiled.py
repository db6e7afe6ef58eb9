"""What torch.compile compiles in runs of training, without building kernels; also a script for
ranks: `DATA_ROOT OUT`, then values of options as `name=value`. It prints `rank R: frames F, graphs
G`, where DDP has divided F frames into G graphs. With `backend=NAME`, torch's backend of that name
compiles, which is not recorded.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2.base import log
from gpt2.train import trainer
from support import small_config

MOST_ROWS = 4
"""more rows than these do not fit into the memory"""


class RecordingBackend:
    """A backend that runs a graph as it is, and records it."""

    def __init__(self, most_rows: int = sys.maxsize) -> None:
        self._most_rows = most_rows
        self.shapes: list[tuple[int | torch.SymInt, ...]] = []
        """of the tokens, by graph that reads them"""
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        tokens = [
            part for part in inputs if isinstance(part, torch.Tensor) and part.dtype is torch.int64
        ]
        rows = 0
        if tokens:
            self.shapes.append(tuple(tokens[0].shape))
            rows = int(tokens[0].shape[0])

        def run(*arguments: Any) -> Any:
            if rows > self._most_rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*arguments)

        return run


def main(data_root: str, out: str, *values: str) -> None:
    rank = int(os.environ["RANK"])
    log.setup(rank=rank, info_stream="stdout")
    changes = dict(value.split("=") for value in values)
    numbers = {name: int(value) if value.isdigit() else value for name, value in changes.items()}
    backend = RecordingBackend(MOST_ROWS)
    of_torch = numbers.pop("backend", None)
    torch.compile = partial(torch.compile, backend=of_torch or backend)
    options = {"compile": "on", "auto_mini_batch": of_torch is None, **numbers}
    trainer.run(small_config(Path(data_root), Path(out), **options))
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"rank {rank}: frames {frames}, graphs {backend.graphs}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
