"""Files of other tools that hold a GPT-2: Hugging Face's folders, nanoGPT's and build-nanogpt's
checkpoints. The weights keep the names and the dtype that they have there."""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gpt2.base import json_fields, regular_file
from gpt2.base.errors import CheckpointError
from gpt2.checkpoint import store
from gpt2.config.model import ModelConfig
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.inference import tokenizer_export

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]

# What must agree; the padding of the vocabulary need not.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")
# Values of config.json that are GPT-2; any other is another architecture. The first is the default.
HUGGING_FACE_ALLOWS: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Their names -> names in ModelConfig, whose defaults are the same.
HUGGING_FACE_SHAPE = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
}
NANOGPT_FILE = "ckpt.pt"
NANOGPT_ARGUMENTS = (*SHAPE, "vocab_size", "dropout")  # all fields of its GPTConfig
CONFIG_CLASSES = ("__main__.GPTConfig", "train_gpt2.GPTConfig", "model.GPTConfig")
"""what build-nanogpt pickles, whose train_gpt2.py runs or is imported; others have a model.py"""
GELU_NOTE = (
    "nanoGPT computes the exact GELU (since June 2023), GPT-2 its tanh approximation: with the "
    "same weights, logits differ in the third decimal"
)


class GPTConfig:
    """The attributes of an object of CONFIG_CLASSES, which is a dataclass."""


@dataclass(frozen=True)
class ForeignModel:
    """A GPT-2 that another tool trained."""

    shape: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    """of `hf:FOLDER` if it has one, else GPT-2's"""


def read(source: str, *, trust: bool) -> ForeignModel:
    """The model in `hf:FOLDER` or `nanogpt:FILE`, with the names there.

    Raises CheckpointError if it is missing or is not a GPT-2.
    """
    kind, _, path = source.partition(":")
    if kind == "hf":
        return _read_hugging_face(Path(path))
    return _read_nanogpt(Path(path), trust)


def _read_hugging_face(folder: Path) -> ForeignModel:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no config.json in {folder}; hf: expects a folder in Hugging Face's format, as from: "
            f"hf download openai-community/gpt2 --local-dir {shlex.quote(str(folder))}"
        )
    values = _read_json(folder / "config.json")
    for name, allowed in HUGGING_FACE_ALLOWS.items():
        if (given := values.get(name, allowed[0])) not in allowed:
            raise CheckpointError(
                f"{folder}/config.json: expected {name} {allowed[0]!r}, got {given!r}; only GPT-2 "
                "can be loaded"
            )
    tokenizer = tokenizer_export.read(folder)
    shape = _shape(
        f"{folder}/config.json",
        tokenizer,
        {ours: values[theirs] for theirs, ours in HUGGING_FACE_SHAPE.items() if theirs in values},
    )
    if values.get("n_inner") not in (None, 4 * shape.n_embd):
        raise CheckpointError(
            f"{folder}/config.json: expected n_inner of 4 × n_embd = {4 * shape.n_embd}, got "
            f"{values['n_inner']}; only GPT-2 can be loaded"
        )
    return ForeignModel(shape, _read_safetensors(folder), tokenizer)


def _read_safetensors(folder: Path) -> Weights:
    """All tensors of a folder: of model.safetensors, or of the files that its index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.exists() and index.exists():
        parts = _read_json(index).get("weight_map")
        if not isinstance(parts, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = [folder / str(name) for name in sorted(set(parts.values()))]
    weights: Weights = {}
    for file in files:
        try:
            regular_file.require(file)
            weights |= safetensors.torch.load_file(file)
        except FileNotFoundError:
            raise CheckpointError(f"no {file}{_conversion_hint(folder)}") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
    return weights


def _conversion_hint(folder: Path) -> str:
    if not list(folder.glob("pytorch_model*.bin")):
        return ""
    program = "import sys, transformers as t; f = sys.argv[1]; "
    program += "t.GPT2LMHeadModel.from_pretrained(f).save_pretrained(f)"
    name = shlex.quote(str(folder))
    return f'; convert pytorch_model.bin, a pickle, with: python -c "{program}" {name}'


def _read_nanogpt(path: Path, trust: bool) -> ForeignModel:
    if not path.is_file():
        raise CheckpointError(f"no file {path}; nanogpt: expects the path of a {NANOGPT_FILE}")
    state = store.unpickle(path, trust=trust, as_values=dict.fromkeys(CONFIG_CLASSES, GPTConfig))
    match state:
        case {"model": dict(weights), "model_args": dict(arguments)}:
            logger.warning("nanogpt:%s: %s", path, GELU_NOTE)
        case {"model": dict(weights), "config": GPTConfig() as config}:
            arguments = vars(config)
        case _:
            raise CheckpointError(
                f"{path} is not a checkpoint of nanoGPT, which has model and model_args, nor of "
                "build-nanogpt, which has model and config; for a checkpoint of this project, omit "
                "nanogpt:"
            )
    if odd := [name for name, part in weights.items() if not _is_named_tensor(name, part)]:
        raise CheckpointError(f"{path}: expected tensors in its model, got {odd[0]!r:.80}")
    if unknown := sorted(map(str, arguments.keys() - set(NANOGPT_ARGUMENTS))):
        raise CheckpointError(
            f"{path}: unknown model_args {', '.join(unknown)}; only nanoGPT's GPT-2 can be loaded"
        )
    shape = {name: value for name, value in arguments.items() if name != "dropout"}
    return ForeignModel(_shape(str(path), GPT2_TOKENIZER, shape), weights, GPT2_TOKENIZER)


def _is_named_tensor(name: object, part: object) -> bool:
    return isinstance(name, str) and isinstance(part, Tensor)


def _shape(source: str, tokenizer: Tokenizer, values: dict[str, Any]) -> ModelConfig:
    for name, value in values.items():
        if not isinstance(value, int):
            raise CheckpointError(f"{source}: expected a whole number for {name}, got {value!r}")
    if values.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        name = "GPT-2's tokenizer" if tokenizer is GPT2_TOKENIZER else tokenizer.name
        raise CheckpointError(
            f"{source}: expected a vocab_size of {tokenizer.vocab_size} or more, got "
            f"{values['vocab_size']}: it was not trained with {name}"
        )
    return ModelConfig(**values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json_fields.read(path)
    except json_fields.UNREADABLE as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
