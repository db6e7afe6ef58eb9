"""A hosted training where rank 1 raises an error at the eighth step."""

from typing import Any

from gpt2.distributed import rendezvous
from gpt2.experiments.pool.job import Job
from gpt2.experiments.training import ddp, training_job
from gpt2.train import trainer


def run(report: Any, ranks: int, **work: Any) -> Any:
    """The job of the host."""
    return ddp.run_on_ranks(report, Job("broken", f"{__name__}:run_rank", work), ranks)


def run_rank(report: Any, **work: Any) -> dict[str, Any]:
    train_step = trainer.train_step
    steps = iter(range(8))

    def breaks(*given: Any) -> Any:
        if rendezvous.env_rank()[0] == 1 and next(steps) == 7:
            raise RuntimeError("CUDA error: the bug")
        return train_step(*given)

    trainer.train_step = breaks
    return training_job.run_rank(report, **work)
