"""A rank of a training in a situation that `gpu_runs.py` tests; not a bench by itself.

`python gpu_rank.py [situation] OPTIONS`: the options of `gpt2 train`, which runs in this process.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2.cli.train import train_main
from gpt2.distributed import device
from gpt2.train import trainer

FAILING_RANK = 1


def share_one_gpu() -> None:
    """All ranks compute on GPU 0, and exchange through gloo: NCCL refuses two ranks on a GPU."""
    start_group = dist.init_process_group

    def with_gloo(*_: object, device_id: object = None, **named: Any) -> None:
        start_group("gloo", **named)

    device.choose = lambda *_, **__: torch.device("cuda", 0)
    dist.init_process_group = with_gloo


def run_out_of_memory(replica: Any) -> None:
    """Makes the next step of this rank run out of memory; on the CPU it is simulated."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-5)
        return

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: simulated")

    replica.net = fail


def watch_steps(options: argparse.Namespace) -> None:
    """Makes the requested event happen at its step; writes down the rows of a micro-batch and the
    peak memory."""
    train_step, done = trainer.train_step, [0]
    is_failing = int(os.environ.get("RANK", "0")) == FAILING_RANK

    def watched(replica: Any, micro_batches: Any, *rest: Any, **named: Any) -> Any:
        done[0] += 1
        if done[0] == options.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if done[0] == options.kill_at and is_failing:
            os.kill(os.getpid(), signal.SIGKILL)
        if done[0] == options.out_of_memory_at and is_failing:
            run_out_of_memory(replica)
        update = train_step(replica, micro_batches, *rest, **named)
        if options.notes is not None:
            on_cuda = torch.cuda.is_available()
            peak_gb = torch.cuda.max_memory_reserved() / 1e9 if on_cuda else None
            rows = len(micro_batches[0][0])
            options.notes.write_text(json.dumps({"rows": rows, "peak_gb": peak_gb}))
        return update

    trainer.train_step = watched


def main() -> int:
    parser = argparse.ArgumentParser(description="A situation for a rank.", allow_abbrev=False)
    parser.add_argument("--share_gpu", action="store_true")
    parser.add_argument("--memory_gb", type=float, help="all that this process may use of the GPU")
    parser.add_argument("--stop_at", type=int, help="SIGTERM before this step of the process")
    parser.add_argument("--kill_at", type=int, help="SIGKILL of rank 1 there")
    parser.add_argument("--out_of_memory_at", type=int, help="rank 1 has no memory from there on")
    parser.add_argument("--notes", type=Path, help="a file for rows and peak memory")
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    if torch.cuda.is_available():
        if options.share_gpu:
            share_one_gpu()
        if options.memory_gb is not None:
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gb * 1e9 / total))
    watch_steps(options)
    return train_main()


if __name__ == "__main__":
    sys.exit(main())
