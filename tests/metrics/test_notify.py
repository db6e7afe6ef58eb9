import logging
import socket
import threading
import time

import pytest

from gpt2.base.errors import ConfigError
from gpt2.metrics import notify
from gpt2.metrics.notify import Notifier
from webhook import SECRET, webhook


def test_a_message_has_what_the_services_show():
    with webhook() as hook:
        notifier = Notifier(hook.address)
        notifier.post("finished", "run on host finished", "loss 3.2000", step=7)
        notifier.close()
        (message,) = hook.received
        path, headers = hook.requests[0]
    assert message["text"] == message["content"] == "run on host finished: loss 3.2000"
    assert (message["title"], message["event"], message["step"]) == (
        "run on host finished",
        "finished",
        7,
    )
    assert headers["Content-Type"] == "application/json"
    assert path == f"/{SECRET}?key={SECRET}"


def test_a_long_text_is_cut_to_what_discord_takes():
    with webhook() as hook:
        notifier = Notifier(hook.address)
        notifier.post("failed", "run failed", "x" * 5000)
        notifier.close()
        assert len(hook.received[0]["content"]) < 2000


def test_user_and_password_of_the_address_are_a_login():
    with webhook() as hook:
        notifier = Notifier(hook.address.replace("//", "//me:p%40ss@"))
        notifier.post("finished", "run finished")
        notifier.close()
        assert hook.requests[0][1]["Authorization"] == "Basic bWU6cEBzcw=="


def test_without_an_address_nothing_is_posted_and_no_thread_runs():
    before = threading.active_count()
    notifier = Notifier(None)
    notifier.post("finished", "run finished")
    assert threading.active_count() == before
    notifier.close()


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def warnings_of(address: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    notifier = Notifier(address)
    for _ in range(3):
        notifier.post("failed", "run failed")
    notifier.close()
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("code", "words"), [(500, "answered 500"), (404, "answered 404")])
def test_a_refusal_is_one_warning_without_the_address(code: int, words: str, caplog):
    with webhook(code) as hook:
        (warning,) = warnings_of(hook.address, caplog)
    assert words in warning
    assert SECRET not in caplog.text
    assert "127.0.0.1" not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int, caplog):
    with webhook(code) as hook:
        (warning,) = warnings_of(hook.address, caplog)
        assert not [path for path, _ in hook.requests if "elsewhere" in path]
    assert "redirects" in warning


def test_a_server_that_is_down_is_one_warning(caplog):
    (warning,) = warnings_of(f"http://127.0.0.1:{closed_port()}/{SECRET}", caplog)
    assert warning.endswith("Connection refused")


def test_an_unknown_host_is_one_warning(caplog, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, f"{SECRET} is unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (warning,) = warnings_of(f"http://{SECRET}.example/", caplog)
    assert warning.endswith("the name of the host is unknown")
    assert SECRET not in caplog.text


def test_a_bug_of_the_library_does_not_show_the_address(caplog, monkeypatch):
    def fail(address: str, _message: object) -> None:
        raise RuntimeError(f"cannot post to {address}")

    monkeypatch.setattr(notify, "_send", fail)
    (warning,) = warnings_of(f"http://{SECRET}/", caplog)
    assert warning.endswith("RuntimeError")


def test_a_server_that_hangs_delays_neither_posts_nor_the_end(caplog, monkeypatch):
    """Its messages wait in a queue with an end; closing waits for a moment."""
    monkeypatch.setattr(notify, "WAIT_AT_END_S", 0.1)
    with webhook() as hook:
        hook.is_open.clear()
        notifier = Notifier(hook.address)
        for _ in range(10 * notify.MOST_WAITING):
            notifier.post("skipped", "run skipped an update")
        notifier.close()  # with no answer, and before TIMEOUT_S
        assert not hook.received
        (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "too slow" in warning.getMessage()


def test_a_name_that_is_looked_up_for_long_delays_nothing(monkeypatch, caplog):
    """getaddrinfo has no timeout."""
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait())
    monkeypatch.setattr(notify, "WAIT_AT_END_S", 0.1)
    (warning,) = warnings_of("http://slow.example/", caplog)
    is_over.set()
    assert "no answer" in warning


@pytest.mark.parametrize(
    "address",
    [
        f"ftp://host/{SECRET}",
        f"host/{SECRET}",
        f"/{SECRET}",
        f"file:///{SECRET}",
        f"http:///{SECRET}",
        f"https://host:port/{SECRET}",
        f"https://host:99999/{SECRET}",
        f"https://[host/{SECRET}",
        f"https://host/a b/{SECRET}",
        f"https://höst/{SECRET}",
        f"https://host/{SECRET}\nX-Header: 1",
    ],
)
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_bad_address_is_refused_without_showing_it(address: str, by_flag: bool, monkeypatch):
    monkeypatch.setenv(notify.VARIABLE, "" if by_flag else address)
    with pytest.raises(ConfigError, match="expected an address") as refused:
        notify.address_of(address if by_flag else None)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None
    assert ("--notify" if by_flag else notify.VARIABLE) in str(refused.value)


def test_the_flag_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(notify.VARIABLE, "https://environment/")
    assert notify.address_of("https://flag/") == "https://flag/"
    assert notify.address_of(None) == "https://environment/"
    monkeypatch.setenv(notify.VARIABLE, "")
    assert notify.address_of(None) is None


def test_messages_are_posted_in_their_order_while_the_caller_goes_on():
    with webhook() as hook:
        hook.is_open.clear()
        notifier = Notifier(hook.address)
        began = time.time()
        for event in ("stalled", "continues", "finished"):
            notifier.post(event, f"run {event}")
        hook.is_open.set()
        assert hook.wait_for(3) == ["stalled", "continues", "finished"]
        assert all(message["time"] >= began for message in hook.received)
        notifier.close()
