"""What `gpu_check.py` has found: findings of its parts, as JSON and as a table; not a bench itself.

A part writes each finding to a file as soon as it is known: what a part has found stays if it fails
later, hangs or is killed.
"""

import contextlib
import json
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NOT_RUN, RUNNING, DONE, FAILED, TOO_LONG = "not run", "running", "done", "failed", "too long"
LOG_LINES = 15
"""of a failed part, shown above the table"""
WIDEST = 80
"""characters of what was found, in the table; the details and the JSON file have the rest"""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    item: str
    predicted: str
    found: str
    is_ok: bool | None
    """whether it is as predicted; None where nothing is"""
    details: list[str] = field(default_factory=list)
    """shown above the table"""
    numbers: dict[str, Any] = field(default_factory=dict)
    """for the JSON file: every round, without rounding"""


@dataclass
class Outcome:
    """What became of a part."""

    part: str
    state: str = NOT_RUN
    reason: str = ""
    """why it is not done"""
    elapsed_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """the end of what it has printed, if it is not done"""

    @property
    def line(self) -> str:
        """For the progress of the whole check."""
        wrong = sum(finding.is_ok is False for finding in self.findings)
        found = f"{len(self.findings)} findings" + (f", {wrong} not as predicted" if wrong else "")
        return f"{self.part}: {self.reason or self.state}, {self.elapsed_s:.0f} s, {found}"


class Recorder:
    """Takes the findings of a part in the part's own process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(
        self,
        item: str,
        found: str,
        predicted: str = "",
        is_ok: bool | None = None,
        details: Sequence[str] = (),
        **numbers: Any,
    ) -> None:
        finding = Finding(item, predicted, found, is_ok, list(details), numbers)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(finding)) + "\n")

    @contextlib.contextmanager
    def attempt(self, item: str, predicted: str = "") -> Iterator[None]:
        """For one of several measurements of a part: an error in it is its finding, and the part
        goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first_line = next(iter(str(error).splitlines()), "")
            found = f"failed: {type(error).__name__}: {first_line}"
            details = traceback.format_exc().splitlines()[-LOG_LINES:]
            self.add(item, found, predicted, is_ok=False, details=details)


def read_findings(path: Path) -> list[Finding]:
    """What a part has written; a last line that is incomplete is left out."""
    if not path.exists():
        return []
    findings = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            findings.append(Finding(**json.loads(line)))
    return findings


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many findings are as predicted, and which parts are not done."""
    verdicts = [finding.is_ok for outcome in outcomes for finding in outcome.findings]
    counts = [
        f"{verdicts.count(True)} as predicted",
        f"{verdicts.count(False)} NOT",
        f"{verdicts.count(None)} without a prediction",
    ]
    for state in (FAILED, TOO_LONG, RUNNING, NOT_RUN):
        if names := [outcome.part for outcome in outcomes if outcome.state == state]:
            counts.append(f"{state}: {', '.join(names)}")
    return "; ".join(counts)


def table(outcomes: Sequence[Outcome]) -> str:
    """`item: predicted / found` of every part."""
    rows = [["part", "item", "predicted", "found", ""], [""] * 5]
    for outcome in outcomes:
        name = outcome.part
        for finding in outcome.findings:
            mark = {True: "ok", False: "NOT", None: ""}[finding.is_ok]
            found = finding.found
            if len(found) > WIDEST:
                found = found[: WIDEST - 1] + "…"
            rows.append([name, finding.item, finding.predicted, found, mark])
            name = ""
        if outcome.state != DONE:
            rows.append([name, outcome.state.upper(), "", outcome.reason, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1] = ["-" * width for width in widths]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def details(outcomes: Sequence[Outcome]) -> str:
    """What needs more than a line of the table: kernels, reasons, ends of logs."""
    lines = []
    for outcome in outcomes:
        for finding in outcome.findings:
            if finding.details:
                lines += [f"{outcome.part}, {finding.item}:"]
                lines += [f"  {line}" for line in finding.details] + [""]
        if outcome.log:
            lines += [f"{outcome.part}, the end of its output:"]
            lines += [f"  {line}" for line in outcome.log] + [""]
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome], **about: Any) -> str:
    """All outcomes, with what `about` says of the check."""
    parts = [asdict(outcome) for outcome in outcomes]
    return json.dumps({**about, "summary": summary(outcomes), "parts": parts}, indent=2) + "\n"
