"""The training data of a run: found, or prepared first if its text comes with Python."""

import logging
from collections.abc import Collection, Mapping

from gpt2.base.errors import DataError
from gpt2.config import mixture
from gpt2.config.mixture import CorpusRoot
from gpt2.config.model import padded
from gpt2.config.run import RunConfig
from gpt2.data import corpora, prepare, tokenizer_training, training_data
from gpt2.data.cache import ShardCache
from gpt2.data.corpus import Corpus
from gpt2.data.manifest import MANIFEST
from gpt2.data.remote import Storage
from gpt2.data.training_data import UNNAMED, MixedDataset, TrainingData
from gpt2.distributed.world import World

logger = logging.getLogger(__name__)


def open_data(
    run_config: RunConfig, world: World, names: Collection[str] | None = None
) -> TrainingData:
    """The shards of the training data; an embedded corpus is prepared first if necessary.

    `names` are those of the corpora of a run that goes on. Raises DataError if there are none.
    """

    def open_it() -> TrainingData:
        for corpus in mixture.corpora(run_config.data.data_root):
            storage = Storage(corpus.root)
            if embedded := to_prepare(storage):
                assert storage.path is not None
                tokenizer = tokenizer_training.tokenizer_of(embedded)
                prepare.prepare(embedded, storage.path, tokenizer=tokenizer, wait=True)
        # Only now: what a name means depends on what exists.
        return find(run_config, names)

    return world.run_on_rank0(open_it)


def find(run_config: RunConfig, names: Collection[str] | None = None) -> TrainingData:
    """As `open_data`, of data that is prepared.

    A glob over several folders has a corpus in each of them; folders that are no corpus of `names`,
    the run's so far, are left out.
    """
    typed, cache = mixture.corpora(run_config.data.data_root), cache_of(run_config)
    roots = {corpus.name: corpus.root for corpus in typed}
    if UNNAMED not in roots:
        return training_data.load(roots, cache)
    _require_no_name(*typed)
    root = roots[UNNAMED]
    if names is not None and UNNAMED in names:
        if training_data.has_several_corpora(root):
            logger.warning(
                "%s is read folder after folder, as its run began; a new run would mix them", root
            )
        return training_data.load(roots, cache)
    folders = training_data.folders_of(root)
    if names is not None and (folders or names):
        folders = _of_run(root, folders, names)
    return training_data.load(folders or roots, cache)


def _require_no_name(corpus: CorpusRoot) -> None:
    """Raises DataError if the folder of the only corpus is not there, and may be a name with a
    folder."""
    root = corpus.root
    if corpus.name == UNNAMED and mixture.is_named(root) and not Storage(root).files():
        raise DataError(
            f"no training data in {root}; if that is the name of a corpus and its folder, add its "
            f"weight: {root}:1"
        )


def _of_run(root: str, folders: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """The folders of the corpora that a run with these `names` has."""
    if not folders:
        raise DataError(
            f"{root} has the shards of one corpus, the run trains on {', '.join(names)}; name them "
            "with --data_root NAME=FOLDER …"
        )
    if missing := [name for name in names if name not in folders]:
        raise DataError(f"{root} has no shards of {', '.join(missing)}, which the run trains on")
    for name in sorted(folders.keys() - set(names)):
        logger.warning(
            "%s is new in %s, and no corpus of the run: name all of them with --data_root "
            "NAME=FOLDER … to add it",
            folders[name],
            root,
        )
    return {name: folders[name] for name in names}


def is_mixed_by_folders(run_config: RunConfig) -> bool:
    """Whether a new run mixes the folders that a glob stands for."""
    first, *others = mixture.corpora(run_config.data.data_root)
    try:
        return not others and not first.name and training_data.has_several_corpora(first.root)
    except DataError:  # who trains opens the data, and says what is wrong with it
        return False


def training_split(run_config: RunConfig, data: TrainingData) -> MixedDataset:
    """The rows that the run trains on."""
    return MixedDataset(data, "train", run_config.model.block_size, run_config.data.shuffle)


def cache_of(run_config: RunConfig) -> ShardCache:
    """Where the run keeps copies of remote shards."""
    settings = run_config.data
    limit_bytes = None if settings.cache_gb is None else int(settings.cache_gb * 1e9)
    return ShardCache(settings.cache_dir, limit_bytes)


def to_prepare(storage: Storage) -> Corpus | None:
    """The embedded corpus that the run prepares first because `storage` lacks it; None if there is
    nothing to prepare."""
    if mixture.is_named(storage.root):  # the folder is what follows the name
        return None
    folder = storage.path
    corpus = corpora.find(folder.name) if folder else None
    missing = folder and corpus and corpus.embedded and not (folder / MANIFEST).exists()
    return corpus if missing else None


def with_vocab_size(run_config: RunConfig, data: TrainingData) -> RunConfig:
    """The configuration, with the vocabulary size for the data's tokens where none was typed.

    Raises DataError if a model of the typed size lacks some of them.
    """
    tokens = data.tokenizer.vocab_size
    sized = run_config.with_vocab_size(padded(tokens))
    if tokens > sized.model.embedding_rows:
        raise DataError(
            f"{data} has token ids up to {tokens - 1}, the model only "
            f"{sized.model.embedding_rows}; use --vocab_size {tokens} or more"
        )
    return sized


def with_vocab_size_if_known(run_config: RunConfig) -> RunConfig:
    """As `with_vocab_size`, also before the run prepares its data; `run_config` itself if the data
    is not there, or lacks something."""
    if run_config.model.vocab_size is not None:
        return run_config
    try:
        first, *others = mixture.corpora(run_config.data.data_root)
        embedded = None if others else to_prepare(Storage(first.root))
        if embedded and embedded.vocab_size:
            return run_config.with_vocab_size(padded(embedded.vocab_size))
        return with_vocab_size(run_config, find(run_config))
    except DataError:  # who trains opens the data, and says what is wrong with it
        return run_config
