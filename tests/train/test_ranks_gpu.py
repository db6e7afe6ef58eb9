"""What a run on several ranks shows of each rank's GPU, which is made up."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import forked_ranks
from support import ROOT

SCRIPT = ROOT / "tests" / "run_with_fake_gpus.py"


def test_every_rank_measures_its_gpu_at_every_step(data_root: Path, tmp_path: Path):
    arguments = [str(data_root), str(tmp_path), "max_steps=2"]
    printed = forked_ranks.run(arguments, 2, tmp_path, SCRIPT)
    assert printed.count("CPU: 2 ranks of ") == 1
    records = map(json.loads, (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if record["kind"] == "step"]
    for step in steps:
        rank_0, rank_1 = step["rank_gpu"]
        assert (rank_0["memory_gb"], rank_0["peak_memory_gb"]) == (10.0, 40.0)
        assert rank_1 == {"memory_gb": 11.0, "peak_memory_gb": 41.0}
        assert len(step["rank_s"]) == 2
    first, second = (step["rank_gpu"][0]["utilisation_percent"] for step in steps)
    assert first == 90.0 < second
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    shown = [event.value for event in events.Scalars("rank_gpu/memory_gb/1")]
    assert shown == [11.0, 11.0]
