"""Sampling from a model with a key-value cache.

Shape suffixes: B samples, T time, V vocabulary, K the likeliest tokens in falling order.
"""

from collections.abc import Generator
from contextlib import closing

import torch
from torch import Tensor

from gpt2.base.errors import DataError
from gpt2.data.tokenizer import GPT2_TOKENIZER, Decoder, Tokenizer
from gpt2.inference.sampling import Sampling
from gpt2.model import evaluating
from gpt2.model.base import LanguageModel

# Samples during training: the model's own distribution without its long tail.
IN_TRAINING = Sampling(num_samples=3, max_new_tokens=64, temperature=1.0, top_k=50)
MIN_TEMPERATURE = 1e-5
"""lower temperatures count as 0, because logits divided by them overflow"""


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    tokenizer: Tokenizer = GPT2_TOKENIZER,
) -> Generator[Tensor, None, None]:
    """Continues `prompt` (token ids; empty means the start of a document): yields the next token of
    every sample, (B,), at each of `max_new_tokens` steps, also after an <|endoftext|>.

    When the context is full, its newer half is read again from position 0, and its older half is
    dropped. `generator` belongs to the model's device, so that no other random stream moves.
    """
    device, context = model.token_embedding.weight.device, model.config.block_size
    kept = _kept(context)
    start = (prompt or [beginning(tokenizer)])[-context:]
    pending_BT = torch.tensor([start], device=device)  # all samples begin with the same row
    seen = [pending_BT.expand(sampling.num_samples, -1)]
    cache = model.empty_cache(sampling.num_samples)
    with evaluating(model):
        for _ in range(sampling.max_new_tokens):
            if cache.length + pending_BT.size(1) > context:
                cache.length = 0
                pending_BT = torch.cat(seen, dim=1)[:, -kept:]
                seen = [pending_BT]
            logits_BV = model.next_logits(pending_BT, cache)[:, : tokenizer.vocab_size]
            logits_BV = logits_BV.to(model.token_embedding.weight.dtype)  # autocast may be on
            pending_BT = pick(logits_BV.expand(sampling.num_samples, -1), sampling, generator)
            seen.append(pending_BT)
            yield pending_BT[:, 0]


def beginning(tokenizer: Tokenizer) -> int:
    """The token from which a text is generated without a prompt: <|endoftext|>, else a newline, as
    in nanoGPT, else the first token."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    try:
        return tokenizer.encode("\n")[0]
    except DataError:
        return 0


def context_warnings(
    context: int, prompt: str, sampling: Sampling, tokenizer: Tokenizer = GPT2_TOKENIZER
) -> list[str]:
    """What a model with a context of `context` tokens will not see of `prompt` and of the text that
    continues it, one message each."""
    length, kept = len(tokenizer.encode(prompt)), _kept(context)
    found = []
    if length > context:
        found.append(f"the prompt has {length} tokens; the model sees only the last {context}")
    read = min(length or 1, context) + sampling.max_new_tokens - 1  # the last token is not read
    if read > context:
        found.append(
            f"past the context of {context} tokens the model sees only the last {kept} to "
            f"{context} tokens"
        )
    return found


def stream_text(
    model: LanguageModel,
    prompt: str,
    sampling: Sampling,
    *,
    seed: int,
    tokenizer: Tokenizer = GPT2_TOKENIZER,
) -> Generator[list[str], None, None]:
    """The new part of each sample's text, step by step; the first step is `prompt`.

    A text ends before <|endoftext|>. A character whose bytes are shared by several tokens comes
    with the last of them.
    """
    generator = torch.Generator(model.token_embedding.weight.device).manual_seed(seed)
    texts = [Decoder(tokenizer) for _ in range(sampling.num_samples)]
    growing = set(range(sampling.num_samples))
    yield [prompt for _ in texts]
    tokens_of_prompt = tokenizer.encode(prompt)
    with closing(generate(model, tokens_of_prompt, sampling, generator, tokenizer)) as steps:
        for tokens_B in steps:
            tokens = tokens_B.tolist()
            growing -= {row for row in growing if tokens[row] == tokenizer.end_of_text}
            yield [
                text.add(tokens[row]) if row in growing else "" for row, text in enumerate(texts)
            ]
            if not growing:
                break
    yield [text.end() for text in texts]


def generate_text(
    model: LanguageModel,
    prompt: str,
    sampling: Sampling = IN_TRAINING,
    *,
    seed: int = 0,
    tokenizer: Tokenizer = GPT2_TOKENIZER,
) -> list[str]:
    """The whole texts of `stream_text`; a function of the weights, `sampling` and `seed`."""
    pieces = stream_text(model, prompt, sampling, seed=seed, tokenizer=tokenizer)
    return ["".join(text) for text in zip(*pieces, strict=True)]


def _kept(context: int) -> int:
    """How many tokens stay when a context of `context` tokens is full."""
    return context // 2 or 1


def pick(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sample, (B, 1).

    Temperature, then top_k, then top_p, as in transformers: top_p is a share of the probability
    that the first two leave. (llama.cpp applies the temperature last: there the same top_p keeps
    more tokens if the temperature is below 1, and fewer if it is above.)
    """
    top_k, top_p = sampling.top_k, sampling.top_p
    if sampling.temperature < MIN_TEMPERATURE:
        return logits_BV.argmax(dim=1, keepdim=True)
    if top_k is not None:
        likeliest_BK = logits_BV.topk(min(top_k, logits_BV.size(1))).values
        logits_BV = logits_BV.masked_fill(logits_BV < likeliest_BK[:, -1:], float("-inf"))
    probabilities_BV = torch.softmax(logits_BV / sampling.temperature, dim=1)
    if top_p is not None and top_p < 1:
        probabilities_BV = nucleus(probabilities_BV, top_p, top_k)
    return torch.multinomial(probabilities_BV, num_samples=1, generator=generator)


def nucleus(probabilities_BV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """`probabilities_BV` inside the smallest set whose mass is at least `top_p`, 0 outside it
    (Holtzman et al. 2020, section 3.1). At most `top_k` of them are above 0, apart from ties."""
    size = probabilities_BV.size(1)
    sorted_BK, tokens_BK = probabilities_BV.topk(min(top_k or size, size))  # sorting all is slow
    # In float64: the error of a float32 sum of 50,000 terms exceeds the smallest of them.
    likelier_BK = sorted_BK.cumsum(dim=1, dtype=torch.float64) - sorted_BK
    kept_BK = sorted_BK.where(likelier_BK < top_p, 0)
    return torch.zeros_like(probabilities_BV).scatter(1, tokens_BK, kept_BK)
