import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2 import model
from gpt2.config import presets
from gpt2.config.model import ARCHITECTURES, ModelConfig
from gpt2.config.options import overlay
from gpt2.distributed import rendezvous
from gpt2.model import base, cross_entropy
from gpt2.model.cross_entropy import summed_cross_entropy
from gpt2.train import trainer
from gpt2.train.replica import Replica
from support import losses, run_command, small_config


def plain(features: Tensor, weight_VD: Tensor, targets: Tensor, softcap: None = None) -> Tensor:
    logits = F.linear(features, weight_VD).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_loss_and_gradients_are_those_of_plain_operations(
    size: float, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """Also if one token has all the probability and the target has none."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 7 * 101)
    torch.manual_seed(0)
    targets_N = torch.randint(101, (tokens,))
    found = []
    for loss_of in (plain, summed_cross_entropy):
        torch.manual_seed(1)
        features_ND = (size * torch.randn(tokens, 16)).requires_grad_()
        weight_VD = torch.randn(101, 16).requires_grad_()
        loss = loss_of(features_ND, weight_VD, targets_N)
        (loss * 0.25).backward()
        found.append((loss.detach(), features_ND.grad, weight_VD.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=1e-5 * size)


PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""of gradients, relative to their norm"""


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"), [(1, 8, 40), (37, 16, 303), (64, 24, 96)]
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_loss_and_gradients_are_those_of_the_log_softmax(
    is_tied: bool,
    tokens: int,
    width: int,
    vocabulary: int,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    """Products in `dtype`, everything else in float32 (or float64), in chunks of 16 tokens. A tied
    weight is the embedding, too, and has the gradients of both."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 16 * vocabulary)
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    torch.manual_seed(0)
    start_VD, inputs_N = torch.randn(vocabulary, width), torch.randint(vocabulary, (tokens,))
    targets_N, hidden_ND = torch.randint(vocabulary, (tokens,)), torch.randn(tokens, width)

    def found(exact: bool) -> list[Tensor]:
        kind = torch.float64 if exact else kept
        weight_VD = start_VD.to(kind, copy=True).requires_grad_()
        hidden = hidden_ND.to(kind, copy=True).requires_grad_()
        features_ND = hidden * weight_VD[inputs_N] if is_tied else hidden * 1
        if exact:
            logits_NV = features_ND @ weight_VD.T
            if softcap is not None:
                logits_NV = softcap * torch.tanh(logits_NV / softcap)
            loss = -logits_NV.log_softmax(1).gather(1, targets_N[:, None]).sum()
        else:
            with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                loss = summed_cross_entropy(features_ND, weight_VD, targets_N, softcap)
        (loss / tokens).backward()
        assert hidden.grad is not None and weight_VD.grad is not None
        return [loss.detach(), hidden.grad, weight_VD.grad]

    for ours, exact in zip(found(exact=False), found(exact=True), strict=True):
        assert ours.dtype is kept
        assert (ours - exact).norm() < PRECISION[dtype] * exact.norm()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_losses_of_rows_add_up_and_change_nothing(
    with_gradients: bool, monkeypatch: pytest.MonkeyPatch
):
    """Also through torch.compile."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=101)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 7 * 101)
    torch.manual_seed(0)
    net = model.build(config)
    tokens_BT = torch.randint(101, (5, 16))
    batch = tokens_BT, tokens_BT.flip(1)
    alone = [
        F.cross_entropy(*row, reduction="sum")
        for row in zip(net.logits(batch[0]), batch[1], strict=True)
    ]
    for run in (net, torch.compile(net, dynamic=False, backend="aot_eager")):
        with torch.set_grad_enabled(with_gradients):
            loss, losses_B = run(*batch, by_row=True)
        assert not losses_B.requires_grad
        torch.testing.assert_close(losses_B, torch.stack(alone).detach())
        assert torch.equal(loss, net(*batch))
        if with_gradients:
            found = gradients(net, batch)
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                run(*batch, by_row=True)[0].backward()
            for part, expected in zip(net.parameters(), found[1:], strict=True):
                assert part.grad is not None and torch.equal(part.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_without_gradients_is_computed_in_full_precision(dtype: torch.dtype):
    torch.manual_seed(0)
    features_ND, weight_VD = torch.randn(50, 16), torch.randn(300, 16)
    targets_N = torch.randint(300, (50,))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        loss = summed_cross_entropy(features_ND, weight_VD, targets_N)
        logits_NV = F.linear(features_ND, weight_VD).float()
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(logits_NV, targets_N, reduction="sum")), rel=1e-6
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns or writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gpt2.summed_cross_entropy.default:
            with self:  # the operations in it
                return cross_entropy._loss_and_gradients(*args, **kwargs or {})
        results = func(*args, **kwargs or {})
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_memory_does_not_grow_with_the_batch(
    dtype: torch.dtype, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
):
    """Forward and backward of a whole model. A tensor of logits for all tokens would be larger than
    anything else: 16 rows have 256 tokens, that is 13 million logits."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    net = model.build(config)
    largest = []
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 20 * config.embedding_rows)
    for rows in (2, 16):
        tokens_BT = torch.randint(50257, (rows, 16))
        with torch.set_grad_enabled(with_gradients), Largest() as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = net(tokens_BT, tokens_BT.flip(1))
            if with_gradients:
                loss.backward()
        largest.append(seen.elements)
    assert largest == [20 * config.embedding_rows] * 2
    net.plain_head = True
    with Largest() as seen:
        net(tokens_BT, tokens_BT.flip(1))
    assert seen.elements == 256 * config.embedding_rows, "this test would see them"


def test_gradients_can_be_used_once(monkeypatch: pytest.MonkeyPatch):
    features_ND, weight_VD = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    loss = summed_cross_entropy(features_ND, weight_VD, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def compiled_graphs() -> Iterator[Any]:
    """A backend that counts what it compiles. It keeps torch's operators as they are."""
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds to import

    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


def gradients(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(*batch)
    loss.backward()
    return [
        loss.detach(),
        *(part.grad.clone() for part in net.parameters() if part.grad is not None),
    ]


def test_a_compiled_model_has_it_in_its_graph(compiled_graphs: Any):
    """One graph for training and one for evaluation; a graph break would be an error."""
    net = model.build(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16))
    tokens_BT = torch.randint(50257, (2, 16))
    batch = tokens_BT, tokens_BT.flip(1)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=compiled_graphs)
    for _ in range(2):
        for ours, expected in zip(gradients(compiled, batch), gradients(net, batch), strict=True):
            torch.testing.assert_close(ours, expected)
        with torch.no_grad():
            assert float(compiled(*batch)) == pytest.approx(float(net(*batch)), rel=1e-6)
    assert compiled_graphs.frame_count == 2


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_happens_between_the_products_can_be_compiled(
    softcap: float | None,
    compiled_graphs: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    """As on CUDA, where it becomes one kernel: within the operator, which is itself in a graph."""
    inner = torch.compile(cross_entropy._exponentiate, dynamic=False, backend=compiled_graphs)
    monkeypatch.setattr(cross_entropy, "_compiled_exponentiate", lambda: inner)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 20 * 100)
    torch.manual_seed(0)
    targets_N = torch.randint(100, (50,))
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(1)
        features_ND = torch.randn(50, 8).requires_grad_()
        weight_VD = torch.randn(100, 8).requires_grad_()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def loss_of(is_compiled: bool, *tensors: Tensor) -> Tensor:
            dtype = torch.float32
            operator = torch.ops.gpt2.summed_cross_entropy
            loss: Tensor = operator(*tensors, dtype, softcap, True, is_compiled)[0]
            return loss

        loss = loss_of(is_compiled, features_ND, weight_VD, targets_N)
        loss.backward()
        found.append((loss.detach(), features_ND.grad, weight_VD.grad))
    torch.testing.assert_close(*found)
    assert compiled_graphs.frame_count == 2, "two chunks of 20 tokens, and one of 10"


def test_ddp_splits_a_compiled_model_around_it(
    compiled_graphs: Any, monkeypatch: pytest.MonkeyPatch
):
    """So gradients are exchanged while others are computed."""
    net = model.build(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16))
    tokens_BT = torch.randint(50257, (2, 16))
    batch = tokens_BT, tokens_BT.flip(1)
    expected = gradients(net, batch)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(net, dynamic=False, backend=compiled_graphs)
        parallel = nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)
        torch.testing.assert_close(gradients(parallel, batch), expected)
        assert compiled_graphs.frame_count > 1
        with parallel.no_sync(), torch.autocast("cpu", torch.bfloat16):
            parallel(*batch).backward()  # accumulates
        for part, once in zip(net.parameters(), expected[1:], strict=True):
            torch.testing.assert_close(part.grad, 2 * once)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("size", [0.02, 0.1])
def test_bfloat16_is_as_close_to_float32_as_with_plain_operations(size: float):
    torch.manual_seed(0)
    weight_VD = (size * torch.randn(20000, 64)).requires_grad_()
    features_ND = torch.randn(64, 64).requires_grad_()
    logits_NV = features_ND.detach() @ weight_VD.detach().T
    targets_N = torch.distributions.Categorical(logits=logits_NV).sample()
    found = []
    for loss_of, in_bfloat16 in ((plain, False), (summed_cross_entropy, True)):
        features_ND.grad = weight_VD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = loss_of(features_ND, weight_VD, targets_N)
        loss.backward()
        assert features_ND.grad is not None and weight_VD.grad is not None
        found.append((loss.detach(), features_ND.grad, weight_VD.grad))
    (loss, *gradients), (rounded, *rounded_gradients) = found
    assert abs(rounded / loss - 1) < 2e-5
    for exact, gradient in zip(gradients, rounded_gradients, strict=True):
        assert gradient.dtype is torch.float32
        assert (gradient - exact).norm() < 0.005 * exact.norm()


def test_a_run_learns_the_same_with_it(data_root, tmp_path, monkeypatch: pytest.MonkeyPatch):
    ours, plain_one = (small_config(data_root, tmp_path / name, max_steps=8) for name in "ab")
    trainer.run(ours)
    monkeypatch.setattr(base, "summed_cross_entropy", plain)
    trainer.run(plain_one)
    found = [losses(run.watch.log_dir / "log.txt") for run in (ours, plain_one)]
    assert found[0] == pytest.approx(found[1], rel=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_its_gradients_in_bfloat16(architecture: str):
    """Independent of the dtype of its features under autocast."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    run = overlay(presets.preset("demo"), {**sizes, "architecture": architecture})
    net = model.build(run.model)
    tokens_BT = torch.randint(50257, (2, 16))
    found = []
    for net.plain_head in (True, False):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(tokens_BT, tokens_BT.flip(1))
        loss.backward()
        found.append([part.grad.clone() for part in net.parameters()])
    for plain_one, ours in zip(*found, strict=True):
        assert ours.dtype is torch.float32
        assert (ours - plain_one).norm() < 0.02 * plain_one.norm()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_model_learns_as_well_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """300 steps on the standard library, three seeds. Sums have another order, so their last digits
    differ; with Muon, and at the highest learning rates of AdamW, that changes the loss by more."""
    data = tmp_path / "stdlib"
    gpt2 = [sys.executable, "-m", "gpt2"]
    run_command([*gpt2, "data", "python-stdlib", "--out", str(data), "--max_tokens", "2000000"])
    demo = {"data_root": str(data), "device": "cpu", "dtype": "float32", "sample_interval": None}
    demo |= {"optimizer": "adamw", "learning_rate": 2e-3, "max_steps": 300}
    found = []
    for loss_of in (summed_cross_entropy, plain):
        monkeypatch.setattr(base, "summed_cross_entropy", loss_of)
        for seed in range(3):
            out = tmp_path / f"{loss_of.__name__}_{seed}"
            folders = {name: out / name for name in ("checkpoint_dir", "log_dir", "runs_dir")}
            run = overlay(presets.preset("demo"), {**demo, **folders, "seed": seed})
            found.append(trainer.run(run).val_loss)
    print(found)
    for ours, plain_one in zip(found[:3], found[3:], strict=True):
        assert ours < 4.5 and abs(ours - plain_one) < 0.01


def test_a_run_that_began_with_plain_operations_goes_on_with_them(data_root, tmp_path):
    run = small_config(data_root, tmp_path)
    with rendezvous.join(run.machine) as world:
        assert not Replica(run, world).model.plain_head
        assert Replica(run, world, plain_head=True).model.plain_head
