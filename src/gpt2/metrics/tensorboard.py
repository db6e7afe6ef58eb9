"""TensorBoard as a metrics sink."""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2.base import atomic_files
from gpt2.metrics import curves
from gpt2.metrics.curves import points_of
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    StepRecord,
    ValidationRecord,
)

logger = logging.getLogger(__name__)

HPARAMS_NAME = "events.out.tfevents.0000000000.hparams"
"""the event file of the hyper-parameters: TensorBoard reads the files of a folder in the order of
their names, and takes the first hyper-parameters that it finds"""
COMPARED = ("learning_rate", "total_batch_size", "architecture", "n_layer", "n_embd")
"""the hyper-parameters with which the table of runs begins; it shows five, and others on request"""
GPU_CHARTS = {
    "utilisation_percent": "GPU utilisation (%)",
    "memory_gb": "GPU memory (GB)",
    "peak_memory_gb": "GPU memory, highest (GB)",
}
"""the charts of what ranks use of their GPUs"""


class TensorBoard:
    """Curves, samples and hyper-parameters of one run folder.

    After a resume, points after `step` that an earlier process wrote are purged, so that the curves
    do not overlap; the hyper-parameters are those of the last process. Curves of a folder that has
    them under the names of an earlier version go on under those.
    """

    def __init__(
        self, folder: Path, hparams: dict[str, Any], step: int, references: dict[str, float]
    ) -> None:
        """`references` are the values of constant curves, by name."""
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self._has_former_names = _has_former_names(folder)
        try:
            _write_hparams(folder, hparams)
        except OSError as error:  # such as a full disk: there may be room for the curves later
            logger.warning("TensorBoard cannot write the hyper-parameters: %s", error)
        self._new_writer = functools.partial(SummaryWriter, str(folder))
        self._writer = self._new_writer(purge_step=step + 1 if step else None)
        self._references = references
        self._has_charts = False

    def write(self, record: Record) -> None:
        match record:
            case EventRecord():
                pass
            case SamplesRecord(step, texts):
                self._call(lambda writer: writer.add_text("samples", _as_markdown(texts), step))
            case StepRecord():
                self._add_charts(record)
                self._add_scalars(points_of(record), record.step)
            case ValidationRecord():
                self._add_scalars(points_of(record) | self._references_of("loss"), record.step)
            case HellaSwagRecord():
                references = self._references_of("hellaswag")
                self._add_scalars(points_of(record) | references, record.step)

    def flush(self) -> None:
        self._call(lambda writer: writer.flush())

    def close(self) -> None:
        self._call(lambda writer: writer.close())

    def _references_of(self, quantity: str) -> dict[str, float]:
        return {name: value for name, value in self._references.items() if quantity in name}

    def _add_charts(self, record: StepRecord) -> None:
        """Adds the layout of TensorBoard's page of custom scalars, once."""
        if not self._has_charts:
            self._has_charts = True
            self._call(lambda writer: writer.add_custom_scalars(_charts(self._references, record)))

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        named = curves.under_former_names(values) if self._has_former_names else values

        def add(writer: Any) -> None:
            for name, value in named.items():
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


def _charts(references: Mapping[str, float], record: StepRecord) -> dict[str, Any]:
    """Charts of several curves, for TensorBoard's page of custom scalars; `record` shows what the
    run measures. Each curve is a regular expression for names.

    They hold the former names, too, so that one chart shows runs of all versions.
    """
    charts = {"loss": ["loss/train", "loss/val"]}
    if any("hellaswag" in name for name in references):  # else it is not measured
        charts["HellaSwag"] = ["main/hellaswag", "main/hellaswag_acc"]
    for chart, names in charts.items():
        names += [name for name in references if chart.lower() in name]
        names += [curves.FORMER[name] for name in names if name in curves.FORMER]
    charts = {chart: [f"{name}$" for name in names] for chart, names in charts.items()}
    for figure, chart in GPU_CHARTS.items():
        if any(figure in usage for usage in record.rank_gpu):
            charts[chart] = [rf"rank_gpu/{figure}/\d+$", f"gpu/{figure}$"]
    if len(record.rank_s) > 1:
        charts["time of each rank (ms)"] = [r"speed/rank_\d+_ms$"]
    return {"Together": {chart: ["Multiline", names] for chart, names in charts.items()}}


def _has_former_names(folder: Path) -> bool:
    """Whether the curves in the event files of `folder` are an earlier version's: the first one
    that has another name now decides."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(folder.glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in curves.FORMER:
                    return False
                if value.tag in curves.FORMER.values():
                    return True
    return False


def _write_hparams(folder: Path, hparams: dict[str, Any]) -> None:
    """Writes the event file of the hyper-parameters, in place of that of an earlier process.

    `SummaryWriter.add_hparams` would open a second run folder, and what it appends at a resume
    would not be read.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import summary

    experiment, *session = summary.hparams(_hparam_values(hparams), {"loss/val": 0.0})
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in COMPARED  # by which TensorBoard sorts them
    plugin_data.content = content.SerializeToString()
    now = time.time()
    events = [Event(wall_time=now, summary=part) for part in (experiment, *session)]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files.writing(folder / HPARAMS_NAME) as file:
        writer = RecordWriter(file)
        for event in [Event(wall_time=now, file_version="brain.Event:2"), *events]:
            writer.write(event.SerializeToString())


def _hparam_values(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as flat values of the types that TensorBoard shows as they are."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _hparam_values(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
        else:
            flat[name] = str(value)
    return flat
