"""The tokenizer of GPT-2 for the `tokenizers` library, as Hugging Face's format needs it."""

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gpt2.data import tokenizer

END_OF_TEXT = "<|endoftext|>"


@cache
def build() -> tokenizers.Tokenizer:
    """GPT-2's tokenizer for the `tokenizers` library, built once per process: the same ids as
    `gpt2.data.tokenizer`, but <|endoftext|> in a text becomes the special token."""
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): number for token, number in tokenizer.ranks().items()}
    vocab[END_OF_TEXT] = tokenizer.END_OF_TEXT
    merges = [(spell(first), spell(second)) for first, second in tokenizer.merges()]
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # ByteLevel has GPT-2's pattern built in.
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([END_OF_TEXT])
    return built


def _byte_letters() -> dict[int, str]:
    """The character of each byte in Hugging Face's files: its own in Latin-1 if that is visible,
    else one from U+0100 on (`bytes_to_unicode` of the published encoder)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }
