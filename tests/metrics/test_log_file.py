"""The lines of `log.txt` and of the console."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from gpt2.base import log
from gpt2.metrics.console import Console
from gpt2.metrics.lines import step_line, text_of
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import EventRecord, HellaSwagRecord, Metrics
from metrics.example_record import RECORD


def test_step_line():
    assert step_line(RECORD, loss_digits=3) == (
        "step 19074 | epoch 1 | loss: 3.445 | lr: 6.0e-04 | norm: 0.85 | "
        "dt: 9500ms | tok/sec: 55188"
    )
    with_end = replace(RECORD, left_s=766800.0)
    assert step_line(with_end, loss_digits=6).endswith("| tok/sec: 55188 | eta: 8d 21h")
    assert "loss: 3.445124 |" in step_line(RECORD, loss_digits=6)


def test_lines_of_other_records():
    assert text_of(HellaSwagRecord(250, 0, 0.2859, 0.2955, 10042), 3, 4) == (
        "step 250 | epoch 0 | hellaswag: 0.2955 acc_norm | 0.2859 acc | 10042 tasks"
    )
    assert text_of(EventRecord("INFO", "Completed Epoch 0"), 3, 4) == "Completed Epoch 0"
    assert text_of(EventRecord("WARNING", "no space"), 3, 4) == "WARNING: no space"


def test_console_and_log_file_say_the_same_with_more_digits_in_the_file(tmp_path: Path, capsys):
    path = tmp_path / "logs" / "log.txt"
    metrics = Metrics([Console(), LogFile(path, "run", 0)])
    metrics.step(RECORD, tokens_left=2 * 524288)
    metrics.validation(19074, 1, 3.25, 1.0625)
    metrics.validation(19075, 1, 3.5)
    metrics.samples(19074, ["one\n\ntwo"])
    logging.getLogger("gpt2.somewhere").info("Completed Epoch 0")
    metrics.close()
    printed = capsys.readouterr().out
    assert "loss: 3.445 " in printed
    assert "eta: 19s" in printed
    assert "step 19074 | epoch 1 | val loss: 3.2500 | bits per byte: 1.0625\n" in printed
    assert "step 19075 | epoch 1 | val loss: 3.5000\n" in printed
    assert "sample 1:\n    one\n\n    two\n" in printed
    logged = path.read_text()
    assert re.match(r"# run run \| from step 0 \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", logged)
    assert re.sub(r"(\d\.\d{3})\d*", r"\1", logged.partition("\n")[2]) == re.sub(
        r"(\d\.\d{3})\d*", r"\1", printed
    )


def test_the_console_prints_no_message_twice(capsys):
    log.setup()
    metrics = Metrics([Console()])
    logging.getLogger("gpt2.somewhere").info("Completed Epoch 0")
    metrics.close()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Completed Epoch 0\n")


def test_a_name_that_is_no_utf_8_is_logged(tmp_path: Path):
    sink = LogFile(tmp_path / "log.txt", "run", 0)
    sink.write(EventRecord("INFO", "shard \udcff.npy"))
    sink.close()
    assert "shard \\udcff.npy\n" in (tmp_path / "log.txt").read_text()
