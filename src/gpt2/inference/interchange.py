"""Import and export of weights: GPT-2 in the formats of Hugging Face's transformers and of nanoGPT.

Both use the same names of tensors. Hugging Face stores linear layers as (in, out) matrices, as
OpenAI did. Neither format has digests: only names, shapes and architecture are checked.

Shape suffixes: D width (n_embd), V vocabulary, T positions.
"""

import functools
import json
import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch

from gpt2 import model
from gpt2.base import atomic_files
from gpt2.base.errors import CheckpointError
from gpt2.config import presets
from gpt2.config.model import ModelConfig, padded
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.inference import foreign_files, tokenizer_export
from gpt2.inference.foreign_files import (
    HUGGING_FACE_ALLOWS,
    HUGGING_FACE_SHAPE,
    NANOGPT_ARGUMENTS,
    NANOGPT_FILE,
    SHAPE,
    ForeignModel,
    Weights,
)

logger = logging.getLogger(__name__)

ExportFormat = Literal["hf", "nanogpt"]
DType = Literal["float32", "bfloat16", "float16"]

# Our names -> theirs; a block's number stands before the names in IN_BLOCK.
OUTER = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
IN_BLOCK = {
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
HEAD, EMBEDDING = "lm_head.weight", "token_embedding.weight"
PREFIXES = re.compile(r"(module\.|_orig_mod\.)*(transformer\.)?")
"""of DDP and torch.compile, in either order; of the model with its head"""
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which some files contain

HUGGING_FACE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class TrainedModel:
    """What an export writes of a trained model."""

    shape: ModelConfig
    weights: Weights
    step: int
    best_val_loss: float | None
    tokenizer: Tokenizer = GPT2_TOKENIZER


def is_foreign(init_from: str) -> bool:
    """Whether `--init_from` names weights of another tool: hf:PATH or nanogpt:PATH."""
    return init_from.startswith(("hf:", "nanogpt:"))


def load(source: str, wanted: ModelConfig, *, trust: bool) -> ForeignModel:
    """The model in `hf:FOLDER` or `nanogpt:FILE`, with weights for one of the shape `wanted`.

    They keep the file's dtype, and are mapped from the file if possible. Raises CheckpointError if
    they are missing, are not a GPT-2, or have another shape; it lists the fields that differ.
    """
    if wanted.architecture != "gpt2":
        raise CheckpointError(
            f"{source} is a GPT-2, which cannot initialise --architecture {wanted.architecture}; "
            "use --architecture gpt2, or omit --init_from"
        )
    found = foreign_files.read(source, trust=trust)
    shape = found.shape
    _refuse_other_shapes(source, shape, wanted)
    if shape.block_size > wanted.block_size:
        logger.warning(
            "%s: only the first %d of its %d positions are used",
            source,
            wanted.block_size,
            shape.block_size,
        )
    ours = _as_ours(source, found)
    return replace(ours, weights=fit(ours.weights, wanted, found.tokenizer.vocab_size))


def read(source: str, *, trust: bool) -> ForeignModel:
    """The model in `hf:FOLDER` or `nanogpt:FILE`.

    Raises CheckpointError if they are missing or are not a GPT-2.
    """
    return _as_ours(source, foreign_files.read(source, trust=trust))


def export(
    trained: TrainedModel, form: ExportFormat, folder: Path, dtype: DType, overwrite: bool
) -> None:
    """Writes `folder` atomically.

    Raises CheckpointError if the model is not a GPT-2, if the format has no place for its tokens,
    if `folder` contains other files, or if it cannot be written.
    """
    if trained.shape.architecture != "gpt2":
        raise CheckpointError(
            f"cannot export a model of --architecture {trained.shape.architecture}: both formats "
            "are for GPT-2; `gpt2 generate` and `gpt2 evaluate` read its checkpoint"
        )
    if form == "nanogpt" and trained.tokenizer is not GPT2_TOKENIZER:
        raise CheckpointError(
            f"cannot export a model of the tokens of {trained.tokenizer.name} for nanoGPT, which "
            "knows GPT-2's alone; use --format hf"
        )
    _require_replaceable(folder, overwrite)
    try:
        with atomic_files.writing_folder(folder) as temporary:
            if form == "hf":
                _write_hugging_face(temporary, trained, dtype)
            else:
                _write_nanogpt(temporary, trained, dtype)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}; free disk space, or choose another folder"
        ) from error


def their_name(name: str) -> str:
    """`blocks.3.mlp.up.weight` -> `h.3.mlp.c_fc.weight`."""
    layer, _, kind = name.rpartition(".")
    if not layer.startswith("blocks."):
        return f"{OUTER[layer]}.{kind}"
    _, number, part = layer.split(".", maxsplit=2)
    return f"h.{number}.{IN_BLOCK[part]}.{kind}"


def to_theirs(ours: Weights, shape: ModelConfig, tokens: int, *, transposed: bool) -> Weights:
    """Our weights under the names of both tools, with `tokens` rows of the vocabulary: without its
    padding.

    `transposed` returns linear layers as (in, out), and zeros for the biases of a model without
    them: the GPT-2 of transformers always has biases.
    """
    exported = replace(shape, bias=shape.bias or transposed, vocab_size=tokens)
    theirs = {}
    for name, like in _expected(exported).items():
        tensor = ours[name] if name in ours else torch.zeros(like.shape)
        if name == EMBEDDING:
            tensor = tensor[:tokens]
        theirs[f"transformer.{their_name(name)}"] = (
            tensor.T if transposed and _is_linear(name) else tensor
        )
    return theirs


def from_theirs(theirs: Weights, shape: ModelConfig, source: str, *, transposed: bool) -> Weights:
    """Their weights under our names, checked against `shape`.

    Raises CheckpointError for a missing tensor, one of another shape, or one that is not GPT-2's.
    """
    left = {
        PREFIXES.sub("", name, count=1): tensor
        for name, tensor in theirs.items()
        if not name.endswith(MASKS)
    }
    head, embedding = left.pop(HEAD, None), left.get(their_name(EMBEDDING))
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{source}: {HEAD} differs from the token embedding; GPT-2 has one matrix for both"
        )
    ours = {}
    for name, like in _expected(shape).items():
        tensor = left.pop(their_name(name), None)
        if tensor is None:
            raise CheckpointError(f"{source} has no {their_name(name)}: it is not a complete GPT-2")
        if transposed and _is_linear(name) and tensor.dim() == 2:
            tensor = tensor.T
        if tensor.shape != like.shape:
            raise CheckpointError(
                f"{source}: expected {their_name(name)} of shape {tuple(like.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
        ours[name] = tensor
    if left:
        raise CheckpointError(f"{source} has a tensor {min(left)}, which is not part of GPT-2")
    return ours


def fit(weights: Weights, wanted: ModelConfig, tokens: int) -> Weights:
    """`weights` with the number of positions of `wanted`, and its rows of the vocabulary or, if it
    has no number of them, the `tokens` padded.

    A new row of the vocabulary is the mean of the tokens: its logit is the mean of theirs, so by
    Jensen's inequality it is at most as likely as the average token, and padding to 50304 raises
    the loss by less than 0.001. (Rows of zeros would have the logit 0, and GPT-2's own logits are
    about -100.)
    """
    rows_VD, positions_TD = weights[EMBEDDING], weights["position_embedding.weight"]
    rows = wanted.vocab_size or padded(tokens)
    missing = rows - rows_VD.size(0)
    if missing > 0:
        rows_VD = rows_VD.float()
        mean_D = rows_VD[:tokens].mean(dim=0)
        rows_VD = torch.cat([rows_VD, mean_D.expand(missing, -1)])
    return weights | {
        EMBEDDING: rows_VD[:rows],
        "position_embedding.weight": positions_TD[: wanted.block_size],
    }


def _as_ours(source: str, found: ForeignModel) -> ForeignModel:
    is_transposed = source.startswith("hf:")
    ours = from_theirs(found.weights, found.shape, source, transposed=is_transposed)
    return replace(found, weights=ours)


def _refuse_other_shapes(source: str, there: ModelConfig, wanted: ModelConfig) -> None:
    """Raises CheckpointError if the shapes differ, with the fields and the flags that fit."""
    rows = {
        name: pair for name, pair in _differences(there, wanted).items() if name != "block_size"
    }
    if there.block_size < wanted.block_size:  # of a longer context the first positions are used
        rows["block_size"] = (there.block_size, wanted.block_size)
    if not rows:
        return
    listed = "; ".join(
        f"{name}: {old} in the file, {new} here" for name, (old, new) in rows.items()
    )
    flags = " ".join(_flag(name, old) for name, (old, _) in rows.items())
    same = [
        name for name, preset in presets.PRESETS.items() if not _differences(there, preset.model)
    ]
    preset = f" (it has the shape of --preset {same[0]})" if same else ""
    raise CheckpointError(f"{source} does not match the flags{preset}: {listed}; use {flags}")


def _differences(one: ModelConfig, other: ModelConfig) -> dict[str, tuple[int, int]]:
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in SHAPE}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flag(name: str, value: int) -> str:
    if name == "bias":
        return "--bias" if value else "--no_bias"
    return f"--{name} {value}"


def _write_hugging_face(folder: Path, trained: TrainedModel, dtype: DType) -> None:
    shape, tokenizer = trained.shape, trained.tokenizer
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    cut = replace(shape, vocab_size=tokenizer.vocab_size)
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": shape.block_size,  # llama.cpp's converter reads it
        "n_inner": None,
        "torch_dtype": dtype,
        **{theirs: getattr(cut, ours) for theirs, ours in HUGGING_FACE_SHAPE.items()},
        **{name: allowed[0] for name, allowed in HUGGING_FACE_ALLOWS.items()},
        **{f"{place}_pdrop": shape.dropout for place in ("attn", "embd", "resid")},
        **ends,
    }
    tokenizer_export.write(folder, tokenizer, shape.block_size)
    _write_json(folder / "config.json", described)
    _write_json(folder / "generation_config.json", ends)
    weights = to_theirs(trained.weights, shape, tokenizer.vocab_size, transposed=True)
    safetensors.torch.save_file(
        _as_saved(weights, dtype), folder / "model.safetensors", metadata={"format": "pt"}
    )
    # safetensors creates a file that only this user may read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_nanogpt(folder: Path, trained: TrainedModel, dtype: DType) -> None:
    """What nanoGPT's train.py saves, without the optimiser, which its sample.py does not read."""
    tokens = GPT2_TOKENIZER.vocab_size
    theirs = to_theirs(trained.weights, trained.shape, tokens, transposed=False)
    theirs = _as_saved(theirs, dtype)
    theirs[HEAD] = theirs[f"transformer.{their_name(EMBEDDING)}"]  # the same storage, written once
    cut = replace(trained.shape, vocab_size=tokens)
    best = trained.best_val_loss
    state = {
        "model": theirs,
        "model_args": {name: getattr(cut, name) for name in NANOGPT_ARGUMENTS},
        "iter_num": trained.step,
        "best_val_loss": 1e9 if best is None else best,  # nanoGPT's value for none
        "config": {},
    }
    torch.save(state, folder / NANOGPT_FILE)


def _as_saved(weights: Weights, dtype: DType) -> Weights:
    """Contiguous copies in `dtype`: a view would be saved with its whole storage."""
    return {
        name: tensor.to(getattr(torch, dtype)).clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if others := [name for name in there if name not in (*HUGGING_FACE_FILES, NANOGPT_FILE)]:
        raise CheckpointError(
            f"{folder} contains {others[0]}, which is not part of an export; choose another folder"
        )
    if there and not overwrite:
        raise CheckpointError(f"{folder} already contains an export; add --overwrite to replace it")


@functools.cache
def _expected(shape: ModelConfig) -> Weights:
    """Our names and shapes, on the meta device."""
    with torch.device("meta"):
        return model.build(shape).state_dict()


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and (".attention." in name or ".mlp." in name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
