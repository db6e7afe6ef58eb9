"""What takes seconds to import is imported where it is used; each test is a new process, which has
imported nothing yet."""

import sys

from support import run_command

HELP = """
import contextlib, sys
from gpt2.cli import main
sys.argv[1:] = ["--help"]
main.main()
assert not {"torch", "numpy", "tyro"} & set(sys.modules)
actions = {"data": ["files"], "experiments": ["list"]}
for command in set(main.COMMANDS) - {"train", "evaluate"}:
    sys.argv = ["gpt2", command, *actions.get(command, []), "--help"]
    with contextlib.suppress(SystemExit):
        main.main()
optional = {"datasets", "tensorboard", "wandb", "optuna", "matplotlib", "scipy", "ray"}
loaded = optional & set(sys.modules)
assert not loaded and "torch" not in sys.modules, loaded
"""


def test_help_loads_no_torch():
    """`train` and `evaluate` load it to find out which rank prints."""
    run_command([sys.executable, "-c", HELP])


TRAINING = """
import sys, torch
from gpt2 import model
from gpt2.config.model import ModelConfig
from gpt2.config.run import MachineConfig, OptimConfig
from gpt2.distributed import rendezvous
from gpt2.experiments.training import training_job
from gpt2.optim import build
from gpt2.train import trainer
optional = {"datasets", "tensorboard", "wandb", "optuna", "matplotlib", "scipy", "ray"}
loaded = optional & set(sys.modules)
assert not loaded and "transformers" not in sys.modules, loaded
for name in ("adamw", "muon"):
    net = model.build(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
    optimizer = build.build_optimizer(net, OptimConfig(optimizer=name))
    net(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    optimizer.clip_and_step(build.gradient_norm(net), 1.0, torch.tensor(True))
    optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules, name
assert "torch._inductor.config" not in sys.modules
with rendezvous.join(MachineConfig(device="cpu", deterministic=True)):
    import torch._inductor.config as settings
assert getattr(settings, "deterministic", True)  # torch 2.9 does not have it
assert not settings.dynamic_scale_rblock
"""


def test_a_training_loads_what_it_needs():
    """Its steps need nothing optional, and updates no compiler. Inductor, which reads its settings
    when it is imported, is imported after the ranks have joined."""
    run_command([sys.executable, "-c", TRAINING])
