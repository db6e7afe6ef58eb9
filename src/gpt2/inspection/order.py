"""The rows that a run trains on in a step, as `gpt2 data order` shows them."""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass

from rich.console import Console

from gpt2.base import addresses
from gpt2.base.text import counted, table
from gpt2.base.validation import require
from gpt2.config.run import RunConfig
from gpt2.data import shards
from gpt2.data.sampler import MOST_ROWS
from gpt2.train import dataset
from gpt2.train.resume import Configure, located

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowOfStep:
    """One row."""

    corpus: str
    """its name, or where it is if it has none"""
    shard: str
    """file, relative to the folder of the corpus"""
    row: int
    """number in the shard"""


def rows_of(run_config: RunConfig, configure: Configure, step: int) -> list[RowOfStep]:
    """The rows of all ranks after `step` updates, in their order; the run is a new one, or that of
    the checkpoint which --resume names.

    Raises UserError as the run would.
    """
    start, requested = located(run_config), run_config.checkpoint.resume_from
    if requested is not None and start.path is None:
        logger.warning(
            "no checkpoint in %s: these are the rows of a new run",
            run_config.checkpoint.checkpoint_dir,
        )
    run_config = start.configured(run_config, configure)
    data = dataset.find(run_config, start.corpora)
    start.require_agreement(run_config, data)
    block_size = run_config.model.block_size
    rows_per_shard = {
        name: shards.rows_per_shard(index, "train", block_size)
        for name, index in data.corpora.items()
    }
    state = start.train_state()
    sampler = start.sampling(run_config, rows_per_shard, state).sampler
    last = MOST_ROWS // sampler.rows_per_step
    require(step <= last, f"step={step} is too large; expected 0 to {last}")
    files = [
        (name or addresses.without_secrets(index.storage.root), shard.file)
        for name, index in data.corpora.items()
        for shard in index.of("train")
    ]
    found: list[RowOfStep] = []
    for number, row in sampler.rows(state.data_step(step)).tolist():
        corpus, shard = files[number]
        found.append(RowOfStep(corpus, shard, row))
    return found


def print_rows(rows: list[RowOfStep], step: int, out: Console) -> None:
    """Prints how many rows come from each shard."""
    of_shards = Counter((row.corpus, row.shard) for row in rows)
    listing = table(
        f"{counted(len(rows), 'row')} after {counted(step, 'update')}", "corpus", "shard", "rows"
    )
    for (corpus, shard), count in sorted(of_shards.items()):
        listing.add_row(corpus, shard, f"{count:,}")
    out.print(listing)


def as_json(rows: list[RowOfStep]) -> str:
    """One JSON object per row, each on a line."""
    return "\n".join(json.dumps(asdict(row)) for row in rows)
