import logging
import socket
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from gpt2.experiments.pool import messages
from gpt2.experiments.pool.channel import Channel
from gpt2.experiments.pool.job import Job
from gpt2.experiments.pool.messages import (
    EndWhenIdle,
    JobEnded,
    JobLoaded,
    JobReported,
    Kill,
    Message,
    RankConnected,
    RankFailed,
    RankFinished,
    Reply,
    RunTraining,
    SendSignal,
    StopTraining,
    WorkerStarted,
)

EXAMPLES: list[Message] = [
    Job("a", "module:function", {"rate": 0.1, "layers": [1, 2]}, own_process=False, slot=1),
    JobLoaded(),
    JobReported({"step": 3, "note": "line\nbreak", "word": "Größe"}),
    Reply("prune"),
    JobEnded("failed", reason="no", traceback="where", is_device_error=True, takes_no_more=True),
    RankConnected(3),
    RunTraining({"run": {"seed": 1}, "run_name": "x"}),
    StopTraining(),
    RankFinished({"loss": 1.5}),
    RankFailed("Diverged", "nan", "where"),
    WorkerStarted(4711, "here"),
    SendSignal(15),
    EndWhenIdle(),
    Kill(),
]


def test_every_message_survives_its_line():
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))
    for message in EXAMPLES:
        line = messages.encode(message)
        assert line.count(b"\n") == 1 and messages.decode(line) == message


def test_an_unknown_field_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="gpt2")
    line = b'{"message": "Reply", "answer": "go", "urgency": 3}'
    assert messages.decode(line) == Reply("go")
    assert "urgency" in caplog.text


@pytest.mark.parametrize(
    "line", [b"{}", b"[1]", b'{"message": "Hello"}', b'{"message": "Reply"}', b"nothing", b"\xff{"]
)
def test_what_is_no_message_raises(line: bytes):
    with pytest.raises(ValueError):
        messages.decode(line)


def test_values_that_json_cannot_hold_are_converted():
    values = {
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "torch": torch.tensor(3),
        "path": Path("a"),
        "nan": float("nan"),
        "infinite": (1.0, float("inf")),
    }
    assert messages.json_ready(values) == {
        "numpy": 0.5,
        "array": [0, 1],
        "torch": 3,
        "path": "a",
        "nan": None,
        "infinite": [1.0, None],
    }


def test_a_channel_delivers_whole_messages_in_order():
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    assert receiver.receive() == []
    for message in EXAMPLES:
        sender.send(message)
    assert receiver.wait() == EXAMPLES[0]
    assert receiver.receive() == EXAMPLES[1:] and not receiver.is_closed
    one.sendall(messages.encode(Reply("go")) + messages.encode(Reply("stop"))[:-5])
    sender.close()
    assert receiver.receive() == [Reply("go")], "part of a message is dropped"
    assert receiver.is_closed and receiver.wait() is None
    receiver.close()
