import signal

import pytest

from gpt2.distributed import signals


def test_a_request_is_withdrawn_by_its_number():
    stop = signals.StopRequest()
    stop.request(1001)
    stop.withdraw(1002)
    assert stop.number == 1001
    stop.withdraw(1001, 1002)
    assert stop.number == 0


def test_stop_request_records_signals_and_the_second_ctrl_c_interrupts(monkeypatch):
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    try:
        with signals.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)  # ignored before, as under nohup
            assert stop.number == 0
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # from torchrun too
            signal.raise_signal(signal.SIGINT)
            assert stop.number == signal.SIGTERM  # the first
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with signals.StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)  # the second Ctrl+C, as torchrun forwards it
            assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGHUP, hangup)
