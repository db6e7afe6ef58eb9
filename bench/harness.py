"""lm-evaluation-harness 0.4 on a model of ours, without a network; not a bench by itself.

The task is the harness's own `hellaswag`, with its clean-up of texts, its prompts and its metrics;
only the place of the data is another. Needs `pip install 'lm_eval[hf]>=0.4,<0.5'`.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from gpt2 import model
from gpt2.checkpoint import store
from gpt2.config import presets
from gpt2.config.model import ModelConfig
from gpt2.inference import interchange
from gpt2.model.gpt2 import GPT2

TASK = "hellaswag_of_a_file"


@dataclass(frozen=True)
class Answer:
    """What the harness found in one task."""

    sums: list[float]
    """log-likelihood of each ending"""
    endings: list[str]
    """as the harness cleans them up"""
    label: int
    acc: float
    """1 if the ending with the highest sum is right"""
    acc_norm: float


def load_model(which: str, block_size: int | None = None) -> GPT2:
    """The model of a checkpoint, of an exported folder, or a preset's with random weights; with a
    shorter context, if `block_size` is given."""
    if which in presets.PRESETS:
        torch.manual_seed(0)
        shape = presets.preset(which).model
        weights = model.build(shape).state_dict()
    elif Path(which).is_dir():
        values = json.loads(Path(which, "config.json").read_text())
        names = interchange.HUGGING_FACE_SHAPE.items()
        shape = ModelConfig(**{ours: values[theirs] for theirs, ours in names})
        weights = interchange.load(f"hf:{which}", shape, trust=False).weights
    else:
        state = store.load(Path(which).resolve())  # the metadata is not beside a link
        shape, weights = ModelConfig(**state["config"]["model"]), state["model"]
    shape = replace(shape, block_size=block_size or shape.block_size)
    net = model.build(shape)
    net.load_state_dict(interchange.fit(weights, shape, shape.embedding_rows))
    return net.eval()


def spread(tasks: Path, count: int, folder: Path) -> Path:
    """A file in `folder` of `count` tasks from all over `tasks`: the short ones of ActivityNet come
    first there, the long ones of WikiHow last."""
    opener: Callable[..., IO[str]] = gzip.open if tasks.suffix == ".gz" else open
    with opener(tasks, "rt", encoding="utf-8") as lines:
        every = list(lines)
    count = min(count, len(every))
    chosen = folder / "tasks.jsonl"
    text = "".join(every[number * len(every) // count] for number in range(count))
    chosen.write_text(text, encoding="utf-8")
    return chosen


def prepare(net: GPT2, tasks: Path, folder: Path) -> None:
    """Puts into `folder` what the harness reads: the exported model, and where the tasks are."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    trained = interchange.TrainedModel(net.config, net.state_dict(), 0, None)
    interchange.export(trained, "hf", folder / "model", "float32", overwrite=False)
    import lm_eval.tasks  # not above: it reads the environment, and takes seconds

    theirs = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    described = {
        "include": str(theirs),
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tasks)}},
        "training_split": None,
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(described))  # JSON is YAML


def load(folder: Path, device: torch.device, batch_size: int | str) -> Any:
    """The harness's own model, in float32, with the weights of the exported one."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder / "model"), dtype="float32", device=device.type, batch_size=batch_size)


def requests(folder: Path) -> list[Any]:
    """What the harness asks a model, four requests per task: `theirs.loglikelihood` takes them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load(TASK)["tasks"][TASK]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    built: list[Any] = task.instances
    return built


def answer(folder: Path, theirs: Any) -> list[Answer]:
    """What the model that `load` gave answers to each task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        theirs,
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return [
        Answer(
            sums=[response[0] for response in sample["filtered_resps"]],
            endings=sample["doc"]["choices"],
            label=sample["doc"]["gold"],
            acc=sample["acc"],
            acc_norm=sample["acc_norm"],
        )
        for sample in sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    ]
