"""The messages are those of gloo, NCCL and torch, word for word."""

import pytest
import torch

from gpt2.distributed import lost_rank

NCCL_LOST = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, remote \
process exited or there was a network error, NCCL version 2.27.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting \
prematurely.
Last error:
socketPollConnect: Connection closed by remote peer node2.cluster<51159>"""

LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:11498. This is typically caused by a remote worker crashing.",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:4711: "
    "Connection reset by peer",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or "
    "crash?",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:4711: "
    "Connection timed out",
    NCCL_LOST,
]
WITHOUT_REPLY = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms "
    "for recv operation to complete",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Application timeout caused pair "
    "closure",
    "NCCL communicator was aborted on rank 3. Original reason for failure was: [Rank 3] Watchdog "
    "caught collective operation timeout: WorkNCCL(SeqNum=56693, OpType=BROADCAST, "
    "Timeout(ms)=1800000) ran for 1804371 milliseconds before timing out.",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value "
    "store by key '0', but store->get('0') got error: wait timeout after 600000ms, keys: /cuda//0",
]


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError])
def test_a_lost_rank_in_the_words_of_gloo_nccl_and_torch(kind: type[RuntimeError]):
    for message in LOST + WITHOUT_REPLY:
        assert lost_rank.is_lost(kind(message)), message
    assert [lost_rank.is_without_reply(kind(message)) for message in LOST] == [False] * len(LOST)
    assert all(lost_rank.is_without_reply(kind(message)) for message in WITHOUT_REPLY)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: the launch timed out and was terminated"),
        torch.distributed.DistBackendError("Cuda failure 2 'out of memory'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError("Connection reset by peer"),  # of a download
    ],
)
def test_other_errors_are_of_this_rank(error: Exception):
    assert not lost_rank.is_lost(error)
    assert not lost_rank.is_without_reply(error)


def test_an_error_as_text():
    assert lost_rank.described(RuntimeError(WITHOUT_REPLY[0])) == (
        "no reply from another rank: a rank hangs"
    )
    assert "within 25 s" in lost_rank.described(RuntimeError(WITHOUT_REPLY[0]), 25)
    for message in LOST:
        assert lost_rank.described(RuntimeError(message)) == lost_rank.LOST
    assert lost_rank.described(RuntimeError("shapes differ")) == "RuntimeError: shapes differ"
