"""The training data of a run: found, or prepared first if its text comes with Python."""

from gpt2.base.errors import DataError
from gpt2.config.run import RunConfig
from gpt2.data import corpora, prepare, vocabulary
from gpt2.data.cache import ShardCache
from gpt2.data.corpus import Corpus
from gpt2.data.manifest import MANIFEST
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex, load_index
from gpt2.distributed.world import World


def open_data(run_config: RunConfig, world: World) -> DatasetIndex:
    """The shards of the training data; an embedded corpus is prepared first if necessary.

    Raises DataError if there are none, or if they do not fit the model.
    """
    root, cache = run_config.data.data_root, cache_of(run_config)

    def find() -> DatasetIndex:
        storage = Storage(root)
        if corpus := to_prepare(storage):
            assert storage.path is not None
            prepare.prepare(corpus, storage.path, wait=True)
        return load_index(Storage(root), cache)  # what its name means depends on what exists

    data = world.run_on_rank0(find)
    require_known_ids(run_config, data)
    return data


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


def require_known_ids(run_config: RunConfig, data: DatasetIndex) -> None:
    """Raises DataError if the model lacks token ids of the data, or of prompts for such a model."""
    needed = max(data.vocab_size, vocabulary.tokenizer_of(data.vocabulary).vocab_size)
    if needed > run_config.model.vocab_size:
        raise DataError(
            f"{data.storage} has token ids up to {needed - 1}, the model only "
            f"{run_config.model.vocab_size}; use --vocab_size {needed} or more"
        )
