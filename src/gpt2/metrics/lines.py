"""Records as lines of text, for the console and `log.txt`."""

from gpt2.config.flops import duration
from gpt2.metrics.records import (
    EventRecord,
    HellaSwagRecord,
    Record,
    SamplesRecord,
    StepRecord,
    ValidationRecord,
)


def text_of(record: Record, loss_digits: int, val_loss_digits: int) -> str:
    """`step 250 | epoch 0 | val loss: 3.2500 | bits per byte: 1.0450`; several lines for samples
    and tracebacks."""
    match record:
        case StepRecord():
            return step_line(record, loss_digits)
        case ValidationRecord():
            return _validation_line(record, val_loss_digits)
        case HellaSwagRecord(step, epoch, acc, acc_norm, tasks):
            scores = f"{acc_norm:.4f} acc_norm | {acc:.4f} acc | {tasks} tasks"
            return f"step {step} | epoch {epoch} | hellaswag: {scores}"
        case SamplesRecord(step, texts):
            samples = (
                f"step {step} | sample {number}:\n{_indented(text)}"
                for number, text in enumerate(texts, 1)
            )
            return "\n".join(samples)
        case EventRecord(level, message):
            return message if level == "INFO" else f"{level}: {message}"


def step_line(record: StepRecord, loss_digits: int) -> str:
    """`step 19074 | epoch 1 | loss: 3.445 | lr: 6.0e-04 | norm: 0.85 | dt: 9500ms | tok/sec: …`"""
    line = (
        f"step {record.step} | epoch {record.epoch} | loss: {record.loss:.{loss_digits}f} | "
        f"lr: {record.learning_rate:.1e} | norm: {record.grad_norm:.2f} | "
        f"dt: {record.elapsed_s * 1000:.0f}ms | tok/sec: {record.tokens_per_s:.0f}"
    )
    if record.left_s is not None:
        line += f" | eta: {duration(record.left_s)}"
    if not record.corpora:
        return line
    losses = (f"{name} {loss:.{loss_digits}f}" for name, loss in record.corpora.items())
    return f"{line} | {', '.join(losses)}"


def _validation_line(record: ValidationRecord, digits: int) -> str:
    line = f"step {record.step} | epoch {record.epoch} | val loss: {record.loss:.{digits}f}"
    if record.bits_per_byte is not None:
        line += f" | bits per byte: {record.bits_per_byte:.{digits}f}"
    for name, corpus in record.corpora.items():
        line += f" | {name} {corpus.loss:.{digits}f}"
        if corpus.bits_per_byte is not None:
            line += f" ({corpus.bits_per_byte:.{digits}f})"
    return line


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
