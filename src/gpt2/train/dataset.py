"""The training data of a run: found, or prepared first if its text comes with Python."""

from gpt2.base.errors import DataError
from gpt2.config.model import padded
from gpt2.config.run import RunConfig
from gpt2.data import corpora, prepare
from gpt2.data.cache import ShardCache
from gpt2.data.corpus import Corpus
from gpt2.data.manifest import MANIFEST
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index
from gpt2.distributed.world import World


def open_data(run_config: RunConfig, world: World) -> DatasetIndex:
    """The shards of the training data; an embedded corpus is prepared first if necessary.

    Raises DataError if there are none.
    """
    root, cache = run_config.data.data_root, cache_of(run_config)

    def find() -> DatasetIndex:
        storage = Storage(root)
        if corpus := to_prepare(storage):
            assert storage.path is not None
            prepare.prepare(corpus, storage.path, wait=True)
        return load_index(Storage(root), cache)  # what its name means depends on what exists

    return world.run_on_rank0(find)


def training_split(run_config: RunConfig, data: DatasetIndex) -> TokenDataset:
    """The rows that the run trains on."""
    return TokenDataset(data, "train", run_config.model.block_size, run_config.data.shuffle)


def cache_of(run_config: RunConfig) -> ShardCache:
    """Where the run keeps copies of remote shards."""
    settings = run_config.data
    limit_bytes = None if settings.cache_gb is None else int(settings.cache_gb * 1e9)
    return ShardCache(settings.cache_dir, limit_bytes)


def to_prepare(storage: Storage) -> Corpus | None:
    """The embedded corpus that the run prepares first because `storage` lacks it; None if there is
    nothing to prepare."""
    folder = storage.path
    corpus = corpora.find(folder.name) if folder else None
    missing = folder and corpus and corpus.embedded and not (folder / MANIFEST).exists()
    return corpus if missing else None


def with_vocab_size(run_config: RunConfig, data: DatasetIndex) -> RunConfig:
    """The configuration, with the vocabulary size for the data's tokens where none was typed.

    Raises DataError if a model of the typed size lacks some of them.
    """
    tokens = data.tokenizer.vocab_size
    sized = run_config.with_vocab_size(padded(tokens))
    if tokens > sized.model.embedding_rows:
        raise DataError(
            f"{data.storage} has token ids up to {tokens - 1}, the model only "
            f"{sized.model.embedding_rows}; use --vocab_size {tokens} or more"
        )
    return sized


def with_vocab_size_if_known(run_config: RunConfig) -> RunConfig:
    """As `with_vocab_size`; `run_config` itself if the data is not there, or lacks something."""
    if run_config.model.vocab_size is not None:
        return run_config
    try:
        return with_vocab_size(run_config, load_index(Storage(run_config.data.data_root)))
    except DataError:  # who trains opens the data, and says what is wrong with it
        return run_config
