import subprocess
import sys

from gpt2.distributed import last_line


def test_the_line_stands_below_what_the_process_wrote():
    """Standard error is closed after it, so that what reads it ends."""
    script = (
        "import os, sys\n"
        "from gpt2.distributed import last_line\n"
        "last_line.start(os.getpid(), 'error: the line')\n"
        "sys.exit('a report')"
    )
    ran = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert ran.stderr == "a report\nerror: the line\n"


def test_a_process_that_has_ended_already(capfd):
    ended = subprocess.Popen(["true"])
    ended.wait()
    last_line.main(ended.pid, "error: the line")
    assert capfd.readouterr().err == "error: the line\n"
