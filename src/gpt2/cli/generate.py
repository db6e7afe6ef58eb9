"""`gpt2 generate`: continues a prompt with a trained model."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gpt2.base import log, validation
from gpt2.base.errors import ConfigError
from gpt2.cli.loading import Source, load_model
from gpt2.cli.parse import guarded, parse
from gpt2.config import run as config
from gpt2.inference.sampling import Sampling

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained model. The texts go to standard output, all else to
    standard error."""

    source: Source = Source()
    prompt: str = "Hello, I'm a language model,"
    """text to continue; - reads it from standard input, an empty one begins a document"""
    stream: bool = False
    """show the text while it is made; of several, the first, and then the others"""
    interactive: bool = False
    """continue each line that is typed, with --stream; an empty line takes the prompt again"""
    sampling: Sampling = Sampling()
    seed: int = 1
    """seed of the choice; each answer of --interactive has the next one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        validation.require_at_least(self, 0, "seed")
        if self.seed >= 2**63:  # more than torch takes
            raise ConfigError(f"seed={self.seed} is too large; it must be less than {2**63}")
        if self.interactive and self.prompt == "-":
            raise ConfigError(
                "--prompt - and --interactive both read standard input; leave one of them out"
            )


def generate_main() -> int:
    """`gpt2 generate`."""
    log.setup()

    def body() -> int:
        command = parse(GenerateCommand, sys.argv[1:])
        from gpt2.cli import generate_output
        from gpt2.distributed import rendezvous

        loaded = load_model(command.source)
        print(loaded, file=sys.stderr, flush=True)
        prompt = generate_output.read_prompt(command.prompt)
        give = generate_output.stream_texts if command.stream else generate_output.print_texts
        if command.interactive:
            give = generate_output.converse
        with rendezvous.join(config.MachineConfig(device=command.device)) as world:
            give(loaded.model.to(world.device), prompt, command.sampling, command.seed)
        return 0

    return guarded(body)
