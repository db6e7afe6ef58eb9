"""TensorBoard as a metrics sink."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.metrics.records import StepRecord


class TensorBoard:
    """Curves, samples and hyper-parameters of one run folder.

    After a resume, what an earlier process wrote beyond `step` is purged: the curves go on without
    an overlapping piece.
    """

    def __init__(
        self, folder: Path, hparams: dict[str, Any], step: int, references: dict[str, float]
    ) -> None:
        """`references` are constant curves, by name, to be drawn beside those that change."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and optional
        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        self._new_writer = functools.partial(SummaryWriter, str(folder))
        self._writer = self._new_writer(purge_step=step + 1 if step else None)
        if step == 0:
            # SummaryWriter.add_hparams would open a second run folder: write into this one.
            file_writer: Any = self._writer.file_writer
            for summary in hparams_summaries(_hparam_values(hparams), {"loss/val": 0.0}):  # type: ignore[no-untyped-call]
                file_writer.add_summary(summary)
        self._references = references
        self._writer.add_custom_scalars(_charts(references))

    def step(self, record: StepRecord, left_s: float | None) -> None:
        scalars = {
            "loss/train": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/epoch": record.epoch,
            "speed/tokens_per_s": record.tokens_per_s,
            "speed/step_ms": record.elapsed_s * 1000,
            "speed/mfu": record.mfu,
            **{f"speed/rank_{rank}_ms": time_s * 1000 for rank, time_s in enumerate(record.rank_s)},
            **{f"gpu/{name}": value for name, value in record.gpu.items()},
        }
        self._scalars(scalars, record.step)

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self._scalars({"loss/val": loss, **self._known("loss/")}, step)

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        values = {"hellaswag/acc": acc, "hellaswag/acc_norm": acc_norm}
        self._scalars(values | self._known("hellaswag/"), step)

    def samples(self, step: int, texts: list[str]) -> None:
        blocks = "\n\n".join(
            "\n".join(f"    {line}" for line in text.splitlines()) + "\n\n---" for text in texts
        )  # markdown: four spaces is verbatim
        self._tell(lambda writer: writer.add_text("samples", blocks, step))

    def message(self, text: str) -> None:
        pass

    def flush(self) -> None:
        self._tell(lambda writer: writer.flush())

    def close(self) -> None:
        self._tell(lambda writer: writer.close())

    def _known(self, group: str) -> dict[str, float]:
        return {name: value for name, value in self._references.items() if name.startswith(group)}

    def _scalars(self, values: dict[str, float], step: int) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._tell(add)

    def _tell(self, write: Callable[[Any], None]) -> None:
        try:
            write(self._writer)
        except OSError:  # its thread has ended for good: another file for what comes
            self._writer = self._new_writer()
            raise


def _charts(references: dict[str, float]) -> dict[str, Any]:
    """Charts of several curves, for TensorBoard's page of custom scalars."""
    curves = {
        "loss": ["loss/train", "loss/val"],
        "HellaSwag": ["hellaswag/acc_norm", "hellaswag/acc"],
    }
    for chart, names in curves.items():
        names += [name for name in references if name.startswith(chart.lower())]
    return {"Together": {chart: ["Multiline", names] for chart, names in curves.items()}}


def _hparam_values(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as flat values that TensorBoard takes."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _hparam_values(value)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
