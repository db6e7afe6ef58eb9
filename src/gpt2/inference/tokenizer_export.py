"""The tokenizer of GPT-2 for the `tokenizers` library, as Hugging Face's format needs it."""

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gpt2.data import tokenizer, tokenizer_files

END_OF_TEXT = "<|endoftext|>"


@cache
def build() -> tokenizers.Tokenizer:
    """GPT-2's tokenizer for the `tokenizers` library, built once per process: the same ids as
    `gpt2.data.tokenizer`, but <|endoftext|> in a text becomes the special token."""
    letters = tokenizer_files.byte_letters()

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
