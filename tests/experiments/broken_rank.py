"""A rank of a hosted training, where rank 1 raises an error at the eighth step."""

import sys
from typing import Any

from gpt2.distributed import rendezvous
from gpt2.experiments.training import ddp_host, ddp_rank, training_job
from gpt2.train import trainer


def run(report: Any, **work: Any) -> dict[str, Any]:
    """The job: a training whose ranks are this file."""
    ddp_host.RANK_MODULE = "experiments.broken_rank"
    return training_job.run(report, **work)


if __name__ == "__main__":
    train_step = trainer.train_step
    steps = iter(range(8))

    def breaks(*given: Any) -> Any:
        if rendezvous.env_rank()[0] == 1 and next(steps) == 7:
            raise RuntimeError("CUDA error: the bug")
        return train_step(*given)

    trainer.train_step = breaks
    sys.exit(ddp_rank.main(sys.argv[1]))
