"""TensorBoard as a metrics sink."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2.metrics.curves import points_of
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    StepRecord,
    ValidationRecord,
)


class TensorBoard:
    """Curves, samples and hyper-parameters of one run folder.

    After a resume, points after `step` that an earlier process wrote are purged, so that the curves
    do not overlap.
    """

    def __init__(
        self, folder: Path, hparams: dict[str, Any], step: int, references: dict[str, float]
    ) -> None:
        """`references` are the values of constant curves, by name."""
        from torch.utils.tensorboard import SummaryWriter, summary  # seconds to import

        self._new_writer = functools.partial(SummaryWriter, str(folder))
        self._writer = self._new_writer(purge_step=step + 1 if step else None)
        if step == 0:
            # SummaryWriter.add_hparams would open a second run folder: write into this one.
            file_writer: Any = self._writer.file_writer
            for part in summary.hparams(_hparam_values(hparams), {"loss/val": 0.0}):  # type: ignore[no-untyped-call]
                file_writer.add_summary(part)
        self._references = references
        self._writer.add_custom_scalars(_charts(references))

    def write(self, record: Record) -> None:
        match record:
            case EventRecord():
                pass
            case SamplesRecord(step, texts):
                self._call(lambda writer: writer.add_text("samples", _as_markdown(texts), step))
            case StepRecord():
                times = {f"speed/rank_{rank}_ms": s * 1000 for rank, s in enumerate(record.rank_s)}
                self._add_scalars(points_of(record) | times, record.step)
            case ValidationRecord():
                self._add_scalars(points_of(record) | self._references_of("loss/"), record.step)
            case HellaSwagRecord():
                references = self._references_of("hellaswag/")
                self._add_scalars(points_of(record) | references, record.step)

    def flush(self) -> None:
        self._call(lambda writer: writer.flush())

    def close(self) -> None:
        self._call(lambda writer: writer.close())

    def _references_of(self, group: str) -> dict[str, float]:
        return {name: value for name, value in self._references.items() if name.startswith(group)}

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._call(add)

    def _call(self, write: Callable[[Any], None]) -> None:
        try:
            write(self._writer)
        except OSError:  # the writer's thread has ended: what comes goes to another file
            self._writer = self._new_writer()
            raise


def _as_markdown(texts: list[str]) -> str:
    """Each text verbatim, which four spaces are, with a rule below it."""
    blocks = ("\n".join(f"    {line}" for line in text.splitlines()) + "\n\n---" for text in texts)
    return "\n\n".join(blocks)


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
    """A nested config as flat values of the types that TensorBoard accepts."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _hparam_values(value)
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
