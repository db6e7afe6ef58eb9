"""`gpt2 watch`: a live view of a run or an experiment."""

import io
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, RenderableType
from rich.live import Live

from gpt2.base import validation
from gpt2.base.errors import CheckpointError
from gpt2.base.text import PlainConsole
from gpt2.cli import experiment_notices
from gpt2.cli.parse import CommandOptions, run_command
from gpt2.experiments.progress import state
from gpt2.experiments.progress.listing import ExperimentView
from gpt2.experiments.progress.state import ExperimentState
from gpt2.inspection import run_status
from gpt2.inspection.run_status import log_in
from gpt2.inspection.watch import RunView, View
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier
from gpt2.train import notices, status

SNAPSHOT_LINES = 40
LINES_EVERY_S = 10.0
"""between two reports on a terminal that only prints lines"""
POOR_TERMINALS = ("dumb", "linux")
"""values of TERM of terminals without Braille dots"""


@dataclass(frozen=True)
class WatchCommand(CommandOptions):
    """Watch a run, or the jobs of an experiment, in the terminal: progress, losses, speed,
    messages, and whether it is alive. Ctrl+C ends the view, not the run. If the output is not a
    terminal, prints one view and ends."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """a folder, such as an --out_dir or that of an experiment, a log, or an --experiment_name;
    default is the newest run in --checkpoint_dir"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run, or a parent of several runs and experiments"""
    once: bool = False
    """print one view and end"""
    every: float = 1.0
    """seconds between two looks at the files"""
    notify: str | None = field(default=None, repr=False)
    """http(s) address that gets a message if the process that is watched is killed, unless it got
    one already; default is GPT2_NOTIFY_URL"""

    def __post_init__(self) -> None:
        validation.require_within(self, 0.1, 3600, "every")


def watch_main() -> int:
    """`gpt2 watch`."""
    return run_command(WatchCommand, run)


def run(command: WatchCommand) -> int:
    """Shows what the command names until Ctrl+C; returns the exit code."""
    notifier = Notifier(notify.address_of(command.notify))
    try:
        return _show(command, find(command, notifier))
    finally:
        notifier.close()


def _show(command: WatchCommand, view: View) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal in Latin-1 has no …
    out = PlainConsole()
    if command.once or not sys.stdout.isatty():
        _print_snapshot(view, out)
        return 0
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that the terminal is left as it was
            signal.signal(number, signal.default_int_handler)
        if out.is_dumb_terminal:
            _print_lines(view, out)
        else:
            _show_live(view, out, command.every)
    except KeyboardInterrupt:
        _print_snapshot(view, out)
    return 0


def _show_live(view: View, out: Console, every_s: float) -> None:
    """Shows the view on the terminal's other screen until Ctrl+C."""
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            has_more = view.update()
            live.update(_rendered(view, out, out.height), refresh=True)
            if not has_more:
                time.sleep(every_s)


def _print_lines(view: View, out: Console) -> None:
    """Prints the view, and then lines about what is new until Ctrl+C."""
    _print_snapshot(view, out)
    view.news()
    while True:
        time.sleep(LINES_EVERY_S)
        while view.update():
            pass
        for line in view.news():
            out.print(line, soft_wrap=True)


def _print_snapshot(view: View, out: Console) -> None:
    while view.update():
        pass
    height = min(SNAPSHOT_LINES, out.height - 1) if out.is_terminal else SNAPSHOT_LINES
    out.print(_rendered(view, out, height))


def _rendered(view: View, out: Console, height: int) -> RenderableType:
    is_ascii = out.options.ascii_only or os.environ.get("TERM") in POOR_TERMINALS
    return view.render(out.width, height, is_ascii=is_ascii)


def find(command: WatchCommand, notifier: Notifier) -> View:
    """What the command names; raises CheckpointError if there is no such run."""
    root = command.checkpoint_dir
    if command.run is None:
        if found := _newest_below(root, notifier):
            return found
        raise CheckpointError(f"no run in {root}; name one, or use --checkpoint_dir FOLDER")
    given = Path(command.run)
    if given.is_file():
        return (
            RunView(None, given) if given.name != status.NAME else _of_run(given.parent, notifier)
        )
    folders = [given] if given.is_dir() else run_status.folders_of_name(command.run, root)
    for folder in folders:
        if found := _newest_below(folder, notifier):
            return found
        if log := log_in(folder) or log_in(folder / "logs"):
            return RunView(None, log)
    raise CheckpointError(
        f"no run at {given}, and no experiment of that name in {root}; expected a folder with a "
        "run, such as its --out_dir, a log.txt, or an --experiment_name"
    )


def _newest_below(root: Path, notifier: Notifier) -> View | None:
    """The experiment in `root`, else what was written last of the experiments below it and of the
    runs that are not part of one."""
    experiments = {
        folder: current.written
        for folder in run_status.run_folders(root, state.FILE)
        if (current := state.read(folder))
    }
    if root in experiments:
        return _of_experiment(root, notifier)
    found: dict[Path, float] = dict(experiments)
    for folder in run_status.run_folders(root, status.NAME):
        is_part = experiments.keys() & {folder, *folder.parents}
        if not is_part and (run := status.read(folder)):
            found[folder] = run.time
    if not found:
        return None
    newest = max(found, key=lambda folder: found[folder])
    return (_of_experiment if newest in experiments else _of_run)(newest, notifier)


def _of_experiment(folder: Path, notifier: Notifier) -> ExperimentView:
    def on_death(folder: Path, dead: ExperimentState) -> None:
        experiment_notices.post_death(folder, dead, notifier)

    return ExperimentView(folder, on_death=on_death)


def _of_run(folder: Path, notifier: Notifier) -> RunView:
    return RunView(folder, on_death=lambda folder, dead: notices.post_death(folder, dead, notifier))
