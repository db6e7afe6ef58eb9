"""The names of the curves that TensorBoard and W&B draw.

TensorBoard sorts groups, the names before the first `/`, by the alphabet, and unfolds the first
two. These are `loss` and `main`; what concerns single ranks and the machine comes after them.
"""

from collections.abc import Mapping

from gpt2.metrics.records import HellaSwagRecord, Record, StepRecord, ValidationRecord

FORMER = {
    "main/hellaswag": "hellaswag/acc_norm",
    "main/hellaswag_acc": "hellaswag/acc",
    "main/learning_rate": "train/learning_rate",
    "main/tokens_per_s": "speed/tokens_per_s",
    "rank_gpu/memory_gb/0": "gpu/memory_gb",
    "rank_gpu/peak_memory_gb/0": "gpu/peak_memory_gb",
    "rank_gpu/utilisation_percent/0": "gpu/utilisation_percent",
    "reference/hellaswag_gpt2_124m": "hellaswag/gpt2_124m",
    "reference/loss_gpt2_124m": "loss/gpt2_124m",
}
"""the names that some curves had in earlier versions; W&B, which unfolds all groups, keeps them"""


def points_of(record: Record) -> dict[str, float]:
    """The value of each curve at the record's step; empty for samples and events."""
    match record:
        case StepRecord():
            return {
                "loss/train": record.loss,
                **{f"loss/train/{name}": loss for name, loss in record.corpora.items()},
                "main/learning_rate": record.learning_rate,
                "main/tokens_per_s": record.tokens_per_s,
                "train/grad_norm": record.grad_norm,
                "train/epoch": record.epoch,
                **({} if record.loss_scale is None else {"train/loss_scale": record.loss_scale}),
                "speed/step_ms": record.elapsed_s * 1000,
                "speed/mfu": record.mfu,
                **{f"speed/rank_{rank}_ms": s * 1000 for rank, s in enumerate(record.rank_s)},
                **{
                    f"rank_gpu/{name}/{rank}": value
                    for rank, usage in enumerate(record.rank_gpu)
                    for name, value in usage.items()
                },
            }
        case ValidationRecord():
            points = {"loss/val": record.loss}
            if record.bits_per_byte is not None:
                points["loss/val_bits_per_byte"] = record.bits_per_byte
            for name, corpus in record.corpora.items():
                points[f"loss/val/{name}"] = corpus.loss
                if corpus.bits_per_byte is not None:
                    points[f"loss/val_bits_per_byte/{name}"] = corpus.bits_per_byte
            return points
        case HellaSwagRecord():
            return {
                "main/hellaswag": record.acc_norm,
                "main/hellaswag_acc": record.acc,
            }
        case _:
            return {}


def under_former_names(points: Mapping[str, float]) -> dict[str, float]:
    """The points under the names of earlier versions."""
    return {FORMER.get(name, name): value for name, value in points.items()}
