import logging
from pathlib import Path

import pytest

from gpt2.base.errors import CheckpointError
from gpt2.train import saved_run


def test_an_error_that_may_be_a_bug_is_in_the_log_whole(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "gpt2")
    expected = r"a\.pt is not a complete checkpoint .*KeyError: 'exp_avg'.*--log_level debug shows"
    with pytest.raises(CheckpointError, match=expected), saved_run.explained(Path("a.pt")):
        raise KeyError("exp_avg")
    assert "Traceback" in caplog.text and "test_saved_run.py" in caplog.text
