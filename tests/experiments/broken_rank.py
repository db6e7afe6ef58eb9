"""A rank of a hosted training, rank 1 of which has a bug that shows at the eighth step."""

import sys
from typing import Any

from gpt2.distributed import rendezvous
from gpt2.experiments.training import ddp_host, ddp_rank, training_job
from gpt2.train.learner import Learner


def run(report: Any, **work: Any) -> dict[str, Any]:
    """The job: a training whose ranks are this file."""
    ddp_host.RANK_MODULE = "experiments.broken_rank"
    return training_job.run(report, **work)


if __name__ == "__main__":
    begin = Learner.begin
    steps = iter(range(8))

    def breaks(self: Learner, *given: Any) -> Any:
        if rendezvous.env_rank()[0] == 1 and next(steps) == 7:
            raise RuntimeError("CUDA error: the bug")
        return begin(self, *given)

    Learner.begin = breaks  # type: ignore[method-assign]
    sys.exit(ddp_rank.main(sys.argv[1]))
