from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2 import model
from gpt2.base.errors import CheckpointError, ConfigError
from gpt2.config.model import ModelConfig
from gpt2.train import trainer
from modern_parts import PARTS
from same_state import assert_same
from support import losses, small_config

HALF = {"dtype": "bfloat16", "residual_dtype": "bfloat16"}
SHAPES = {
    "gpt2": ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=128),
    "modern": ModelConfig("modern", 3, 2, 32, vocab_size=128, block_size=16, **PARTS),
}


def types_of_the_stream(net: model.base.LanguageModel, is_cast: bool) -> set[torch.dtype]:
    """What blocks read and give; features must be in the type of the weights."""
    seen: set[torch.dtype] = set()

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.update((inputs[0].dtype, output.dtype))

    hooks = [block.register_forward_hook(note) for block in net.blocks]
    tokens_BT = torch.zeros(2, 16, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
        features_BTD = net.features(tokens_BT, torch.arange(16), None)
        net(tokens_BT, tokens_BT.clone()).backward()
    assert features_BTD.dtype is torch.float32
    assert all(part.grad.dtype is torch.float32 for part in net.parameters())
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stream_has_the_type_under_autocast_alone(shape: str):
    net = model.build(SHAPES[shape])
    assert types_of_the_stream(net, is_cast=True) == {torch.float32}
    net.residual_dtype = torch.bfloat16
    assert types_of_the_stream(net, is_cast=True) == {torch.bfloat16}
    assert types_of_the_stream(net, is_cast=False) == {torch.float32}


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "mlp"])
def test_a_run_stops_and_goes_on_bit_by_bit(architecture: str, data_root: Path, tmp_path: Path):
    """With validation and samples; the losses are nearly those of float32."""
    more = {"architecture": architecture, "sample_interval": 2, "checkpoint_interval": 2}
    more |= {"eval_interval": 2, "decay_steps": 4, **HALF}
    whole, parts, exact = (tmp_path / name for name in ("whole", "parts", "exact"))
    trainer.run(small_config(data_root, whole, **more, max_steps=4))
    for steps in (2, 4):
        trainer.run(small_config(data_root, parts, **more, max_steps=steps, resume="latest"))
    kept = [
        torch.load(out / "checkpoints/step_000004.pt", weights_only=False) for out in (whole, parts)
    ]
    for name in ("model", "optimizer"):
        assert_same(kept[0][name], kept[1][name])
    trainer.run(
        small_config(data_root, exact, **{**more, "residual_dtype": "float32"}, max_steps=4)
    )
    found, expected = (losses(out / "logs/log.txt") for out in (whole, exact))
    assert (found == expected) == (architecture == "mlp")  # whose first layer gives bfloat16
    assert found == pytest.approx(expected, abs=0.02)
    changed = {**more, "residual_dtype": "float32"}
    with pytest.raises(CheckpointError, match="residual_dtype"):
        trainer.run(small_config(data_root, whole, **changed, max_steps=6, resume="latest"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products_of_another_type_are_refused(dtype: str, data_root: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"got {dtype}; use --dtype bfloat16"):
        trainer.run(small_config(data_root, tmp_path, residual_dtype="bfloat16", dtype=dtype))
