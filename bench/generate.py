"""What the key-value cache gains: python bench/generate.py

GPT-2 124M with random weights, greedy, 512 tokens from the start of a document. Cached: each step
of `generate`. Uncached: all tokens so far through the model again, and the logits of the last one;
in turn with the cached steps, in the middle of every 32 of them (`--every 1`: at each, which takes
long). Both must find the same token.
"""

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from gpt2 import model
from gpt2.config import presets
from gpt2.data import tokenizer
from gpt2.inference.generate import generate
from gpt2.inference.sampling import Sampling
from gpt2.model.gpt2 import GPT2


@torch.inference_mode()
def uncached(net: GPT2, seen_BT: Tensor) -> int:
    """The likeliest token after these."""
    return int(net.next_logits(seen_BT)[0, : tokenizer.VOCAB_SIZE].argmax())


def round_of(net: GPT2, tokens: int, every: int) -> tuple[float, float]:
    """Tokens/s with the cache and without it."""
    device = net.token_embedding.weight.device
    greedy = Sampling(max_new_tokens=tokens, temperature=0)
    seen = [tokenizer.END_OF_TEXT]
    cached_s, uncached_s = [], []
    steps = generate(net, [], greedy, torch.Generator(device))
    for number in range(tokens):
        started = time.perf_counter()
        token = int(next(steps))  # waits for the device
        cached_s.append(time.perf_counter() - started)
        if number % every == every // 2:
            seen_BT = torch.tensor([seen], device=device)
            started = time.perf_counter()
            again = uncached(net, seen_BT)
            uncached_s.append(time.perf_counter() - started)
            assert again == token, "the cache changes the tokens"
        seen.append(token)
    return 1 / statistics.mean(cached_s), 1 / statistics.mean(uncached_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    net = model.build(presets.preset("gpt2-124m").model).to(options.device).eval()
    round_of(net, tokens=8, every=4)  # the first calls are slow
    rates = []
    for _ in range(options.rounds):
        rates.append(round_of(net, options.tokens, options.every))
        fast, slow = rates[-1]
        print(
            f"  cached {fast:.1f} tokens/s; uncached {slow:.2f}; {fast / slow:.1f} times",
            flush=True,
        )
    print(f"{options.tokens} tokens on {options.device}, {len(os.sched_getaffinity(0))} cores")
    for name, column in zip(("cached", "uncached"), zip(*rates, strict=True), strict=True):
        print(f"{name}: {statistics.median(column):.2f} tokens/s")
    ratios = [fast / slow for fast, slow in rates]
    print(
        f"The cache is {statistics.median(ratios):.1f} times as fast "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
