"""How much of a GPU's memory a training step takes, and how many rows fit. Pure.

At its peak, in the backward pass of the last block, a step holds

- the state: float32 weights, gradients and moments; in 16 bits also a copy of the matrices;
- what the forward pass saved for the backward pass, which grows with the tokens of a micro-batch;
- the gradients of one block, which grow with them too;
- the output head, whose logits are computed in chunks of bounded size.

A run confirms the number of rows by one pass before it trains, so an estimate that is a few percent
wrong costs a pass, or a little speed.
"""

from dataclasses import dataclass, replace

from gpt2.config import flops
from gpt2.config.model import ModelConfig
from gpt2.config.run import RunConfig

CARDS_GB = (16, 24, 40, 80, 141)
"""memory of common GPUs, as they are sold"""
ROWS_ON_CPU = {
    "gpt2-124m": 64,
    "gpt2-350m": 32,
    "gpt2-774m": 16,
    "gpt2-1558m": 8,
    "fast-124m": 64,
    "fast-350m": 32,
    "fast-774m": 16,
    "demo": 8,
    "demo-fast": 8,
}
"""what `--mini_batch_size auto` is on CPUs, by preset"""
MOST_TOKENS = 64 * 1024
"""largest micro-batch that is chosen automatically: matrix products of this size keep any GPU
busy"""
CONTEXT_BYTES = 10**9
"""allowance for CUDA's context, its kernels and the workspaces of cuBLAS"""
NCCL_BYTES = 5 * 10**8
"""allowance for the buffers of NCCL: up to 32 channels, of about 10 MB for each of its protocols
and neighbours"""
USABLE = 0.93
"""share of the memory that is planned with; the rest is for gaps between blocks of memory"""
HEAD_LOGITS = 4096 * 50304
"""most logits that the output head computes at once on CUDA"""
HEAD_BYTES_PER_LOGIT = 6
"""the logit in 16 bits, and float32 work on it"""


@dataclass(frozen=True)
class Computation:
    """How a training computes."""

    is_half: bool
    """whether matrix products have 16 bits (autocast); else float32"""
    is_compiled: bool
    ranks: int = 1
    is_sharded: bool = False
    """whether the ranks divide AdamW's moments among them"""
    optimizer: str = "adamw"
    is_half_residual: bool = False
    """whether the residual stream has 16 bits"""


@dataclass(frozen=True)
class SavedBytes:
    """What a block saves for the backward pass, in bytes for each token and unit of width."""

    half: int
    half_compiled: int
    full: int
    full_compiled: int
    per_head: int = 0
    """bytes for each token and head: the softmax denominator, and norms of queries and keys"""
    per_window_half: int = 0
    """mlp: outside the blocks, bytes for each token, unit of width and token of the window"""
    residual: int = 0
    """how much of half_compiled is the residual stream in float32"""

    def per_width(self, how: Computation) -> int:
        if how.is_half:
            return self.half_compiled if how.is_compiled else self.half
        return self.full_compiled if how.is_compiled else self.full


# The residual stream has 4 bytes; what enters a matrix product has 2 under autocast, else 4.
#
# gpt2, half: residual 4 and normed 2, before attention and before the feed-forward layer (12);
# queries, keys and values 6; attention's result 2; hidden layer before and after its activation
# 8 + 8. That is 36. Inductor saves 38.
# modern, half: as gpt2, and float32 copies of queries and keys for their norms and rotation;
# compiled, most of these are computed again.
# Of its parts, value embeddings save an embedding and the sum with the values, in float32 (in 16
# bits less), the skips the residual stream before it is scaled.
# A residual stream in 16 bits takes half, also in the skips; that is not counted without Inductor,
# as autocast on CUDA then saves what a norm reads in float32.
# mlp, half: the norm's float32 input 4, its result 2, hidden layer 8 + 8.
SAVED = {
    "gpt2": SavedBytes(36, half_compiled=38, full=64, full_compiled=64, per_head=4, residual=8),
    "modern": SavedBytes(50, half_compiled=42, full=76, full_compiled=76, per_head=12, residual=8),
    "mlp": SavedBytes(22, half_compiled=22, full=40, full_compiled=40, per_window_half=2),
}
"""by architecture; counted by the hooks of torch.autograd.graph in `tests/config/test_memory.py`"""
LARGEST = replace(SAVED["modern"], residual=0)
"""for architectures that are not listed"""
NORM_BYTES = 16
"""means and deviations of a block's two norms, for each token"""
OUTSIDE_WIDTHS = {True: 14, False: 16}
"""bytes for each token and unit of width outside the blocks: the last norm's input, the features,
their copy in 16 bits, and their gradient"""
WORK_WIDTHS = {True: 26, False: 44}
"""the same, of a block's backward pass: gradients of the residual stream 4, of the hidden layer
before and after its activation 8 + 8, of the norm's result 2, and its float32 copy 4"""


def step_bytes(model: ModelConfig, rows: int, how: Computation) -> int:
    """Peak memory of a training step with micro-batches of `rows` rows, without
    `overhead_bytes`."""
    tokens = rows * model.block_size
    per_token = saved_bytes_per_token(model, how) + WORK_WIDTHS[how.is_half] * model.n_embd
    return state_bytes(model, how) + head_bytes(model, how) + tokens * per_token


def overhead_bytes(ranks: int) -> int:
    """Memory of a GPU that a process holds before it trains: of CUDA, and of NCCL with several
    ranks."""
    return CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)


def state_bytes(model: ModelConfig, how: Computation) -> int:
    """Weights, gradients and moments, in float32; what autocast keeps of the weights; with DDP
    also the gradients of earlier micro-batches beside its buckets."""
    muon, adamw = flops.moment_bytes(model, how.optimizer, how.ranks)
    moments = muon + (adamw // how.ranks if how.is_sharded else adamw)
    per_weight = 8 + (2 if how.is_half else 0) + (4 if how.ranks > 1 else 0)
    return per_weight * flops.parameter_count(model) + moments


def head_bytes(model: ModelConfig, how: Computation) -> int:
    """The output head: one chunk of logits, the gradient of its weight, and its copy in 16 bits.

    It does not depend on the number of tokens; the features' gradient is in OUTSIDE_WIDTHS.
    """
    weights = model.embedding_rows * model.n_embd
    per_weight = 4 + (2 if how.is_half else 0)
    return HEAD_LOGITS * HEAD_BYTES_PER_LOGIT + weights * per_weight


def saved_bytes_per_token(model: ModelConfig, how: Computation) -> int:
    """What the forward pass saves for the backward pass, for each token of a micro-batch."""
    saved = SAVED.get(model.architecture, LARGEST)
    masks = 2 if model.dropout > 0 and not how.is_compiled else 0  # else they are drawn again
    is_small = how.is_half_residual and how.is_compiled and saved.residual > 0
    widths = saved.per_width(how) + masks - is_small * saved.residual // 2
    per_layer = widths * model.n_embd + saved.per_head * model.n_head + NORM_BYTES
    window = saved.per_window_half * (1 if how.is_half else 2) * model.window
    skip = 2 if is_small else 4
    parts = 8 * len(model.value_layers) + skip * model.n_layer * model.embedding_skip
    outside = OUTSIDE_WIDTHS[how.is_half] + window + parts + skip * model.layer_skip
    return model.n_layer * per_layer + outside * model.n_embd


def rows_that_fit(model: ModelConfig, memory_bytes: int, how: Computation) -> int:
    """The largest micro-batch whose step fits into USABLE of the memory; 0 if no row does."""
    fixed = step_bytes(model, 0, how)
    per_row = step_bytes(model, 1, how) - fixed
    return max(0, int(USABLE * memory_bytes) - fixed) // per_row


def automatic_rows(run_config: RunConfig, memory_bytes: int, how: Computation) -> int:
    """The micro-batch that `--mini_batch_size auto` chooses for this memory; 0 if no row fits.

    At most MOST_TOKENS; without an incomplete last micro-batch, which needs another graph, if that
    makes it no smaller than half; else with micro-batches of about the same size.
    """
    model = run_config.model
    share = -(-run_config.rows_per_step // how.ranks)
    most = min(rows_that_fit(model, memory_bytes, how), max(1, MOST_TOKENS // model.block_size))
    if most == 0:
        return 0
    if most >= share:
        return share
    divisors = [rows for rows in range(most // 2 + 1, most + 1) if share % rows == 0]
    return max(divisors, default=-(-share // -(-share // most)))


def computation(run_config: RunConfig, ranks: int) -> Computation:
    """How a run computes on GPUs with fast products of 16 bits."""
    machine, optim = run_config.machine, run_config.optim
    return Computation(
        machine.dtype != "float32",
        machine.compile != "off",
        ranks,
        optim.shard_optimizer,
        optim.optimizer,
        machine.residual_dtype == "bfloat16",
    )


def rows_on_card(run_config: RunConfig, gigabytes: float, ranks: int) -> int:
    """The estimated micro-batch of a run on GPUs with this memory; 0 if no row fits."""
    free = int(gigabytes * 1e9) - overhead_bytes(ranks)
    return automatic_rows(run_config, free, computation(run_config, ranks))
