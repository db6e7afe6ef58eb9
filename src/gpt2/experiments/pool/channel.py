"""A socket that carries messages in both directions."""

import contextlib
import socket
import threading
from collections import deque

from gpt2.experiments.pool import messages
from gpt2.experiments.pool.messages import Message

RECEIVE_BYTES = 1 << 18


class Channel:
    """One end of a connected stream socket. Several threads may send; one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._incomplete: list[bytes] = []
        """the pieces of a line that has not arrived whole"""
        self._received: deque[Message] = deque()
        self.is_closed = False
        """whether the other end sends nothing more, and all that it sent has been read"""

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`: readable when messages arrive, and at the end."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError if the other end is gone, TypeError for what JSON cannot hold."""
        line = messages.encode(message)
        with self._sending:
            self._socket.sendall(line)

    def receive(self) -> list[Message]:
        """The messages that have arrived whole, without waiting. Part of a message, from a process
        that was killed, is dropped."""
        with contextlib.suppress(BlockingIOError):
            while not self.is_closed:
                self._read(socket.MSG_DONTWAIT)
        arrived = list(self._received)
        self._received.clear()
        return arrived

    def wait(self) -> Message | None:
        """The next message; None if the other end sends no more."""
        while not self._received and not self.is_closed:
            self._read()
        return self._received.popleft() if self._received else None

    def end_sending(self) -> None:
        """The other end's `wait` returns None from now on."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def _read(self, flags: int = 0) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES, flags)
        except ConnectionError:  # the other end died before it had read everything
            data = b""
        if not data:
            self.is_closed = True
            return
        self._incomplete.append(data)
        if b"\n" in data:  # joined once per line, though a line may take thousands of pieces
            *lines, rest = b"".join(self._incomplete).split(b"\n")
            self._received += map(messages.decode, lines)
            self._incomplete = [rest]
