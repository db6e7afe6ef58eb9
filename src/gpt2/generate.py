"""Sampling from a model with a key-value cache."""

import torch
from torch import Tensor

from gpt2 import tokenizer
from gpt2.model import evaluating
from gpt2.model.gpt2 import GPT2, KeyValueCache

# B samples, T time, V vocabulary.


@torch.inference_mode()
def generate(
    model: GPT2,
    prompt: list[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> list[list[int]]:
    """`num_samples` continuations of `prompt` (token ids; empty means the start of a document).

    Each ends before <|endoftext|> or after `max_new_tokens`; the prompt is not repeated. At
    temperature 0 the likeliest token is taken. Past the context the older half of it is dropped.
    `generator` belongs to the model's device, so that no other random stream moves.
    """
    device = model.token_embedding.weight.device
    context = model.config.block_size
    start = (prompt or [tokenizer.END_OF_TEXT])[-context:]
    tokens_BT = torch.tensor([start] * num_samples, device=device)
    new_BT = tokens_BT[:, :0]
    ended_B = torch.zeros(num_samples, dtype=torch.bool, device=device)
    cache = KeyValueCache.empty(model, num_samples)
    pending_BT = tokens_BT
    with evaluating(model):
        for _ in range(max_new_tokens):
            if cache.length + pending_BT.size(1) > context:
                cache.length = 0
                pending_BT = torch.cat([tokens_BT, new_BT], dim=1)[:, -(context // 2 or 1) :]
            logits_BV = model.logits(pending_BT, cache)[:, -1, : tokenizer.VOCAB_SIZE]
            pending_BT = _pick(logits_BV, temperature, top_k, generator)
            new_BT = torch.cat([new_BT, pending_BT], dim=1)
            ended_B |= pending_BT[:, 0] == tokenizer.END_OF_TEXT
            if bool(ended_B.all()):
                break
    return [_until_end(tokens) for tokens in new_BT.tolist()]


def generate_text(
    model: GPT2,
    prompt: str,
    *,
    num_samples: int = 3,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 0,
) -> list[str]:
    """`num_samples` texts that begin with `prompt`; a function of the weights and `seed`."""
    generator = torch.Generator(model.token_embedding.weight.device).manual_seed(seed)
    continuations = generate(
        model,
        tokenizer.encode(prompt),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    )
    return [prompt + tokenizer.decode(tokens) for tokens in continuations]


def _pick(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """The next token of each sample, (B, 1)."""
    if temperature == 0:
        return logits_BV.argmax(dim=1, keepdim=True)
    if top_k is not None:
        kept_BK = logits_BV.topk(min(top_k, logits_BV.size(1))).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept_BK[:, -1:], float("-inf"))
    probabilities_BV = torch.softmax(logits_BV / temperature, dim=1)
    return torch.multinomial(probabilities_BV, num_samples=1, generator=generator)


def _until_end(tokens: list[int]) -> list[int]:
    if tokenizer.END_OF_TEXT in tokens:
        return tokens[: tokens.index(tokenizer.END_OF_TEXT)]
    return tokens
