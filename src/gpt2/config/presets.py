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


PRESETS: dict[str, RunConfig] = {
    "gpt2-124m": _gpt2("gpt2-124m", 12, 12, 768, 6e-4),
    "gpt2-350m": _gpt2("gpt2-350m", 24, 16, 1024, 3e-4),
    "gpt2-774m": _gpt2("gpt2-774m", 36, 20, 1280, 2.5e-4),
    "gpt2-1558m": _gpt2("gpt2-1558m", 48, 25, 1600, 2e-4),
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
