"""Standard output as a metrics sink, and the lines that it shares with the log file."""

import sys

from gpt2.config.flops import duration
from gpt2.metrics.records import StepRecord


class Console:
    """Standard output."""

    def step(self, record: StepRecord, left_s: float | None) -> None:
        self.message(step_line(record, left_s, digits=3))

    def validation(self, step: int, epoch: int, loss: float) -> None:
        self.message(f"step {step} | epoch {epoch} | val loss: {loss:.4f}")

    def hellaswag(self, step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> None:
        self.message(hellaswag_line(step, epoch, acc, acc_norm, tasks))

    def samples(self, step: int, texts: list[str]) -> None:
        self.message(sample_block(step, texts))

    def message(self, text: str) -> None:
        # One write per line, so that other processes' output cannot cut it in two.
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def hellaswag_line(step: int, epoch: int, acc: float, acc_norm: float, tasks: int) -> str:
    """`step 250 | epoch 0 | hellaswag: 0.2955 acc_norm | 0.2859 acc | 10042 tasks`"""
    return (
        f"step {step} | epoch {epoch} | hellaswag: {acc_norm:.4f} acc_norm | {acc:.4f} acc | "
        f"{tasks} tasks"
    )


def step_line(record: StepRecord, left_s: float | None, digits: int) -> str:
    """`step 19074 | epoch 1 | loss: 3.445 | lr: 6.0e-04 | norm: 0.85 | dt: 9500ms | tok/sec: …`"""
    line = (
        f"step {record.step} | epoch {record.epoch} | loss: {record.loss:.{digits}f} | "
        f"lr: {record.learning_rate:.1e} | norm: {record.grad_norm:.2f} | "
        f"dt: {record.elapsed_s * 1000:.0f}ms | tok/sec: {record.tokens_per_s:.0f}"
    )
    return line if left_s is None else f"{line} | eta: {duration(left_s)}"


def sample_block(step: int, texts: list[str]) -> str:
    blocks = [
        f"step {step} | sample {number}:\n{_indented(text)}" for number, text in enumerate(texts, 1)
    ]
    return "\n".join(blocks)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
