"""`gpt2 generate`: continues a prompt with a trained model."""

import sys
from dataclasses import dataclass
from typing import Literal

from gpt2.base import validation
from gpt2.base.errors import ConfigError
from gpt2.cli.model_source import ModelSource
from gpt2.cli.parse import CommandOptions, run_command
from gpt2.config.run import MachineConfig
from gpt2.inference.sampling import Sampling


@dataclass(frozen=True)
class GenerateCommand(CommandOptions):
    """Continue a prompt with a trained model. The texts go to standard output, all messages to
    standard error."""

    source: ModelSource = ModelSource()
    prompt: str = "Hello, I'm a language model,"
    """text to continue; - reads it from standard input, an empty one begins a document"""
    stream: bool = False
    """print each token as it is generated; of several texts, the first one is streamed"""
    interactive: bool = False
    """continue each line that is typed, as with --stream; an empty line repeats the prompt"""
    sampling: Sampling = Sampling()
    seed: int = 1
    """random seed; each further answer of --interactive uses the next one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        validation.require_within(self, 0, validation.LARGEST_SEED, "seed")
        if self.interactive and self.prompt == "-":
            raise ConfigError(
                "--prompt - and --interactive both read standard input; leave one of them out"
            )


def generate_main() -> int:
    """`gpt2 generate`."""
    return run_command(GenerateCommand, _run)


def _run(command: GenerateCommand) -> int:
    # They import torch: see `gpt2.cli.parse`.
    from gpt2.cli import generate_output, loading
    from gpt2.distributed import rendezvous

    loaded = loading.load_model(command.source)
    print(loaded, file=sys.stderr, flush=True)
    prompt = generate_output.read_prompt(command.prompt)
    write = generate_output.stream_texts if command.stream else generate_output.print_texts
    if command.interactive:
        write = generate_output.converse
    with rendezvous.join(MachineConfig(device=command.device)) as world:
        net = loaded.model.to(world.device)
        write(net, loaded.tokenizer, prompt, command.sampling, command.seed)
    return 0
