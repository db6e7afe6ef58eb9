"""GPT-2 and its training step as a plain PyTorch loop has them, for comparison; not a bench itself.

In the manner of nanoGPT: one compiled module, autocast, mean cross entropy over all logits, fused
AdamW, clipping, and the loss read at every step. And HellaSwag one task at a time, as replications
of GPT-2 compute it.
"""

import itertools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config.model import ModelConfig
from gpt2.data import tokenizer
from gpt2.evaluation.choices import Question
from gpt2.model.base import LanguageModel

Step = Callable[[Tensor, Tensor], float]
"""one update on tokens and targets, (B, T) each; the loss before it"""


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention(self.norm_1(x)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).contiguous().view(rows, length, width))
        x = x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x


class GPT2(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.embedding_rows, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.embedding_rows, bias=False)
        self.head.weight = self.tokens.weight
        for name, part in self.named_parameters():
            if part.dim() == 2:
                last = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(part, std=0.02 / (math.sqrt(2 * config.n_layer) if last else 1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def adamw(net: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        net.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None
    )


def updates(
    net: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, fused: bool
) -> Step:
    """The training step of a plain loop."""
    optimizer = adamw(net, fused)
    device = next(net.parameters()).device

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = loss_of(*(part.to(device, non_blocking=True) for part in (tokens, targets)))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def plain(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    fused: bool,
    compiled: bool = True,
) -> Step:
    net = GPT2(config).to(device)
    return updates(net, torch.compile(net) if compiled else net, dtype, fused)


@torch.no_grad()
def ending_losses(net: LanguageModel, question: Question) -> list[float]:
    """One task: four rows of text and ending, padded, and the logits of all their tokens."""
    rows = [(*question.context, *ending) for ending in question.endings]
    longest, begin = max(map(len, rows)), len(question.context) - 1
    tokens_BT = torch.tensor(
        [(*row, *[0] * (longest - len(row))) for row in rows],
        device=net.token_embedding.weight.device,
    )
    logits_BTV = net.logits(tokens_BT[:, :-1])[..., : tokenizer.VOCAB_SIZE]
    losses_BT = F.cross_entropy(
        logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    return [
        float(losses_T[begin : begin + len(ending)].sum())
        for losses_T, ending in zip(losses_BT, question.endings, strict=True)
    ]


def hugging_face(config: ModelConfig, device: torch.device) -> nn.Module:
    """transformers' GPT-2 of the same shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.embedding_rows,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    net: nn.Module = GPT2LMHeadModel(shape)
    return net.to(device)


def transformers_loop(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, fused: bool
) -> Step:
    """transformers' model, compiled, in the same loop. It shifts the labels by itself."""
    net = hugging_face(config, device)
    compiled = torch.compile(net)
    return updates(net, lambda tokens, _: compiled(tokens, labels=tokens).loss, dtype, fused)


def trainer(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, fused: bool, folder: str
) -> Callable[[Tensor, int], list[float]]:
    """transformers.Trainer: what takes tokens (B, T) and a number of steps, and gives the seconds
    of each."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    net = hugging_face(config, device)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_args: object, **_named: object) -> None:
            self.ends.append(time.perf_counter())

    def run(tokens: Tensor, steps: int) -> list[float]:
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(tokens),
            max_steps=steps + 1,  # the first one sets up the optimiser
            learning_rate=6e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=dtype is torch.bfloat16,
            optim="adamw_torch_fused" if fused else "adamw_torch",
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens] * (steps + 1)
        Trainer(net, arguments, train_dataset=rows, callbacks=[clock]).train()
        return [after - before for before, after in itertools.pairwise(clock.ends)]

    return run
