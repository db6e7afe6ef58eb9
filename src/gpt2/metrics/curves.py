"""The names of the curves that TensorBoard and W&B draw."""

from gpt2.metrics.records import HellaSwagRecord, Record, StepRecord, ValidationRecord


def points_of(record: Record) -> dict[str, float]:
    """The value of each curve at the record's step; empty for samples and events."""
    match record:
        case StepRecord():
            return {
                "loss/train": record.loss,
                "train/learning_rate": record.learning_rate,
                "train/grad_norm": record.grad_norm,
                "train/epoch": record.epoch,
                "speed/tokens_per_s": record.tokens_per_s,
                "speed/step_ms": record.elapsed_s * 1000,
                "speed/mfu": record.mfu,
                **{f"gpu/{name}": value for name, value in record.gpu.items()},
            }
        case ValidationRecord():
            return {"loss/val": record.loss}
        case HellaSwagRecord():
            return {"hellaswag/acc": record.acc, "hellaswag/acc_norm": record.acc_norm}
        case _:
            return {}
