import json
import math
import random
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import tokenizers
import torch
from tokenizers import processors
from torch import nn

import own_tokens
from gpt2 import model
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import store
from gpt2.cli import export, main
from gpt2.config.model import ModelConfig
from gpt2.config.presets import PRESETS
from gpt2.data import tokenizer, tokenizer_files
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.inference import interchange, tokenizer_export
from gpt2.inference.interchange import TrainedModel
from gpt2.model.gpt2 import GPT2
from gpt2.train import trainer
from support import small_config, small_documents

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32)
TEXTS = [
    "Hello, I'm a language model,",
    "  two spaces,\ttabs\t\t and\n\n\nlines \r\n  ",
    "def f(x):\n    return {'a': x ** 2}  # they'll've\n",
    "naïve café, Größe, Ελλάδα, Привет, 你好世界, こんにちは, שלום, ไทย",
    "🚀👨‍👩‍👧 e\u0301 \u200d\u00a0\u3000 ½ ٣ x²",
    "1234567890 3.14 ------=====",
    "",
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch):
    """No connection is tried."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def trained(**changes: object) -> tuple[GPT2, TrainedModel]:
    torch.manual_seed(0)
    net = model.build(ModelConfig(**{**vars(SHAPE), **changes})).eval()
    with torch.no_grad():  # initial zeros would hide a bias or norm in the wrong place
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net, TrainedModel(net.config, net.state_dict(), step=7, best_val_loss=3.5)


def load(source: str, shape: ModelConfig = SHAPE, trust: bool = False) -> dict[str, torch.Tensor]:
    return interchange.load(source, shape, trust=trust).weights


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, the padding of the vocabulary aside."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor[: tokenizer.VOCAB_SIZE], other[name][: tokenizer.VOCAB_SIZE])
        for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    interchange.export(trained()[1], "hf", folder, "float32", overwrite=False)
    return folder


@pytest.fixture
def copied(hf_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the export, with other values in its config.json."""

    def copy(**changes: object) -> Path:
        folder = Path(shutil.copytree(hf_folder, tmp_path / "copy"))
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
        return folder

    return copy


@pytest.fixture
def nanogpt_file(tmp_path: Path) -> Path:
    interchange.export(trained()[1], "nanogpt", tmp_path / "nano", "float32", overwrite=False)
    return tmp_path / "nano" / "ckpt.pt"


def rewrite(path: Path, **changes: object) -> str:
    torch.save(torch.load(path) | changes, path)
    return f"nanogpt:{path}"


@pytest.fixture
def transformers() -> ModuleType:
    import transformers  # takes seconds

    return transformers


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_gives_the_same_logits(offline, transformers, tmp_path: Path, bias: bool):
    net, source = trained(bias=bias)
    interchange.export(source, "hf", tmp_path / "hf", "float32", overwrite=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens_BT = torch.randint(50257, (3, 32))
    with torch.no_grad():
        logits_BTV = theirs(tokens_BT).logits
        assert logits_BTV.shape == (3, 32, 50257)
        assert (logits_BTV - net.logits(tokens_BT)[..., :50257]).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == 50256
    assert theirs.generation_config.bos_token_id == 50256


def test_transformers_gives_the_same_tokens(offline, transformers, hf_folder: Path):
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)
    assert theirs.model_max_length == SHAPE.block_size
    assert len(theirs) == 50257
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    text = "one<|endoftext|> two"
    assert theirs.encode(text) == tokenizer.load().encode(text, allowed_special="all")
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.END_OF_TEXT


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("own") / "hf"
    source = replace(trained(vocab_size=own_tokens.ROWS)[1], tokenizer=own_tokens.trained())
    interchange.export(source, "hf", folder, "float32", overwrite=False)
    return folder


def test_transformers_gives_the_same_tokens_of_10_000_texts(
    offline, transformers, own_folder: Path
):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(own_folder), own_tokens.trained()
    assert (len(theirs), theirs.model_max_length) == (own_tokens.VOCAB_SIZE, SHAPE.block_size)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
    chosen, letters = random.Random(0), [*map(chr, range(0x3000)), *"🚀é\U0010ffff", *TEXTS]
    parts = [*letters, *(text for item in small_documents() for text in item.text.split(" "))]
    texts = [chosen.choice(("", " ")).join(chosen.choices(parts, k=9)) for _ in range(10_000)]
    assert theirs(texts)["input_ids"] == [ours.encode(text) for text in texts]
    assert theirs.decode(theirs.encode(texts[0])) == texts[0]
    text = "one<|endoftext|> two"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert theirs.encode(text).count(ours.end_of_text) == 1


def test_transformers_gives_the_same_logits_of_own_tokens(offline, transformers, own_folder: Path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(own_folder).eval()
    net, _ = trained(vocab_size=own_tokens.ROWS)
    tokens_BT = torch.randint(own_tokens.VOCAB_SIZE, (3, 32))
    with torch.no_grad():
        logits_BTV = theirs(tokens_BT).logits
        assert logits_BTV.shape == (3, 32, own_tokens.VOCAB_SIZE)
        expected_BTV = net.logits(tokens_BT)[..., : own_tokens.VOCAB_SIZE]
        assert (logits_BTV - expected_BTV).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == own_tokens.trained().end_of_text


def test_rows_of_own_tokens_are_padded_again(own_folder: Path):
    net, _ = trained(vocab_size=own_tokens.ROWS)
    found = interchange.load(f"hf:{own_folder}", SHAPE, trust=False)
    assert found.tokenizer == own_tokens.trained()
    rows_VD, size = found.weights["token_embedding.weight"], own_tokens.VOCAB_SIZE
    assert rows_VD.shape == net.token_embedding.weight.shape
    assert torch.equal(rows_VD[:size], net.token_embedding.weight[:size])
    assert torch.allclose(rows_VD[size:], rows_VD[:size].mean(dim=0))


def test_the_tokenizer_of_a_folder_is_known(hf_folder: Path, own_folder: Path, tmp_path: Path):
    assert interchange.read(f"hf:{hf_folder}", trust=False).tokenizer is GPT2_TOKENIZER
    copy = Path(shutil.copytree(own_folder, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"copy/tokenizer\.json is no tokenizer\.json"):
        interchange.read(f"hf:{copy}", trust=False)
    (copy / "tokenizer.json").unlink()  # then it counts as GPT-2's, which has more tokens
    with pytest.raises(CheckpointError, match="expected a vocab_size of 50257 or more, got 500"):
        interchange.read(f"hf:{copy}", trust=False)


def test_the_export_adds_nothing_to_a_text(tmp_path: Path):
    """A file may ask for tokens before each text, a largest length, and padding."""
    asking = tokenizers.Tokenizer.from_str(own_tokens.trained().content)
    end = own_tokens.trained().end_of_text
    asking.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    asking.enable_truncation(3)
    asking.enable_padding(length=9)
    text = "a longer text than three tokens"
    assert asking.encode(text).ids[0] == end
    ours = tokenizer_files.parse(asking.to_str(), "asking")
    tokenizer_export.write(tmp_path, ours, context=32)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode(text).ids == ours.encode(text)


def test_every_character_has_the_same_tokens(hf_folder: Path):
    """The two libraries have regular expressions, and tables of Unicode, of their own."""
    theirs = tokenizer_export.build()
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1000):
        text = "".join(f"a{letter} " for letter in characters[start : start + 1000])
        assert theirs.encode(text).ids == tokenizer.encode(text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(transformers, tmp_path: Path, dtype: str):
    net, source = trained()
    interchange.export(source, "hf", tmp_path / "hf", dtype, overwrite=False)
    kind = getattr(torch, dtype)
    weights = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {kind}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").torch_dtype is kind
    net.load_state_dict(load(f"hf:{tmp_path / 'hf'}"))
    expected = source.weights["final_norm.weight"].to(kind).float()
    assert torch.equal(net.final_norm.weight, expected)


def test_round_trip_through_hugging_face(hf_folder: Path):
    assert same_weights(load(f"hf:{hf_folder}"), trained()[0].state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_through_nanogpt(tmp_path: Path, bias: bool):
    net, source = trained(bias=bias)
    interchange.export(source, "nanogpt", tmp_path / "nano", "float32", overwrite=False)
    assert same_weights(
        load(f"nanogpt:{tmp_path / 'nano' / 'ckpt.pt'}", net.config), net.state_dict()
    )


def test_weights_that_transformers_wrote(transformers, tmp_path: Path):
    """In parts, as large models are; with and without the names and masks of older files."""
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32)
    ).eval()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="2MB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    old = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "parts" / "config.json", tmp_path / "old")
    safetensors.torch.save_file(old, tmp_path / "old" / "model.safetensors")
    tokens_BT = torch.randint(50257, (2, 32))
    net = model.build(SHAPE).eval()
    for name in ("parts", "old"):
        net.load_state_dict(load(f"hf:{tmp_path / name}"))
        with torch.no_grad():
            logits_BTV = net.logits(tokens_BT)[..., :50257]
            assert torch.allclose(logits_BTV, theirs(tokens_BT).logits, atol=1e-4)


class NanoGPT(nn.Module):
    """What nanoGPT's sample.py builds from `model_args`, written anew."""

    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias) -> None:
        super().__init__()
        self.n_head = n_head
        linear = {"c_attn": (1, 3), "c_proj": (1, 1)}, {"c_fc": (1, 4), "c_proj": (4, 1)}

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(n_embd, bias=bias)

        def part(sizes) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: nn.Linear(width * n_embd, out * n_embd, bias=bias)
                    for name, (width, out) in sizes.items()
                }
            )

        blocks = [
            {"ln_1": norm(), "attn": part(linear[0]), "ln_2": norm(), "mlp": part(linear[1])}
            for _ in range(n_layer)
        ]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(nn.ModuleDict(block) for block in blocks),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens_BT: torch.Tensor, gelu: str) -> torch.Tensor:
        body = self.transformer
        x_BTD = body["wte"](tokens_BT) + body["wpe"](torch.arange(tokens_BT.size(1)))
        for block in body["h"]:
            qkv = block["attn"]["c_attn"](block["ln_1"](x_BTD)).chunk(3, dim=2)
            q, k, v = (part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in qkv)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x_BTD = x_BTD + block["attn"]["c_proj"](y.transpose(1, 2).flatten(2))
            hidden = block["mlp"]["c_fc"](block["ln_2"](x_BTD))
            hidden = nn.functional.gelu(hidden, approximate=gelu)
            x_BTD = x_BTD + block["mlp"]["c_proj"](hidden)
        return self.lm_head(body["ln_f"](x_BTD))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_samples_from_it(tmp_path: Path, bias: bool):
    net, source = trained(bias=bias)
    interchange.export(source, "nanogpt", tmp_path / "nano", "float32", overwrite=False)
    saved = torch.load(tmp_path / "nano" / "ckpt.pt", map_location="cpu", weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"]) == (7, 3.5)
    assert "dataset" not in saved["config"]  # sample.py would look for that one's tokeniser
    theirs = NanoGPT(**saved["model_args"])
    theirs.load_state_dict(saved["model"])
    tokens_BT = torch.randint(50257, (2, 32))
    with torch.no_grad():
        expected_BTV = net.logits(tokens_BT)[..., :50257]
        assert torch.allclose(theirs(tokens_BT, gelu="tanh"), expected_BTV, atol=1e-4)
        assert (theirs(tokens_BT, gelu="none") - expected_BTV).abs().max() < 0.02


def test_a_checkpoint_as_nanogpt_trains_it(nanogpt_file: Path, caplog):
    """Compiled, with an optimiser, a loss as a tensor, and a vocabulary of 50304."""
    net, _ = trained()
    padded = interchange.to_theirs(net.state_dict(), net.config, 50257, transposed=False)
    padded["transformer.wte.weight"] = net.token_embedding.weight.detach()
    padded["lm_head.weight"] = padded["transformer.wte.weight"]
    padded["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    source = rewrite(
        nanogpt_file,
        model={f"_orig_mod.{name}": tensor for name, tensor in padded.items()},
        model_args=torch.load(nanogpt_file)["model_args"] | {"vocab_size": 50304},
        optimizer={"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
        best_val_loss=torch.tensor(3.5),
    )
    weights = load(source)
    assert torch.equal(weights["token_embedding.weight"], net.token_embedding.weight)
    assert "tanh" in caplog.messages[0]


def saved_by_script(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, **state: object
) -> Path:
    """What `torch.save(state | {"config": NAME(…)})` writes in a script that defines NAME."""
    script = sys.modules["__main__"]
    kind = type(name, (), {"__module__": "__main__"})
    config = kind()
    config.__dict__.update(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50304)
    with monkeypatch.context() as patch:
        patch.setattr(script, name, kind, raising=False)
        torch.save(state | {"config": config}, path)
    return path


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_checkpoint_of_build_nanogpt(tmp_path: Path, monkeypatch, caplog, prefix: str):
    """Its class GPTConfig is of the script that trained; its GELU is ours."""
    net, _ = trained(vocab_size=50304)
    theirs = interchange.to_theirs(net.state_dict(), net.config, 50304, transposed=False)
    weights = {prefix + name: tensor for name, tensor in theirs.items()}
    path = saved_by_script(
        tmp_path / "model_05000.pt",
        monkeypatch,
        "GPTConfig",
        model=weights,
        step=5000,
        val_loss=3.2,
    )
    for trust in (False, True):
        found = interchange.read(f"nanogpt:{path}", trust=trust)
        assert found.shape == net.config
        assert same_weights(found.weights, dict(net.state_dict()))
    assert caplog.messages == []


def test_weights_of_ddp_in_the_format_of_hugging_face(copied):
    folder = copied()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    expected = load(f"hf:{folder}")
    renamed = {f"module.{name}": tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors")
    assert same_weights(load(f"hf:{folder}"), expected)


def test_the_old_format_of_torch(nanogpt_file: Path, tmp_path: Path):
    """That of its versions before 1.6."""
    path = tmp_path / "old.pt"
    torch.save(torch.load(nanogpt_file), path, _use_new_zipfile_serialization=False)
    assert same_weights(load(f"nanogpt:{path}"), load(f"nanogpt:{nanogpt_file}"))


@pytest.mark.parametrize("trust", [False, True])
def test_a_class_of_the_script_that_wrote_a_file(tmp_path: Path, monkeypatch, trust: bool):
    """--trust_checkpoint would not help: the message says what does."""
    path = saved_by_script(tmp_path / "a.pt", monkeypatch, "GPTConfig", model={})
    with pytest.raises(
        CheckpointError, match=rf"--init_from nanogpt:{path} and --checkpoint"
    ) as own:
        store.load(path, trust=trust)
    saved_by_script(path, monkeypatch, "Settings", model={})
    with pytest.raises(CheckpointError, match=r"class Settings .* torch\.save\({'model'") as other:
        load(f"nanogpt:{path}", trust=trust)
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("gpt2.__main__"))  # python -m gpt2
    with pytest.raises(CheckpointError, match="class Settings of the script that wrote it"):
        store.load(path, trust=trust)
    for error in (own, other):
        assert "add --trust" not in str(error.value) and "\n" not in str(error.value)


def test_padding_is_never_likely():
    """Also where all logits are far below zero, as GPT-2's are; rows of zeros would win there."""
    net, _ = trained(vocab_size=50257)
    with torch.no_grad():
        net.token_embedding.weight.add_(net.final_norm.bias, alpha=-30)
        net.final_norm.bias.mul_(20)
    padded = model.build(SHAPE).eval()
    padded.load_state_dict(interchange.fit(net.state_dict(), SHAPE, 50257))
    tokens_BT = torch.randint(50257, (4, 32))
    with torch.no_grad():
        logits_BTV = padded.logits(tokens_BT)
        worse = (padded(tokens_BT, tokens_BT) - net(tokens_BT, tokens_BT)) / tokens_BT.numel()
    assert logits_BTV.mean() < -20
    assert logits_BTV.softmax(dim=-1)[..., 50257:].sum(dim=-1).max() < 47 / 50257
    assert 0 <= worse < math.log1p(47 / 50257) + 1e-4


def test_fewer_positions_and_rows_are_the_first_ones(hf_folder: Path, caplog):
    shorter = ModelConfig(**{**vars(SHAPE), "block_size": 8, "vocab_size": 50257})
    weights = load(f"hf:{hf_folder}", shorter)
    net = model.build(shorter)
    net.load_state_dict(weights)
    assert torch.equal(net.position_embedding.weight, trained()[0].position_embedding.weight[:8])
    assert "the first 8 of its 32 positions" in caplog.messages[0]


def test_a_run_starts_from_them(data_root: Path, tmp_path: Path, monkeypatch, capsys):
    """Trained, exported by the command, and trained on: the loss continues where it was."""
    options = {"vocab_size": 50257, "eval_batches": 1, "max_steps": 2}
    first = trainer.run(small_config(data_root, tmp_path / "a", **options))
    flags = ["--checkpoint", "best", "--checkpoint_dir", str(tmp_path / "a" / "checkpoints")]
    for form, file, vocab_size, tolerance in [
        ("hf", "", 50257, 0),
        ("nanogpt", "/ckpt.pt", 50304, 1e-3),
    ]:
        folder = tmp_path / "out" / form
        command = ["gpt2", "export", str(folder), "--format", form, *flags]
        monkeypatch.setattr(sys, "argv", command)
        assert main.main() == 0
        assert f"step_000002.pt (step 2) to {folder}: " in capsys.readouterr().out
        if form == "nanogpt":  # measured after the checkpoint was saved
            assert torch.load(f"{folder}{file}")["best_val_loss"] == first.best_val_loss
        options |= {"init_from": f"{form}:{folder}{file}", "vocab_size": vocab_size}
        seen = []
        trainer.run(
            small_config(data_root, tmp_path / form, **options),
            report=lambda seen=seen, **metrics: seen.append(metrics) or "stop",
        )
        assert seen[0]["val_loss"] == pytest.approx(first.best_val_loss, abs=tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected model_type 'gpt2', got 'llama'; only GPT-2"),
        ({"activation_function": "relu"}, "expected activation_function 'gelu_new', got"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx False, got True",
        ),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-05, got 1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings True, got False"),
        ({"n_inner": 80}, "expected n_inner of 4 × n_embd = 64, got 80"),
        ({"vocab_size": 32000}, "expected a vocab_size of 50257 or more, got 32000"),
        ({"n_layer": "two"}, "expected a whole number for n_layer, got 'two'"),
        ({"n_layer": 3}, "n_layer: 3 in the file, 2 here; use --n_layer 3"),
        ({"n_positions": 16}, "block_size: 16 in the file, 32 here"),
        ({"vocab_size": 50300}, r"wte.weight of shape \(50300, 16\), got \(50257, 16\)"),
    ],
)
def test_other_architectures_are_refused(copied, changes: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        load(f"hf:{copied(**changes)}")


def test_other_shapes_are_refused_with_the_flags_that_agree(copied):
    shape = {"n_layer": 24, "n_head": 16, "n_embd": 1024, "n_positions": 1024}
    with pytest.raises(CheckpointError) as caught:
        load(
            f"hf:{copied(**shape)}",
            ModelConfig(**{**vars(PRESETS["gpt2-124m"].model), "bias": False}),
        )
    assert str(caught.value).partition("): ")[2].split("; ") == [
        "n_layer: 24 in the file, 12 here",
        "n_head: 16 in the file, 12 here",
        "n_embd: 1024 in the file, 768 here",
        "bias: True in the file, False here",
        "use --n_layer 24 --n_head 16 --n_embd 1024 --bias",
    ]
    assert "it has the shape of --preset gpt2-350m" in str(caught.value)


def test_incomplete_folders_are_refused(copied, tmp_path: Path):
    with pytest.raises(CheckpointError, match="hf download openai-community/gpt2"):
        load("hf:gpt2")
    folder = copied()
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for changed, message in [
        ({"score.weight": torch.ones(2)}, "has a tensor score.weight, which is not part of GPT-2"),
        ({"lm_head.weight": torch.zeros(50257, 16)}, "GPT-2 has one matrix for both"),
    ]:
        safetensors.torch.save_file(weights | changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load(f"hf:{folder}")
    weights.pop("transformer.h.1.mlp.c_fc.bias")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has no h.1.mlp.c_fc.bias: it is not a complete GPT-2"
    ):
        load(f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors"):
        load(f"hf:{folder}")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, with: python -c"):
        load(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json"):
        load(f"hf:{folder}")


class Planted:
    def __reduce__(self):
        return print, ("it ran",)


def test_other_nanogpt_files_are_refused(nanogpt_file: Path, capsys):
    arguments = torch.load(nanogpt_file)["model_args"]
    for changes, message in [
        (
            {"model_args": arguments | {"use_relu": True}},
            "unknown model_args use_relu; only nanoGPT's",
        ),
        (
            {"model_args": arguments | {"vocab_size": 65}},
            "it was not trained with GPT-2's tokenizer",
        ),
        ({"model_args": arguments | {"bias": False}}, "use --no_bias"),
        ({"model_args": None}, "is not a checkpoint of nanoGPT"),
        ({"model_args": arguments, "config": Planted()}, "if you trust its origin, add --trust"),
    ]:
        source = rewrite(nanogpt_file, **changes)
        with pytest.raises(CheckpointError, match=message):
            load(source)
    assert capsys.readouterr().out == ""
    load(source, trust=True)
    assert capsys.readouterr().out == "it ran\n"
    with pytest.raises(CheckpointError, match=r"nanogpt: expects the path of a ckpt.pt"):
        load("nanogpt:nowhere.pt")


@pytest.mark.parametrize("architecture", ["modern", "mlp"])
def test_these_formats_are_for_gpt2_alone(architecture, hf_folder: Path, tmp_path: Path):
    for form in ("hf", "nanogpt"):
        with pytest.raises(
            CheckpointError, match=f"cannot export a model of --architecture {architecture}"
        ):
            source = trained(architecture=architecture)[1]
            interchange.export(source, form, tmp_path / "x", "float32", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    wanted = ModelConfig(**{**vars(SHAPE), "architecture": architecture})
    with pytest.raises(CheckpointError, match="use --architecture gpt2, or omit --init_from"):
        load(f"hf:{hf_folder}", wanted)


def test_an_export_is_atomic(tmp_path: Path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(CheckpointError, match=r"No space left on device; free disk space"):
            interchange.export(trained()[1], "nanogpt", tmp_path / "x", "float32", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_a_full_disk_is_a_line(tmp_path: Path, monkeypatch):
    """The tokenizer is written first, by a library that raises no OSError."""
    monkeypatch.setattr(interchange.atomic_files, "writing_folder", lambda _: nullcontext(gone))
    gone = tmp_path / "gone"
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file .*; free disk space"):
        interchange.export(trained()[1], "hf", tmp_path / "x", "float32", overwrite=False)


def test_only_an_export_is_overwritten(tmp_path: Path):
    _, source = trained()
    folder = tmp_path / "x"
    folder.mkdir()
    for overwrite in (False, True):
        interchange.export(source, "nanogpt", folder, "float32", overwrite=overwrite)
    with pytest.raises(CheckpointError, match="add --overwrite to replace it"):
        interchange.export(source, "nanogpt", folder, "float32", overwrite=False)
    (folder / "step_000001.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"contains step_000001.pt, which is not part of an export"
    ):
        interchange.export(source, "nanogpt", folder, "float32", overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "step_000001.pt"]


def test_the_export_can_be_read_by_others(hf_folder: Path):
    modes = {path.stat().st_mode & 0o777 for path in hf_folder.iterdir()}
    assert len(modes) == 1


def test_the_command_refuses_in_one_line(tmp_path: Path, monkeypatch, capsys):
    flags = [str(tmp_path / "x"), "--checkpoint_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpt2 export", *flags])
    assert export.export_main() == 2
    error = capsys.readouterr().err
    assert "train a model first" in error
    assert error.count("\n") == 1
    assert store.list_checkpoints(tmp_path) == []
