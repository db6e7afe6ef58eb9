"""Event files as versions wrote them that had other names for some curves."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter, summary


def write(folder: Path, last: int) -> None:
    """Writes a run of `last` steps on one GPU, long ago."""
    with SummaryWriter(str(folder)) as writer:
        for part in summary.hparams({"n_layer": 12, "learning_rate": 1.0}, {"loss/val": 0.0}):
            writer.file_writer.add_summary(part)
        charts = {
            "loss": ["loss/train", "loss/val"],
            "HellaSwag": ["hellaswag/acc_norm", "hellaswag/acc"],
        }
        layout = {chart: ["Multiline", names] for chart, names in charts.items()}
        writer.add_custom_scalars({"Together": layout})
        writer.add_scalar("loss/val", 10.0, 0)
        for step in range(1, last + 1):
            writer.add_scalar("loss/train", 10.0 - step / last, step)
            writer.add_scalar("train/learning_rate", 1.0, step)
            writer.add_scalar("speed/tokens_per_s", 1.0, step)
            writer.add_scalar("speed/rank_0_ms", 1.0, step)
            writer.add_scalar("gpu/memory_gb", 1.0, step)
        writer.add_scalar("hellaswag/acc_norm", 0.25, last)
    (path,) = folder.iterdir()
    path.rename(folder / "events.out.tfevents.0000000001.ended")
