"""Repeats a user's error below the report of torchrun: about 40 lines that end with a traceback.

No rank can do that, because torchrun writes its report when all of them have ended. So a process of
its own waits until torchrun has ended. It imports nothing of this package, and starts at once.
"""

import contextlib
import os
import select
import subprocess
import sys

LONGEST_LINE = 10_000
LONGEST_WAIT_S = 600
"""torchrun waits for 300 s for those of other machines"""


def start(pid: int, line: str) -> None:
    """Starts a process that writes `line` to standard error when the process `pid` has ended."""
    text = line[:LONGEST_LINE].encode(errors="backslashreplace")
    with contextlib.suppress(OSError):  # no process can be started: the line stands once
        # torchrun ends the group of processes to which this one belongs.
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(pid), text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def main(pid: int, line: str) -> None:
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    except OSError:  # a kernel before 5.3, or a container that forbids it
        return
    else:
        if not select.select([ended], [], [], LONGEST_WAIT_S)[0]:
            return
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
