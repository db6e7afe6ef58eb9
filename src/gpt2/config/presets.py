"""The complete configurations that `--preset` names. Pure."""

from dataclasses import replace
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
    name: PresetName,
    shape: ModelConfig,
    data: DataConfig,
    rate: float,
    *,
    warmup_steps: int = 100,
    momentum_warmup: int = 300,
) -> RunConfig:
    """The recipe of `docs/recipe.md`."""
    model = replace(
        shape,
        architecture="modern",
        zero_init=True,
        untied_head=True,
        logit_softcap=15.0,
        value_embeddings=True,
        embedding_skip=True,
    )
    optim = OptimConfig(
        optimizer="normuon",
        learning_rate=rate,
        embedding_lr_ratio=30.0,
        warmup_steps=warmup_steps,
        schedule="wsd",
        cooldown=0.6,
        min_lr_ratio=0.0,
        momentum_warmup=momentum_warmup,
    )
    return RunConfig(preset=name, model=model, data=data, optim=optim)


def _demo(run: RunConfig) -> RunConfig:
    """Three minutes on two CPU cores, on text that every machine has. Its folder is its own, so
    that a real run after it starts with an empty one."""
    assert run.data.max_steps is not None
    return replace(
        run,
        checkpoint=CheckpointConfig(
            checkpoint_dir=Path("checkpoints", run.preset), checkpoint_interval=100, keep_last=3
        ),
        evaluation=EvalConfig(
            eval_interval=50,
            eval_batches=16,
            hellaswag_interval=None,  # its tasks are in English, which the demo is not trained on
            sample_interval=run.data.max_steps // 2,
            sample_prompt="def",
        ),
    )


PRESETS: dict[str, RunConfig] = {
    "gpt2-124m": _gpt2("gpt2-124m", 12, 12, 768, 6e-4),
    "gpt2-350m": _gpt2("gpt2-350m", 24, 16, 1024, 3e-4),
    "gpt2-774m": _gpt2("gpt2-774m", 36, 20, 1280, 2.5e-4),
    "gpt2-1558m": _gpt2("gpt2-1558m", 48, 25, 1600, 2e-4),
    # 20 tokens for each weight of a matrix product. The rate that was measured at a width of 96,
    # times the root of 96 / width: then updates change what a layer gives by the same amount (Yang
    # et al. 2023, arXiv:2310.17813, section 3).
    "fast-124m": _fast(
        "fast-124m",
        ModelConfig(n_layer=12, n_head=6, n_embd=768),
        DataConfig(total_batch_size=2**19, max_steps=4700),
        7e-3,
    ),
    "fast-350m": _fast(
        "fast-350m",
        ModelConfig(n_layer=24, n_head=8, n_embd=1024),
        DataConfig(total_batch_size=2**19, max_steps=13500),
        6e-3,
    ),
    "fast-774m": _fast(
        "fast-774m",
        ModelConfig(n_layer=36, n_head=10, n_embd=1280),
        DataConfig(total_batch_size=2**20, max_steps=14700),
        5.5e-3,
    ),
    "demo": _demo(
        RunConfig(
            preset="demo",
            model=ModelConfig(n_layer=4, n_head=2, n_embd=64, block_size=128),
            data=DataConfig(
                data_root=("data/python_stdlib",), total_batch_size=1024, max_steps=350
            ),
            optim=OptimConfig(optimizer="muon", learning_rate=0.024, warmup_steps=40),
        )
    ),
    "demo-fast": _demo(
        _fast(
            "demo-fast",
            ModelConfig(n_layer=4, n_head=3, n_embd=96, block_size=256),
            DataConfig(
                data_root=("data/python_stdlib_4k",),
                shuffle="global",
                total_batch_size=4096,
                max_steps=400,
            ),
            0.02,
            warmup_steps=20,
            momentum_warmup=30,
        )
    ),
}
