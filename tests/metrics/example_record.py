"""One record of a step, as most tests of sinks write it."""

from gpt2.metrics.records import StepRecord

RECORD = StepRecord(
    step=19074,
    epoch=1,
    loss=3.4451239,
    learning_rate=6e-4,
    grad_norm=0.851,
    elapsed_s=9.5,
    tokens_per_s=55188.2,
    mfu=0.4,
    rank_s=[9.1, 9.3],
)
