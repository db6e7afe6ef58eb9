from pathlib import Path

import pytest
import torch

from gpt2.base.errors import ConfigError
from gpt2.distributed.world import World
from gpt2.train import setup
from support import small_config


def test_more_ranks_than_rows_are_refused(data_root: Path, tmp_path: Path):
    few_rows = small_config(data_root, tmp_path, total_batch_size=8)
    message = "total_batch_size=8 has 1 row of block_size=8, too few for 2 ranks; use"
    with pytest.raises(ConfigError, match=message):
        setup.require_enough_rows(few_rows, World(0, 2, torch.device("cpu")))
