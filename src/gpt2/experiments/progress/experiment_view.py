"""An experiment in a terminal other than the one that runs it: `gpt2 watch FOLDER`."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from gpt2.base import folder_lock
from gpt2.base.text import one_line, shortened
from gpt2.config.flops import duration
from gpt2.experiments.progress import listing, rendering, state
from gpt2.experiments.progress.state import ExperimentState

MOST_FAILURES = 8


class ExperimentView:
    """An experiment, by its `state.json`; a view as `gpt2.inspection.watch` defines it."""

    def __init__(
        self,
        folder: Path,
        *,
        on_death: Callable[[Path, ExperimentState], None] = lambda _folder, _state: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_death` is called whenever the process is found dead. Raises CheckpointError if there
        is no experiment in `folder`, or none that can be read."""
        self._folder, self._on_death, self._clock = folder, on_death, clock
        self._experiment = listing.read(folder)
        self.state = ""

    def update(self) -> bool:
        current = state.read(self._folder) or self._experiment.current
        self._experiment = replace(self._experiment, current=current)
        is_held = folder_lock.has_live_owner(self._folder)
        before, self.state = self.state, self._experiment.state_if(is_held)
        if current is not None and self.state == "dead" != before:
            self._on_death(self._folder, current)
        return False

    def render(self, width: int, height: int, *, is_ascii: bool = False) -> RenderableType:
        """The view in `width` cells and, unless it has many slots, at most `height` lines."""
        word, now = self.state, self._experiment.current
        title = shortened(one_line(str(self._folder)), max(10, width - len(word) - 2))
        heading = Text.assemble((title, "bold"), "  ", (word, listing.STYLES.get(word, "bold")))
        if now is None:
            return Group(heading, Text("state.json cannot be read", "yellow"))
        at = now.written if word == "dead" or now.is_over else self._clock()
        parts: list[RenderableType] = [heading]
        if word == "dead":
            ago = duration(self._clock() - now.written)
            parts.append(Text(f"Its process ended unexpectedly, last seen {ago} ago", "red"))
        parts += [Text(), rendering.view(now, at, width)]
        room = height - len(parts) - len(now.slots) - 4
        if now.failures and room > 0:
            parts += [Text(), Text("failed", "bold")]
            for failure in now.failures[-min(MOST_FAILURES, room) :]:
                words = one_line(f"{failure.job} on {failure.slot}: {failure.reason}")
                parts.append(Text(words, "red", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def news(self) -> list[str]:
        """A line about the experiment, and one about each running job."""
        now = self._experiment.current
        if now is None:
            return []
        running = [rendering.slot_line(slot, self._clock()) for slot in now.slots if slot.job]
        return [f"{self.state} | {rendering.summary(now, self._clock())}", *running]
