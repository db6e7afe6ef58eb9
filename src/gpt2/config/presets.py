"""The complete configurations that `--preset` names. Pure."""

from pathlib import Path

from gpt2.base.errors import ConfigError
from gpt2.base.validation import suggestion
from gpt2.config.model import ModelConfig
from gpt2.config.run import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    PresetName,
    RunConfig,
)


def preset(name: str) -> RunConfig:
    """The preset of that name; raises ConfigError, with the nearest names, for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(
            f"preset={name} is unknown{suggestion(name, list(PRESETS))}; "
            f"expected one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def _gpt2(name: PresetName, n_layer: int, n_head: int, n_embd: int, rate: float) -> RunConfig:
    """Shapes from Radford et al. 2019, table 2; rates from Brown et al. 2020, table 2.1."""
    return RunConfig(
        preset=name,
        model=ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        optim=OptimConfig(learning_rate=rate),
    )


def _fast(
    name: PresetName, n_layer: int, n_embd: int, rate: float, batch: int, steps: int
) -> RunConfig:
    """The recipe of `docs/recipe.md`: 20 tokens for each weight of a matrix product."""
    return RunConfig(
        preset=name,
        model=ModelConfig(
            architecture="modern",
            n_layer=n_layer,
            n_head=n_embd // 128,
            n_embd=n_embd,
            zero_init=True,
            untied_head=True,
            logit_softcap=15.0,
            value_embeddings=True,
            embedding_skip=True,
            layer_skip=True,
        ),
        data=DataConfig(total_batch_size=batch, max_steps=steps),
        optim=OptimConfig(
            optimizer="normuon",
            learning_rate=rate,
            embedding_lr_ratio=30.0,
            warmup_steps=100,
            schedule="wsd",
            cooldown=0.6,
            min_lr_ratio=0.0,
            cautious_decay=True,
            momentum_warmup=300,
        ),
    )


PRESETS: dict[str, RunConfig] = {
    "gpt2-124m": _gpt2("gpt2-124m", 12, 12, 768, 6e-4),
    "gpt2-350m": _gpt2("gpt2-350m", 24, 16, 1024, 3e-4),
    "gpt2-774m": _gpt2("gpt2-774m", 36, 20, 1280, 2.5e-4),
    "gpt2-1558m": _gpt2("gpt2-1558m", 48, 25, 1600, 2e-4),
    # The rate that was measured at a width of 96, times the root of 96 / width: then updates change
    # what a layer gives by the same amount (Yang et al. 2023, arXiv:2310.17813, section 3).
    "fast-124m": _fast("fast-124m", 12, 768, 7e-3, 2**19, 4700),
    "fast-350m": _fast("fast-350m", 24, 1024, 6e-3, 2**19, 13500),
    "fast-774m": _fast("fast-774m", 36, 1280, 5.5e-3, 2**20, 14700),
    # Three minutes on two CPU cores, on text that every machine has. Its folders are separate, so
    # that a real run after it starts with empty ones.
    "demo": RunConfig(
        preset="demo",
        model=ModelConfig(n_layer=4, n_head=2, n_embd=64, block_size=128),
        data=DataConfig(
            data_root=("data/python_stdlib",),
            total_batch_size=1024,
            max_steps=350,
        ),
        optim=OptimConfig(optimizer="muon", learning_rate=0.024, warmup_steps=40),
        checkpoint=CheckpointConfig(
            checkpoint_dir=Path("checkpoints/demo"), checkpoint_interval=100, keep_last=3
        ),
        evaluation=EvalConfig(
            eval_interval=50,
            eval_batches=16,
            hellaswag_interval=None,  # its tasks are in English, which the demo is not trained on
            sample_interval=175,
            sample_prompt="def",
        ),
    ),
}
