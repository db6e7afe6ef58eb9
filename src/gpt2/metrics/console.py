"""Standard output as a metrics sink."""

import sys

from gpt2.base import log
from gpt2.base.control_characters import visible
from gpt2.metrics.lines import text_of
from gpt2.metrics.records import EventRecord, Record


class Console:
    """Standard output. Log messages are printed here only in a program that uses the package as a
    library and never called `log.setup`: else the handler of `gpt2.base.log` prints them."""

    def write(self, record: Record) -> None:
        if isinstance(record, EventRecord) and log.is_set_up():
            return
        # One write per line, so that other processes' output cannot cut it in two.
        sys.stdout.write(visible(text_of(record, loss_digits=3, val_loss_digits=4)) + "\n")
        sys.stdout.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
