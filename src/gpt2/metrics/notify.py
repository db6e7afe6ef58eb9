"""Messages to a webhook: a thread posts them, so that nothing waits for the network.

The body is a JSON object. Slack, Mattermost and Rocket.Chat show its `text`, Discord its `content`,
and ntfy what the address asks for: `https://ntfy.sh/TOPIC?tpl=1&t={{.title}}&m={{.text}}`.

The address is a secret, as anyone who knows it can post: no message, warning or error of this
module has it, and it is never part of the configuration, which checkpoints and TensorBoard hold.
"""

import base64
import contextlib
import http.client
import json
import logging
import os
import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from gpt2.base.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "GPT2_NOTIFY_URL"
TIMEOUT_S, WAIT_AT_END_S = 10.0, 5.0
"""for an answer; for all messages when a run ends"""
MOST_WAITING = 20
"""messages that wait for a slow server; further ones are dropped"""
MOST_LETTERS = 1900
"""of a text: Discord takes 2000"""
EXPECTED = "expected an address that begins with http:// or https://, without spaces"


def address_of(typed: str | None) -> str | None:
    """The address: as `typed`, else that of the environment; None if there is none.

    Raises ConfigError, which does not name it, if it is not an http(s) address.
    """
    found = typed or os.environ.get(VARIABLE) or None
    if found is not None:
        name = "--notify" if typed else VARIABLE
        try:
            parts = urllib.parse.urlsplit(found)
            port_is_valid = parts.port != 0
        except ValueError:  # of a port or a bracket
            raise ConfigError(f"{name}: {EXPECTED}, got one that cannot be read") from None
        is_printable = found.isascii() and all(33 <= ord(letter) < 127 for letter in found)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_printable:
            raise ConfigError(f"{name}: {EXPECTED}; it is not shown, as it is a secret")
        if not port_is_valid:
            raise ConfigError(f"{name}: {EXPECTED}, got one with port 0")
    return found


class Notifier:
    """Posts messages to an address; without one, does nothing."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._has_warned = False

    @property
    def is_on(self) -> bool:
        return self._address is not None

    def post(self, event: str, title: str, details: str = "", **values: Any) -> None:
        """Hands a message to the thread. `event` is one word for programs; `values` are further
        keys of the JSON object."""
        if self._address is None:
            return
        text = f"{title}: {details}" if details else title
        text = text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
        message = {
            "text": text,
            "content": text,
            "title": title,
            "event": event,
            "host": socket.gethostname(),
            "time": time.time(),
            **values,
        }
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._failure = "its server is too slow"

    def log_failure(self) -> None:
        """Logs, once, that messages do not arrive. Loggers write to the run's sinks, so this is
        called from the thread that trains."""
        if self._failure and not self._has_warned:
            self._has_warned = True
            logger.warning("messages of --notify do not arrive: %s", self._failure)

    def close(self) -> None:
        """Waits until the messages are posted, WAIT_AT_END_S at most."""
        if self._thread is None or not self._thread.is_alive():
            return
        with contextlib.suppress(queue.Full):  # the thread is behind, and ends with the process
            self._waiting.put_nowait(None)
        self._thread.join(WAIT_AT_END_S)
        if self._thread.is_alive():
            self._failure = self._failure or f"no answer within {WAIT_AT_END_S:g} s"
        self.log_failure()

    def _run(self) -> None:
        assert self._address is not None
        while (message := self._waiting.get()) is not None:
            try:
                _send(self._address, message)
            except Exception as error:  # whose texts may hold the address: they are not shown
                self._failure = reason(error)


def reason(error: Exception) -> str:
    """Why a message could not be posted, without any part of the address."""
    if isinstance(error, urllib.error.HTTPError):
        is_moved = error.code in (301, 302, 303, 307, 308)
        hint = ", which redirects: give the final address" if is_moved else ""
        return f"the server answered {error.code}{hint}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(cause, socket.gaierror):
        return "the name of the host is unknown"
    if isinstance(cause, ssl.SSLError):
        return f"no encrypted connection ({type(cause).__name__})"
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return type(cause).__name__


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without a message, perhaps to another host."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def _send(address: str, message: dict[str, Any]) -> None:
    """Posts one message; raises what urllib does."""
    parts = urllib.parse.urlsplit(address)
    headers = {"Content-Type": "application/json", "User-Agent": "gpt2-from-scratch"}
    user, at, host = parts.netloc.rpartition("@")
    if at:  # urllib takes no user and password in an address
        login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    plain = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
    body = json.dumps(message).encode()
    request = urllib.request.Request(plain, body, headers, method="POST")
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
        pass
