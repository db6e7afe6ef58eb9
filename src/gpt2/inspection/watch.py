"""A run as a terminal shows it while it trains: `gpt2 watch`. It is read from its files alone."""

import math
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2.base import folder_lock
from gpt2.base.text import counted, one_line, shortened
from gpt2.config.flops import duration
from gpt2.inspection import chart
from gpt2.inspection.chart import Series
from gpt2.inspection.run_log import Message, RunLog
from gpt2.inspection.run_status import Run
from gpt2.metrics.log_file import LOG_NAME
from gpt2.train import status
from gpt2.train.status import Status

STYLES = {"running": "bold green", "finished": "bold green", "stopped": "bold yellow"}
"""of the states; all others are red"""
FIELD_CELLS, LABEL_CELLS = 26, 10
NAME_CELLS = 30
"""of the name of a corpus, at most"""
LEAST_CHART, MOST_CHART = 7, 18
"""lines of the chart with its axis; if there is less room, there is none"""
MOST_GPUS = 8
"""up to this number, each has a field of its own"""
MOST_MESSAGES, KEPT_WARNINGS = 8, 3
"""lines of messages, and those among them that keep the newest warnings, however old these are"""


class View(Protocol):
    """Something on disk that is watched."""

    def update(self) -> bool:
        """Reads what is new; returns whether there is more to read at once."""

    def render(self, width: int, height: int, *, is_ascii: bool) -> RenderableType: ...

    def news(self) -> list[str]:
        """What came since the last call, for terminals that only print lines."""


class RunView:
    """A run, by its `status.json` and its log."""

    def __init__(
        self,
        folder: Path | None,
        log: Path | None = None,
        *,
        on_death: Callable[[Path, Status], None] = lambda _folder, _status: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder` has the `status.json`; without one, only `log` is known. `on_death` is called
        whenever the process is found dead."""
        self._folder, self._log, self._on_death, self._clock = folder, log, on_death, clock
        self.status: Status | None = None
        self.log = RunLog(log or Path(LOG_NAME))
        self._is_status_missing = False
        self._messages_shown = 0
        self.state = ""

    def update(self) -> bool:
        if self._folder is not None:
            current = status.read(self._folder)
            self._is_status_missing = current is None
            if current is not None:
                self._follow(Run(self._folder, current))
                self.status = current
        has_more = self.log.read()
        before, self.state = self.state, self._state()
        is_new = self.state == "dead" != before
        if is_new and self._folder is not None and self.status is not None:
            self._on_death(self._folder, self.status)
        return has_more

    def _follow(self, run: Run) -> None:
        """Opens the log that the status names, if it is another run's than before."""
        before, plan = self.status, run.status.plan
        if before is not None and before.plan.run_name == plan.run_name:
            return
        self.log, self._messages_shown = RunLog(self._log or run.log, plan.run_name), 0

    @property
    def silent_s(self) -> float | None:
        """Seconds since the run wrote its status or a record of its log."""
        signs = [at for at in (self.status and self.status.time, self.log.written) if at]
        return max(0.0, self._clock() - max(signs)) if signs else None

    def _state(self) -> str:
        """As `Run.state`; also `stalled` if the process lives and does nothing, and `unknown` if
        there is only a log."""
        if self._folder is None or self.status is None:
            return "unknown"
        run = Run(self._folder, self.status)
        state = run.state_if(folder_lock.has_live_owner(self._folder))
        is_silent = status.is_stalled(self.silent_s or 0.0, self.log.step_s)
        return "stalled" if state == "running" and is_silent else state

    @property
    def step(self) -> int:
        """Finished updates."""
        if self.log.steps:
            return self.log.steps[-1]
        return self.status.step if self.status else 0

    @property
    def total_steps(self) -> int:
        if self.status is not None:
            return self.status.plan.total_steps
        return self.step + int(self.log.last.get("steps_left") or 0)

    @property
    def left_s(self) -> float | None:
        """Estimated seconds until the last step of a running run; None if unknown, as where there
        is only a log and that time is over."""
        left_s, logged_at = self.log.last.get("left_s"), self.log.last.get("time")
        if left_s is None or logged_at is None or self.state not in ("running", "unknown"):
            return None
        left_s -= self._clock() - logged_at
        return None if left_s < 0 and self.state == "unknown" else max(0.0, left_s)

    def render(self, width: int, height: int, *, is_ascii: bool = False) -> RenderableType:
        """The view in `width` cells and at most `height` lines."""
        parts: list[RenderableType] = [self._heading(width), self._progress(width)]
        parts += [Text(line, "yellow", no_wrap=True, overflow="ellipsis") for line in self.notes()]
        per_row = max(1, width // FIELD_CELLS)
        fields = self.fields()[: per_row * max(0, height - len(parts) - 2)]
        used = len(parts) + 1 + -(-len(fields) // per_row)
        of_corpora = self._corpus_lines(max(0, height - used - 1) // 3)
        left = height - used - len(of_corpora)
        has_chart = bool(self.log.steps or self.log.val_losses) and left >= LEAST_CHART + 2
        for_messages = min((left - 4) // 3, left - 4 - LEAST_CHART) if has_chart else left - 2
        messages = self.chosen_messages(min(MOST_MESSAGES, for_messages))
        room = left - 2 - (len(messages) + 2 if messages else 0)
        parts += [Text(), _grid(fields, per_row, width), *of_corpora]
        drawing = has_chart and chart.loss_chart(
            Series(self.log.steps, self.log.losses),
            Series([*self.log.val_losses], [*self.log.val_losses.values()]),
            width,
            min(MOST_CHART, room),
            is_ascii=is_ascii,
        )
        if drawing:
            parts += [Text(), chart.legend(is_ascii=is_ascii), drawing]
        if messages:
            parts += [Text(), self._messages_title(), *map(self._message_line, messages)]
        return Group(*parts)

    def _heading(self, width: int) -> Text:
        name = self.log.name or "no run"
        state = self._state_text()
        room = max(10, width - state.cell_len - 2)
        return Text(shortened(one_line(name), room), "bold", no_wrap=True, overflow="crop") + (
            Text.assemble("  ", state)
        )

    def _state_text(self) -> Text:
        """`running`, `stalled: no sign of life for 6m 10s`, …"""
        silent_s = self.silent_s
        ago = "" if silent_s is None else duration(silent_s)
        if self.state == "unknown":
            return Text(f"last record {ago} ago" if ago else "no record yet", "bold")
        details = {"stalled": f": no sign of life for {ago}", "dead": f", last seen {ago} ago"}
        return Text(self.state + details.get(self.state, ""), STYLES.get(self.state, "bold red"))

    def notes(self) -> list[str]:
        """Sentences about what is unusual."""
        found = []
        now = self.status
        if now is not None and now.reason and self.state != "running":
            found.append(f"{self.state.capitalize()}: {one_line(now.reason)}")
        if now is not None and self.state == "dead":
            found.append(f"Process {now.pid} on {now.host} ended unexpectedly; resume the run")
        for name in now.switched_off if now is not None else ():
            found.append(f"{name} is switched off: it failed again and again")
        if self._is_status_missing:
            found.append(f"status.json is gone from {self._folder}, or damaged")
        if self.log.is_missing:
            found.append("The log is gone, or not written yet")
        return found

    def _progress(self, width: int) -> Table:
        """`step 19,073 of 95,367  20 %  ━━━━━━  8d 21h left, Sat 12 Dec 14:05`."""
        total = max(1, self.total_steps)
        share = min(1.0, self.step / total)
        words = f"step {self.step:,} of {total:,}"
        percent = f"{math.floor(1000 * share) / 10:.1f} %"
        left = _left(self.left_s, self._clock())
        table = Table.grid(padding=(0, 2))
        bar_cells = max(8, width - len(words) - len(percent) - len(left) - 6)
        cells = (Text(words), Text(percent), _bar(total, self.step, bar_cells))
        for _ in range(4):
            table.add_column(no_wrap=True)
        table.add_row(*cells, Text(left, "green", overflow="ellipsis"))
        return table

    def fields(self) -> list[tuple[str, str]]:
        """What was measured last, by name."""
        last, log = self.log.last, self.log
        fields: list[tuple[str, str]] = []
        if last:
            fields.append(("loss", f"{log.losses[-1]:.4f}"))
        if log.val_losses:
            fields.append(("val loss", _at_step(log.val_losses, self.step)))
            best = min((v for v in log.val_losses.values() if math.isfinite(v)), default=math.nan)
            fields.append(("best val", f"{best:.4f}"))
        if log.bits_per_byte:
            fields.append(("bits/byte", _at_step(log.bits_per_byte, self.step)))
        if log.hellaswag:
            fields.append(("HellaSwag", _at_step(log.hellaswag, self.step)))
        if last:
            fields += [
                ("tokens/s", f"{last['tokens_per_s']:,.0f}"),
                ("step time", _seconds(float(last["elapsed_s"]))),
                ("lr", f"{last['learning_rate']:.2e}"),
            ]
        if mfu := last.get("mfu"):
            fields.append(("MFU", f"{100 * mfu:.1f} %"))
        if (norm := last.get("grad_norm")) is not None:
            fields.append(("grad norm", f"{norm:.2f}"))
        if (epoch := last.get("epoch")) is not None:
            fields.append(("epoch", f"{epoch}"))
        fields += _gpu_fields(last.get("rank_gpu") or [])
        if log.skipped:
            fields.append(("skipped", f"{len(log.skipped):,}, last {log.skipped[-1]:,}"))
        if self.status is not None:
            plan = self.status.plan
            fields.append(("ranks", f"{plan.world_size} × {plan.device}"))
        return fields

    def _corpus_lines(self, most: int) -> list[Text]:
        """The newest validation loss of each corpus of a mixture. If they are more than `most`, the
        last line counts those that are left out."""
        every = {name: values for name, values in self.log.corpus_losses.items() if values}
        count = len(every) if len(every) <= most else max(0, most - 1)
        found, more = dict([*every.items()][:count]), len(every) - count
        names = [shortened(one_line(name), NAME_CELLS) for name in found]
        widest = max(map(cell_len, names), default=0)
        lines = [
            Text(f"{'val loss':<{LABEL_CELLS}}", "dim", no_wrap=True, overflow="ellipsis")
            .append(set_cell_size(name, widest) + "  ", "not dim")
            .append(_at_step(values, self.step), "not dim bold")
            for name, values in zip(names, found.values(), strict=True)
        ]
        if lines and more:
            lines.append(Text(f"{'':<{LABEL_CELLS}}and {more} more", "dim"))
        return lines

    def chosen_messages(self, count: int) -> list[Message]:
        """The newest `count` messages, among them the newest warnings, in their order."""
        if count <= 0:
            return []
        newest = list(self.log.messages)[-count:]
        room = min(KEPT_WARNINGS - sum(item.is_warning for item in newest), count - 1)
        older = [item for item in self.log.warnings if item not in newest]
        added = older[-room:] if room > 0 else []
        return [*added, *newest[max(0, len(added) + len(newest) - count) :]]

    def _messages_title(self) -> Text:
        count = self.log.warning_count
        title = Text("messages", "bold")
        if count:
            title.append(f"  {counted(count, 'warning')}", "yellow")
        return title

    def _message_line(self, message: Message) -> Text:
        when = "" if message.time is None else _clock_time(message.time, self._clock()) + "  "
        style = "red" if message.level in ("ERROR", "CRITICAL") else "yellow"
        text = one_line(message.text.partition("\n")[0])
        return (
            Text(no_wrap=True, overflow="ellipsis")
            .append(when, "dim")
            .append(text, style if message.is_warning else "")
        )

    def news(self) -> list[str]:
        """The messages since the last call, and a line about the progress."""
        new = min(self.log.message_count - self._messages_shown, len(self.log.messages))
        self._messages_shown = self.log.message_count
        lines = [
            f"{item.level}: {one_line(item.text)}" if item.is_warning else one_line(item.text)
            for item in list(self.log.messages)[len(self.log.messages) - max(0, new) :]
        ]
        return [*lines, self.summary()]

    def summary(self) -> str:
        """`running | step 19,073 of 95,367 | loss 3.4451 | … | 8d 21h left`."""
        parts = [self._state_text().plain, f"step {self.step:,} of {self.total_steps:,}"]
        shown = ("loss", "val loss", "bits/byte", "HellaSwag", "tokens/s")
        parts += [f"{name} {value}" for name, value in self.fields() if name in shown]
        return " | ".join([*parts, *filter(None, [_left(self.left_s, self._clock())])])


def _bar(total: int, step: int, cells: int) -> ProgressBar:
    return ProgressBar(total, step, cells, complete_style="green", finished_style="green")


def _grid(fields: list[tuple[str, str]], per_row: int, width: int) -> Table:
    """The fields in columns of equal width."""
    grid = Table.grid(padding=0)
    for _ in range(per_row):
        grid.add_column(width=width // per_row, no_wrap=True, overflow="ellipsis")
    cells = [Text(f"{name:<{LABEL_CELLS}}", "dim").append(v, "not dim bold") for name, v in fields]
    for start in range(0, len(cells), per_row):
        grid.add_row(*cells[start : start + per_row])
    return grid


def _at_step(values: dict[int, float], step: int) -> str:
    """The newest value, and its step if that is not the newest one."""
    at, value = max(values.items())
    return f"{value:.4f}" if at == step else f"{value:.4f} ({at:,})"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def _gpu_fields(ranks: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What each rank uses of its GPU; the range of all ranks if there are many."""
    usage = [item for item in ranks if item]
    fields: list[tuple[str, str]] = []
    if len(usage) > MOST_GPUS:
        fields += [("GPU use", _spread(usage, "utilisation_percent", ".0f", "%"))]
        fields += [("GPU mem", _spread(usage, "memory_gb", ".0f", "GB"))]
    else:
        for rank, item in enumerate(ranks):
            if item:
                name = f"GPU {rank}" if len(ranks) > 1 else "GPU"
                use = _spread([item], "utilisation_percent", ".0f", "%")
                memory = _spread([item], "memory_gb", ".1f", "GB")
                fields.append((name, "  ".join(filter(None, [use, memory]))))
    peaks = [item["peak_memory_gb"] for item in usage if item.get("peak_memory_gb")]
    return [*fields, ("GPU peak", f"{max(peaks):.1f} GB")] if peaks else fields


def _spread(usage: list[dict[str, float]], name: str, digits: str, unit: str) -> str:
    """`98 %`, or `94-99 %` of several."""
    values = [item[name] for item in usage if item.get(name) is not None]
    if not values:
        return ""
    low, high = f"{min(values):{digits}}", f"{max(values):{digits}}"
    return f"{high} {unit}" if low == high else f"{low}-{high} {unit}"


def _left(left_s: float | None, now: float) -> str:
    """`8d 21h left, Sat 12 Dec 14:05`; the day only if it is not today."""
    if left_s is None:
        return ""
    end = datetime.fromtimestamp(now) + timedelta(seconds=left_s)
    is_today = end.date() == datetime.fromtimestamp(now).date()
    at = f"{end:%H:%M}" if is_today else f"{end:%a %-d %b %H:%M}"
    return f"{duration(left_s)} left, {at}"


def _clock_time(at: float, now: float) -> str:
    when = datetime.fromtimestamp(at)
    is_today = when.date() == datetime.fromtimestamp(now).date()
    return f"{when:%H:%M:%S}" if is_today else f"{when:%-d %b %H:%M}"
