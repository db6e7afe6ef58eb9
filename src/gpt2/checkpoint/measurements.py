"""What is measured after a checkpoint was saved is added to the metadata beside it."""

from dataclasses import replace
from pathlib import Path

from gpt2.base import atomic_files
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import metadata_to_json, read_metadata


def add(
    path: Path,
    *,
    val_loss: float | None = None,
    bits_per_byte: float | None = None,
    validated: str | None = None,
    val_rows: int | None = None,
    hellaswag: float | None = None,
    is_evaluated: bool = False,
) -> None:
    """Adds to the metadata of the checkpoint at `path` what was measured at its step, and points
    `best.pt` at the checkpoint with the lowest validation loss.

    What is None stays as it is. Raises OSError if the disk does not take it, and FileNotFoundError
    if the checkpoint has no readable metadata.
    """
    metadata_path = path.with_suffix(".json")
    metadata = read_metadata(metadata_path)
    if metadata is None:
        raise FileNotFoundError(f"{metadata_path} cannot be read")
    training = metadata.training
    measured = replace(
        training,
        val_loss=training.val_loss if val_loss is None else val_loss,
        bits_per_byte=training.bits_per_byte if bits_per_byte is None else bits_per_byte,
        validated=training.validated if validated is None else validated,
        val_rows=training.val_rows if val_rows is None else val_rows,
        hellaswag=training.hellaswag if hellaswag is None else hellaswag,
        is_evaluated=training.is_evaluated or is_evaluated,
    )
    if measured != training:
        text = metadata_to_json(replace(metadata, training=measured))
        atomic_files.write_text(metadata_path, text)
    store.update_links(path.parent, store.list_checkpoints(path.parent))
