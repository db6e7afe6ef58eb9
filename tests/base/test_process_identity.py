import json
import subprocess
import sys
from dataclasses import replace

from gpt2.base.process_identity import ProcessIdentity


def test_a_process_that_runs_is_not_gone():
    assert not ProcessIdentity.own().is_gone


def test_a_process_that_has_ended_is_gone_also_before_it_is_waited_for():
    code = (
        "import json; from dataclasses import asdict; "
        "from gpt2.base.process_identity import ProcessIdentity; "
        "print(json.dumps(asdict(ProcessIdentity.own())), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        known = ProcessIdentity(**json.loads(child.stdout.readline()))
        assert (known.pid, known.is_gone) == (child.pid, False)
        child.kill()
        while not known.is_gone:  # a zombie, as nobody has waited for it
            pass
        child.wait()
        assert known.is_gone


def test_another_process_with_the_same_number_does_not_count():
    own = ProcessIdentity.own()
    assert replace(own, ticks=own.ticks + 1).is_gone


def test_a_process_of_another_machine_or_container_is_never_gone():
    own = ProcessIdentity.own()
    for elsewhere in ({"boot": "another"}, {"boot": ""}, {"namespace": "pid:[1]"}):
        other = replace(own, pid=2**22 + 1, **elsewhere)
        assert not other.is_gone and not other.is_visible
        assert other.is_of_earlier_boot == (other.boot == "another")
