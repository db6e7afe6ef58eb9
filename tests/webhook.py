"""A webhook in this process, which keeps what is posted to it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support import wait_until

SECRET = "T0PSECRETpath"


class Webhook(ThreadingHTTPServer):
    """Answers every POST with `code`; while `is_open` is not set, it does not answer."""

    daemon_threads = True

    def __init__(self, code: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.code = code
        self.is_open = threading.Event()
        self.is_open.set()
        self.received: list[dict[str, Any]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        """path and headers"""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{SECRET}?key={SECRET}"

    def wait_for(self, count: int) -> list[str]:
        """The events of the first `count` messages, once they are here."""
        wait_until(lambda: len(self.received) >= count, lambda: str(self.received))
        return [message["event"] for message in self.received]


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.is_open.wait()
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.received.append(json.loads(body))
        self.send_response(self.server.code)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.requests.append(("GET " + self.path, {}))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def webhook(code: int = 200) -> Iterator[Webhook]:
    with Webhook(code) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.is_open.set()
            server.shutdown()
