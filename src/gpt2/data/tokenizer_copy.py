"""The copy of a tokenizer in the folder of the shards that it writes; GPT-2's needs none."""

import contextlib
from pathlib import Path

from gpt2.base import atomic_files, json_fields
from gpt2.base.errors import DataError
from gpt2.data import tokenizer_files
from gpt2.data.manifest import MANIFEST, PROGRESS
from gpt2.data.tokenizer import Tokenizer


class TokenizerCopy:
    """`tokenizer.json` in a folder, for `tokenizer`.

    Raises DataError if the folder has one that no preparation wrote, of another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._path = folder / tokenizer_files.FILE
        self._tokenizer = tokenizer
        self._is_ours = any(_names_a_tokenizer(folder / name) for name in (MANIFEST, PROGRESS))
        if self._is_needed and not self._is_ours and self._path.exists() and not self._is_same():
            raise DataError(
                f"{self._path} is another tokenizer than {tokenizer.name}; choose another folder "
                "with --out"
            )

    def write(self) -> None:
        """Writes the copy if it is needed; removes that of another preparation."""
        if isinstance(self._tokenizer, tokenizer_files.Tokenizer):
            if not self._is_same():
                atomic_files.write_text(self._path, self._tokenizer.content)
        elif self._is_ours:
            self._path.unlink(missing_ok=True)

    @property
    def _is_needed(self) -> bool:
        return isinstance(self._tokenizer, tokenizer_files.Tokenizer)

    def _is_same(self) -> bool:
        try:
            return tokenizer_files.load(self._path).identity == self._tokenizer.identity
        except DataError:
            return False


def _names_a_tokenizer(path: Path) -> bool:
    """Whether a manifest or `progress.json` is of a preparation with another tokenizer than
    GPT-2's."""
    with contextlib.suppress(*json_fields.UNREADABLE):
        values = json_fields.read(path)
        recipe = json_fields.require_object(values.get("recipe", values))
        return recipe.get("tokenizer_digest") is not None
    return False
