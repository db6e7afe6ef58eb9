from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt2 import model
from gpt2.config import flops, options, presets
from gpt2.config.flops import duration
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.run import OPTIMIZERS, OptimConfig
from gpt2.optim import build, muon
from modern_parts import PARTS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 3, "n_embd": 8, "block_size": 16, "window": 5},
        {"n_layer": 1, "n_embd": 12, "block_size": 9, "window": 1},
    ],
)
def test_parameter_count_is_that_of_the_model(architecture, bias: bool, sizes: dict[str, int]):
    shape = ModelConfig(architecture=architecture, n_head=2, bias=bias, **sizes)
    with torch.device("meta"):
        built = model.build(shape)
    assert flops.parameter_count(shape) == sum(part.numel() for part in built.parameters())


def test_gpt2_has_124_million_parameters():
    shape = options.overlay(presets.preset("gpt2-124m"), {"vocab_size": 50257}).model
    assert flops.parameter_count(shape) == 124_439_808


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_as_large_as_its_state(architecture: str, optimizer: str, tmp_path: Path):
    """Also the moments of its parts alone; those of the vectors and scalars of AdamW's steps are
    small."""
    parts = PARTS if architecture == "modern" else {}
    shape = ModelConfig(architecture, 3, 2, n_embd=64, vocab_size=128, window=3, **parts)
    built = model.build(shape)
    made = build.build_optimizer(built, OptimConfig(optimizer=optimizer))
    norm = torch.ones(())
    built(*torch.zeros(2, 1, 8, dtype=torch.long)).backward()
    made.clip_and_step(norm, None, norm.bool())
    state = made.state_dict()
    torch.save([built.state_dict(), state], tmp_path / "state.pt")
    size = (tmp_path / "state.pt").stat().st_size
    assert size == pytest.approx(flops.state_bytes(shape, optimizer), rel=0.05)
    of_parts = (state["Muon"], state["AdamW"]) if "Muon" in state else ({"state": {}}, state)
    for part, expected in zip(of_parts, flops.moment_bytes(shape, optimizer), strict=True):
        moments = [of_weight for of_weight in part["state"].values()]
        found = sum(
            moment.nbytes
            for of_weight in moments
            for name, moment in of_weight.items()
            if name != "step"
        )
        assert found == expected


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_keeps_its_share_of_muons_moments(
    ranks: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
):
    shape = ModelConfig("modern", 3, 2, n_embd=16, vocab_size=128, **PARTS)
    monkeypatch.setattr(muon, "_ranks", lambda: (ranks, 0))
    hidden = model.build(shape).hidden_matrices()
    stacks = muon.Muon(hidden, 0.1, 0.0, beta2=0.9)._stacks
    kept = [stack.momentum for stack in stacks]
    kept += [stack.squares for stack in stacks] if optimizer == "normuon" else []
    found = sum(moment.nbytes for moment in kept)
    assert found == flops.moment_bytes(shape, optimizer, ranks)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_per_token_counts_matrix_products(architecture: str):
    """Forward matrix products of a real pass, as torch counts them, times three."""
    shape = ModelConfig(
        architecture=architecture, n_layer=2, n_head=2, n_embd=64, block_size=64, bias=False
    )
    net = model.build(shape)
    tokens_BT = torch.zeros(1, 64, dtype=torch.long)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not count the fused kernel
    with plain, FlopCounterMode(display=False) as counter:
        net.logits(tokens_BT)
    forward = counter.get_total_flops() / 64
    # The formula also counts the vectors (norms) as if they were multiplied.
    assert flops.flops_per_token(shape) == pytest.approx(3 * forward, rel=1e-3)


def test_attention_within_a_window_counts_its_tokens():
    sizes = {"architecture": "modern", "n_layer": 5, "n_head": 2, "n_embd": 8, "block_size": 16}
    whole, narrow = ModelConfig(**sizes), ModelConfig(**sizes, sliding_window=4)
    seen = 16 + 16  # the fourth and the last block
    seen += 3 * 4
    saved = flops.flops_per_token(whole) - flops.flops_per_token(narrow)
    assert saved == 12 * 8 * (5 * 16 - seen)


def test_mfu():
    shape = ModelConfig()
    speed = 0.5 * 312e12 / flops.flops_per_token(shape)
    assert flops.mfu(speed, shape, 312e12) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.6, "1m 00s"),
        (250, "4m 10s"),
        (11100, "3h 05m"),
        (766800, "8d 21h"),
        (-3, "0s"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize("name", ["fast-124m", "fast-350m", "fast-774m"])
def test_fast_presets_train_on_twenty_tokens_for_each_weight_of_a_matrix_product(name: str):
    run = presets.preset(name)
    look_ups = ARCHITECTURES["modern"].look_ups(run.model)
    assert run.data.max_steps is not None
    tokens = run.data.max_steps * run.data.total_batch_size
    assert tokens / (flops.parameter_count(run.model) - look_ups) == pytest.approx(20, rel=0.01)
    assert run.model.n_embd / run.model.n_head == 128
