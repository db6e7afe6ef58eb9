"""Updates that the host does not wait for."""

from pathlib import Path

import pytest
import torch

from gpt2.distributed.world import World
from gpt2.optim import build
from gpt2.train.learner import Learner
from support import small_config


def learner_on(device: str, folder: Path, **changes: object) -> Learner:
    config = small_config(folder, folder, device=device, dtype="float32", compile="off", **changes)
    return Learner(config, World(0, 1, torch.device(device, 0)))


def batch(learner: Learner) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(50257, (8, learner.config.model.block_size + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_without_a_finite_gradient_is_left_out(
    device: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learner = learner_on(device, tmp_path, optimizer=optimizer)
    assert learner.learn([batch(learner)], 1e-2).applied
    before = {name: part.clone() for name, part in learner.model.state_dict().items()}
    whole = build.gradient_norm

    def poisoned(net: torch.nn.Module) -> torch.Tensor:
        next(iter(net.parameters())).grad[0, 0] = float("nan")
        return whole(net)

    monkeypatch.setattr(build, "gradient_norm", poisoned)
    assert not learner.learn([batch(learner)], 1e-2).applied
    monkeypatch.undo()
    for name, part in learner.model.state_dict().items():
        assert torch.equal(part, before[name]), name
    assert learner.learn([batch(learner)], 1e-2).applied
    changed = learner.model.state_dict()
    assert all(not torch.equal(changed[name], before[name]) for name in before)


def test_results_that_are_heard_late_are_those_of_their_own_update(device: str, tmp_path: Path):
    ahead, waiting = (learner_on(device, tmp_path, dropout=0.0) for _ in range(2))
    torch.manual_seed(0)
    batches = [batch(ahead) for _ in range(6)]
    expected = [waiting.learn([each], 1e-2).loss for each in batches]
    begun = [ahead.begin([each], 1e-2) for each in batches]
    found = [one.result() for one in begun]
    assert [one.loss for one in found] == pytest.approx(expected, rel=1e-4)
    assert all(one.applied and 0 < one.elapsed_s < 60 for one in found)
