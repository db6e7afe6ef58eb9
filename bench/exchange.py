"""When and how much gradient is exchanged: `python bench/exchange.py`

On two ranks of the CPU (gloo), GPT-2 124M with one short row: for each bucket of gradients that DDP
exchanges, its bytes and the moment at which its exchange begins, as a share of the time of the
backward pass. What begins at 100 % overlaps with nothing.

Shapes: B rows, T time.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from gpt2 import model
from gpt2.config import options, presets
from gpt2.distributed import gradient_exchange

RANKS = 2


@dataclass(frozen=True)
class Way:
    name: str
    preset: str = "gpt2-124m"
    bucket_mb: int | None = None
    is_half: bool = False
    backend: str | None = None
    divides_graphs: bool = True


WAYS = (
    Way("eager"),
    Way("eager, buckets of 5 MB", bucket_mb=5),
    Way("eager, buckets of 100 MB", bucket_mb=100),
    Way("eager, bfloat16", is_half=True),
    Way("aot_eager", backend="aot_eager"),
    Way("aot_eager, graphs not divided", backend="aot_eager", divides_graphs=False),
    Way("eager, fast-124m", preset="fast-124m"),
)


def measured(way: Way, length: int) -> Iterator[str]:
    run = options.overlay(presets.preset(way.preset), {"vocab_size": 50304})
    torch._dynamo.config.optimize_ddp = way.divides_graphs
    torch.compiler.reset()
    torch.manual_seed(0)
    net: nn.Module = model.build(run.model)
    graphs: list[int] = []
    if way.backend:
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(way.backend)

        def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            graphs.append(len(inputs))
            return inner(graph, inputs)

        net = torch.compile(net, dynamic=False, backend=counting)
    caps = {} if way.bucket_mb is None else {"bucket_cap_mb": way.bucket_mb}
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True, **caps)
    hook = gradient_exchange.in_bfloat16 if way.is_half else default_hooks.allreduce_hook
    begun: list[tuple[float, int]] = []
    """time, and bytes that are sent, of each bucket"""

    def noting(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        begun.append((time.perf_counter(), bucket.buffer().numel() * (2 if way.is_half else 4)))
        return hook(group, bucket)

    ddp.register_comm_hook(dist.group.WORLD, noting)
    tokens_BT = torch.randint(50257, (1, length))
    for _ in range(3):  # the buckets are laid out anew after the first
        loss = ddp(tokens_BT, tokens_BT.clone())
        begun.clear()
        dist.barrier()
        started = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        ddp.zero_grad(set_to_none=True)
    last = begun[-1][0] - started
    sent = sum(size for _, size in begun)
    yield f"{way.name}: {len(begun)} buckets, {sent / 1e6:.0f} MB sent" + (
        f", {len(graphs)} graphs" if way.backend else ""
    )
    yield f"  backward pass and exchange {ended - started:.2f} s, last bucket at {last:.2f} s"
    for moment, size in begun:
        yield f"  {(moment - started) / last:5.0%}  {size / 1e6:6.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.rank:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command = [sys.executable, *launcher, __file__, "--rank", "--length", str(given.length)]
        raise SystemExit(subprocess.run(command).returncode)
    dist.init_process_group("gloo")
    for way in WAYS:
        for line in measured(way, given.length):
            if dist.get_rank() == 0:
                print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
