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
    "Broken pipe",
    "Connection was likely closed",  # torch's store
    "Connection closed by remote peer",  # NCCL
    "ncclRemoteError",
    "NCCL communicator was aborted",  # by torch, in every operation after one that failed
)


def is_lost(error: BaseException) -> bool:
    """Whether `error` says that another rank died or hangs, which is not a bug in this rank."""
    return isinstance(error, RuntimeError) and _first_with(str(error), NO_REPLY + CLOSED) != ""


def is_without_reply(error: BaseException) -> bool:
    """Whether a lost rank still has its connections: it hangs, or its machine is down."""
    return isinstance(error, RuntimeError) and _first_with(str(error), NO_REPLY) != ""


def described(error: BaseException, timeout_s: float | None = None) -> str:
    """An error as text; for a lost rank, what that means instead of where gloo or NCCL raised it.

    `timeout_s` is how long this rank has waited, if that is known.
    """
    if not is_lost(error):
        return errors.described(error)
    if is_without_reply(error):
        within = "" if timeout_s is None else f" within {timeout_s:g} s"
        return f"no reply from another rank{within}: a rank hangs"
    return f"lost the connection to another rank ({words_of(error)})"


def words_of(error: BaseException) -> str:
    """What `error` says of the connection: `Connection closed by peer [10.0.0.2]:4711`."""
    line = _first_with(str(error), CLOSED) or _first_with(str(error), NO_REPLY)
    return line.rpartition("] ")[2].partition(". ")[0]


def _first_with(text: str, words: tuple[str, ...]) -> str:
    """The first line of `text` with one of the words; empty without one."""
    return next((line for line in text.splitlines() if any(word in line for word in words)), "")
