"""Each rank computes its gradients of a step in two micro-batches: `gradient_ranks.py OUT FLAG…`.

It saves them, the mean of all ranks, for `--grad_dtype` float32 and bfloat16, and the bytes that
were sent for them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2.cli import train
from gpt2.config import options
from gpt2.distributed import rendezvous
from gpt2.train.replica import Replica


def main() -> None:
    out, *flags = sys.argv[1:]
    run = train.parse_train(flags).run
    with rendezvous.join(run.machine) as world:
        found = {}
        for dtype in ("float32", "bfloat16"):
            replica = Replica(options.overlay(run, {"grad_dtype": dtype, "dropout": 0}), world)
            hook_bytes = counted_bytes(replica)
            for number in range(2):
                torch.manual_seed(2 * world.rank + number)
                tokens_BT = torch.randint(100, (2, run.model.block_size))
                with replica.exchanging_gradients(is_last=number == 1):
                    replica.losses(tokens_BT, tokens_BT.clone())[0].backward()
            gradients = {name: part.grad for name, part in replica.model.named_parameters()}
            found[dtype] = {"gradients": gradients, "bytes": sum(hook_bytes)}
        torch.save(found, Path(out) / f"rank{world.rank}.pt")


def counted_bytes(replica: Replica) -> list[int]:
    """The bytes of each `all_reduce` from now on; those of DDP without a hook are in C++, and have
    those of the gradients."""
    sent: list[int] = []
    if replica.config.machine.grad_dtype == "float32":
        return [4 * sum(part.numel() for part in replica.model.parameters())]
    exchange = dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: object, **named: object) -> object:
        sent.append(tensor.nbytes)
        return exchange(tensor, *arguments, **named)

    dist.all_reduce = counting
    return sent


if __name__ == "__main__":
    main()
