"""The end of a search: its best trials on the console, everything in files, and how it stands."""

from __future__ import annotations

import shlex

from optuna.study import Study
from rich.console import Console

from gpt2.base.errors import UserError
from gpt2.base.text import counted
from gpt2.experiments.search import best, ownership, report, trial
from gpt2.experiments.search import study as studies
from gpt2.experiments.search.spec import Search
from gpt2.experiments.search.trials import Trials


def conclude(search: Search, study: Study, source: Trials, number: int, out: Console) -> int:
    """Shows and writes what was found; the exit code. `number` is the signal that stopped it."""
    rows = source.patiently(lambda: report.rows(study, search.folder))
    if any(row.value is not None for row in rows):
        out.print(report.listing(rows, out))
    for row in rows:
        if row.state == "FAIL" and row.reason:
            out.print(f"FAILED {trial.name_of(row.number)}: {row.reason}", style="red")
    found: best.Best | None = None
    try:
        found = source.patiently(lambda: best.keep(study, search.folder))
        if any(row.has_something for row in rows):
            written = report.write(rows, search.folder, found.command if found else None)
            names = ", ".join(path.name for path in written)
            out.print(f"Summary: {search.folder / report.FOLDER} ({names})")
    except (OSError, ValueError, UserError) as error:
        out.print(f"WARNING: not everything could be written: {error}")
    if found and found.command:
        out.print(f"Best model: {search.folder / best.FOLDER}; training in full:")
        out.print(f"  {found.command}", soft_wrap=True)
    elif found:
        place = ownership.place_of(study, found.trial)
        out.print(f"Best trial: {place}{_lack(found, search)}", soft_wrap=True)
    address = search.storage or studies.url(search.folder)
    command = shlex.join(["optuna-dashboard", studies.without_password(address)])
    out.print(f"Look into it: {command}", soft_wrap=True)
    return _say_what_is_left(search, source, sum(row.is_counted for row in rows), number, out)


def _lack(found: best.Best, search: Search) -> str:
    is_here = ownership.is_mine(found.trial, ownership.id_of(search.folder), search.is_shared)
    return ", whose files are gone" if is_here else ""


def _say_what_is_left(search: Search, source: Trials, shown: int, number: int, out: Console) -> int:
    """The exit code; never 1 without a line that says why."""
    done, elsewhere, ownerless = source.done, source.elsewhere, source.ownerless
    left = counted(search.n_trials - done, "trial")
    if done > shown:
        more = counted(done - shown, "more trial")
        out.print(f"Ended elsewhere meanwhile: {more}; the same command shows them, too")
    if done >= search.n_trials:
        return 0
    if number:
        out.print(f"Stopped: {left} left; the same command goes on")
        return 128 + number
    if source.is_broken:
        out.print(
            f"Ended: {source.failed_in_a_row} trials have failed one after another; mend the "
            f"cause, then the same command goes on with the {left} left",
            style="red",
        )
        return 1
    if elsewhere:
        out.print(f"Nothing left to begin here; {counted(elsewhere, 'trial')} left elsewhere")
        return 0
    if ownerless:
        out.print(
            f"Ended: {counted(ownerless, 'trial')} without an owner, which another machine begins "
            "just now, or was killed when it did; the same command goes on in a minute"
        )
    else:
        out.print(f"Ended: {left} left; the same command goes on")
    return 1
