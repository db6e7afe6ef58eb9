"""Whether another rank died or hangs, by what gloo, NCCL and torch say in their errors. Pure.

The rank that raises such an error has only noticed it: the cause is on another rank.
"""

from gpt2.base import errors

NO_REPLY = (
    "Timed out",  # gloo: a rank sends nothing; torch: not all ranks have joined
    "caused pair closure",  # gloo, in every operation after one that timed out
    "wait timeout after",  # torch's store: a rank has not set its key
    "Socket Timeout",  # torch's store, of NCCL's unique id
    "Watchdog caught collective operation timeout",  # torch's thread that watches NCCL
)
CLOSED = (
    "Connection closed by peer",  # gloo
    "Connection reset",  # the system, through gloo or torch's store
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "Broken pipe",
    "Connection was likely closed",  # torch's store
    "Connection closed by remote peer",  # NCCL
    "ncclRemoteError",
    "NCCL communicator was aborted",  # by torch, in every operation after one that failed
)
LOST = "lost the connection to another rank: it was killed, or its machine or network is down"


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that another rank died or hangs, which is not a bug in this rank."""
    return _says(error, NO_REPLY + CLOSED)


def is_without_reply(error: BaseException) -> bool:
    """Whether a lost rank still has its connections: it hangs, or its machine is down."""
    return _says(error, NO_REPLY)


def described(error: BaseException, timeout_s: float | None = None) -> str:
    """An error as text; for a lost rank, what that means instead of where gloo or NCCL raised it.

    `timeout_s` is how long this rank has waited, if that is known.
    """
    if not is_lost(error):
        return errors.described(error)
    if is_without_reply(error):
        within = "" if timeout_s is None else f" within {timeout_s:g} s"
        return f"no reply from another rank{within}: a rank hangs"
    return LOST


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
