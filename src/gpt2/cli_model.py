"""What the `gpt2` command does with a trained model: `generate`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2 import config
from gpt2.cli_parse import guarded, parse
from gpt2.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained model."""

    checkpoint: str = "latest"
    """latest, best, a step or a path"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of the run's checkpoints"""
    prompt: str = "Hello, I'm a language model,"
    """text to continue"""
    num_samples: int = 3
    """how many continuations"""
    max_new_tokens: int = 100
    """tokens of each, at most"""
    temperature: float = 0.8
    """0 takes the likeliest token"""
    top_k: int | None = 50
    """choose among this many likeliest tokens"""
    seed: int = 1
    """seed of the choice"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is negative; 0 is greedy")


def generate_main() -> int:
    """`gpt2 generate`."""

    def body() -> int:
        command = parse(GenerateCommand, sys.argv[1:])
        from gpt2 import checkpoint as checkpoints
        from gpt2 import distributed, generate, model, monitor
        from gpt2.config import MachineConfig, ModelConfig

        path = checkpoints.find(command.checkpoint_dir, command.checkpoint, _warn)
        if path is None:
            others = monitor.run_folders(command.checkpoint_dir, "step_*.json")
            way_out = f"use --checkpoint_dir {others[0]}" if others else "train a model first"
            raise CheckpointError(f"no checkpoint in {command.checkpoint_dir}; {way_out}")
        state = checkpoints.load(path, trust=command.trust_checkpoint, warn=_warn)
        with distributed.join(MachineConfig(device=command.device)) as world:
            net = model.build(ModelConfig(**state["config"]["model"])).to(world.device)
            net.load_state_dict(state["model"])
            texts = generate.generate_text(
                net,
                command.prompt,
                num_samples=command.num_samples,
                max_new_tokens=command.max_new_tokens,
                temperature=command.temperature,
                top_k=command.top_k,
                seed=command.seed,
            )
        print(f"{path} (step {state['progress']['step']})")
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number}\n{text}")
        return 0

    return guarded(body)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
