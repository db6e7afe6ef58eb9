"""How many of GPT-2's tokens the recipe needs: `python bench/recipes.py`.

GPT-2 with AdamW and the recipe of the `fast` presets train on the standard library, with a
tokenizer of 4,096 entries, so that the matrices and not the head are what counts. Every training
has a schedule that ends with it; losses of the middle of a training are not compared.

    python bench/recipes.py reference     GPT-2 at several learning rates
    python bench/recipes.py recipe        the recipe at several shares of GPT-2's tokens
    python bench/recipes.py parts         the recipe without each of its parts
    python bench/recipes.py noise         both again with other seeds
    python bench/recipes.py report        the share at which the recipe has GPT-2's loss; pictures

The trainings are sweeps of `gpt2 seeds`: the same command goes on. What has finished is added to
`bench/results/recipes.jsonl`, and is not trained again, also on another machine.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from gpt2.data import corpora
from gpt2.inspection import figures
from gpt2.metrics import log_reader

RESULTS = Path(__file__).parent / "results/recipes.jsonl"
VOCABULARY = 4096
EVALUATIONS = 10
WARMUP = 0.07
"""share of the steps"""
REFERENCE, RECIPE = "gpt2", "recipe"


@dataclass(frozen=True)
class Size:
    """A model, and how long GPT-2 trains it: 20 tokens for each weight of its matrices."""

    flags: Mapping[str, int]
    steps: int
    reference_rates: tuple[float, ...]
    rate: float
    """learning rate of the recipe"""


SIZES = {
    "0.44m": Size(
        {"n_layer": 4, "n_head": 3, "n_embd": 96, "block_size": 256, "total_batch_size": 4096},
        steps=2150,
        reference_rates=(0.004, 0.008, 0.016),
        rate=0.02,
    ),
    "1.57m": Size(
        {"n_layer": 8, "n_head": 4, "n_embd": 128, "block_size": 256, "total_batch_size": 8192},
        steps=3840,
        reference_rates=(0.003, 0.006),
        rate=0.017,
    ),
}
SHARES = (0.06, 0.125, 0.25)
"""of GPT-2's tokens"""
SHARE_OF_PARTS = 0.125
WITHOUT: dict[str, list[str]] = {
    "zero_init": ["--no_zero_init"],
    "untied_head": ["--no_untied_head"],
    "logit_softcap": ["--logit_softcap", "None"],
    "value_embeddings": ["--no_value_embeddings"],
    "embedding_skip": ["--no_embedding_skip"],
    "layer_skip": ["--no_layer_skip"],
    "normuon": ["--optimizer", "muon"],
    "muon": ["--optimizer", "adamw"],
    "cautious_decay": ["--no_cautious_decay"],
    "embedding_lr_ratio": ["--embedding_lr_ratio", "1"],
    "wsd": ["--schedule", "cosine", "--min_lr_ratio", "0.1"],
}
"""flags that take a part of the recipe away"""


@dataclass(frozen=True)
class Trained:
    """One finished training, a line of RESULTS."""

    size: str
    arm: str
    learning_rate: float
    steps: int
    seed: int
    corpus: str
    tokens: int
    val_loss: float
    bits_per_byte: float
    hellaswag: float | None
    curve: dict[int, float]
    """step -> validation loss"""


@dataclass(frozen=True)
class Bench:
    """Where the trainings are kept, and how they are started."""

    folder: Path
    data: Path
    size_name: str
    slots: int
    flags: list[str]
    """more flags for every training"""

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def train(
        self, arm: str, flags: Iterable[str], rates: Iterable[float], steps: int, seeds: int = 1
    ) -> None:
        """Trains what is not in RESULTS yet, and adds it there."""
        wanted = {(rate, steps, seed) for rate in rates for seed in range(seeds)}
        wanted -= {
            (item.learning_rate, item.steps, item.seed) for item in self.known() if item.arm == arm
        }
        if not wanted:
            return
        missing = ",".join(str(rate) for rate in sorted({rate for rate, _, _ in wanted}))
        folder = self.folder / self.size_name / f"{arm},steps={steps}"
        shape = [f"--{name}={value}" for name, value in self.size.flags.items()]
        command = [
            *(sys.executable, "-m", "gpt2", "seeds", "--data_root", str(self.data), *flags, *shape),
            *("--num_seeds", str(seeds), "--grid", f"learning_rate={missing}"),
            *("--slots", str(self.slots), "--max_steps", str(steps), "--shuffle", "global"),
            *("--warmup_steps", str(int(WARMUP * steps)), "--eval_rows", "512"),
            *("--eval_interval", str(-(-steps // EVALUATIONS)), "--sample_interval", "None"),
            *("--hellaswag_interval", "None", "--mini_batch_size", "16", "--dtype", "float32"),
            *("--checkpoint_dir", str(folder), "--log_dir", str(folder / "logs")),
            *("--runs_dir", str(folder / "runs"), "--keep_last", "2", *self.flags),
        ]
        print(f"{self.size_name} {arm}: {steps} steps at {missing}, {seeds} seeds", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with RESULTS.open("a") as results:
            for item in self._finished(arm, folder, steps):
                if (item.learning_rate, item.steps, item.seed) in wanted:
                    results.write(json.dumps(asdict(item)) + "\n")

    def known(self) -> list[Trained]:
        """The trainings of this size on this corpus in RESULTS."""
        if not RESULTS.exists():
            return []
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        return [
            Trained(**{**line, "curve": {int(step): loss for step, loss in line["curve"].items()}})
            for line in lines
            if (line["size"], line["corpus"]) == (self.size_name, self.data.name)
        ]

    def _finished(self, arm: str, folder: Path, steps: int) -> Iterator[Trained]:
        for line in (folder / "results.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["state"] != "finished":
                continue
            values, result = record["values"], record["result"]
            run = log_reader.read_runs(folder / record["job"] / "log.txt")[-1]
            yield Trained(
                size=self.size_name,
                arm=arm,
                learning_rate=values["learning_rate"],
                steps=steps,
                seed=values["seed"],
                corpus=self.data.name,
                tokens=result["tokens"],
                val_loss=result["val_loss"],
                bits_per_byte=result["bits_per_byte"],
                hellaswag=result["hellaswag"],
                curve=dict(run.val_losses),
            )


def recipe_flags() -> list[str]:
    """The parts of the `fast` presets, without their sizes."""
    return ["--preset", "fast-124m"]


REFERENCE_FLAGS = ["--preset", "gpt2-124m"]


def best_rate(trained: Iterable[Trained]) -> float:
    """The learning rate with the lowest loss at seed 0."""
    return min((item for item in trained if item.seed == 0), key=lambda i: i.val_loss).learning_rate


def reference(bench: Bench, seeds: int = 1) -> None:
    size = bench.size
    rates: Iterable[float] = size.reference_rates
    if seeds > 1:
        rates = [best_rate(item for item in bench.known() if item.arm == REFERENCE)]
    bench.train(REFERENCE, REFERENCE_FLAGS, rates, size.steps, seeds)


def recipe(bench: Bench, seeds: int = 1) -> None:
    for share in SHARES:
        steps = round(share * bench.size.steps)
        bench.train(RECIPE, recipe_flags(), [bench.size.rate], steps, seeds)


def parts(bench: Bench) -> None:
    steps = round(SHARE_OF_PARTS * bench.size.steps)
    for name, flags in WITHOUT.items():
        bench.train(f"without {name}", recipe_flags() + flags, [bench.size.rate], steps)


def noise(bench: Bench) -> None:
    recipe(bench, seeds=3)
    reference(bench, seeds=3)


def share_at(goal: float, losses: Mapping[float, float]) -> float | None:
    """The share of tokens at which the final losses pass `goal`, between two shares by the
    logarithm of the share; None if the longest training does not reach it."""
    shares = sorted(losses)
    if losses[shares[-1]] > goal:
        return None
    if losses[shares[0]] <= goal:
        return shares[0]
    for left, right in itertools.pairwise(shares):
        if losses[right] <= goal:
            part = (losses[left] - goal) / (losses[left] - losses[right])
            return math.exp(math.log(left) + part * math.log(right / left))
    raise AssertionError


def report(bench: Bench) -> None:
    known = bench.known()
    of_reference = [item for item in known if item.arm == REFERENCE]
    rate = best_rate(of_reference)
    for item in sorted(of_reference, key=lambda item: (item.learning_rate, item.seed)):
        print(f"GPT-2, {item.learning_rate}, seed {item.seed}: {_shown(item)}")
    goal = statistics.mean(i.val_loss for i in of_reference if i.learning_rate == rate)
    losses: dict[float, float] = {}
    for share in SHARES:
        steps = round(share * bench.size.steps)
        found = [item for item in known if item.arm == RECIPE and item.steps == steps]
        if found:
            losses[share] = statistics.mean(item.val_loss for item in found)
        for item in found:
            print(f"recipe, {share} of the tokens, seed {item.seed}: {_shown(item)}")
    if losses:
        share = share_at(goal, losses)
        where = "is not reached" if share is None else f"is reached with {share:.2f} of the tokens"
        print(f"GPT-2's {goal:.4f} {where}")
    whole = losses.get(SHARE_OF_PARTS)
    for item in known:
        if item.arm.startswith("without ") and whole is not None:
            print(f"{item.arm}: {item.val_loss:.4f} ({item.val_loss - whole:+.4f})")
    picture = Path(f"docs/recipe_{bench.size_name.replace('.', '_')}.png")
    figures.write(lambda: draw(known, rate, goal), picture)


def draw(known: list[Trained], rate: float, goal: float) -> Figure:
    """Validation losses by tokens, of seed 0."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for item in sorted(known, key=lambda item: item.tokens):
        is_shown = item.arm == RECIPE or (item.arm == REFERENCE and item.learning_rate == rate)
        if is_shown and item.seed == 0:
            steps = [step for step in sorted(item.curve) if step > 0]
            tokens = [step * item.tokens / item.steps / 1e6 for step in steps]
            name = "GPT-2, AdamW" if item.arm == REFERENCE else "recipe"
            label = f"{name}, {item.tokens / 1e6:.1f} million tokens"
            axes.plot(tokens, [item.curve[step] for step in steps], label=label)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="million tokens", ylabel="validation loss", ylim=(None, goal + 1.5))
    axes.legend()
    return figure


def _shown(item: Trained) -> str:
    hellaswag = "" if item.hellaswag is None else f", HellaSwag {item.hellaswag:.3f}"
    return f"{item.val_loss:.4f}, {item.bits_per_byte:.4f} bits per byte{hellaswag}"


def prepare(folder: Path) -> Path:
    """The standard library in tokens of a tokenizer that was trained on it."""
    data = folder / "python_stdlib"
    if not (data / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts, tokenizer = folder / "stdlib.jsonl", folder / "tokenizer"
        with texts.open("w") as file:
            for document in corpora.python_stdlib():
                file.write(json.dumps({"text": document.text}) + "\n")
        program = [sys.executable, "-m", "gpt2"]
        train = ["tokenizer", "train", str(texts), "--vocab_size", str(VOCABULARY)]
        subprocess.run([*program, *train, "--out", str(tokenizer)], check=True)
        corpus = ["data", "python-stdlib", "--tokenizer", str(tokenizer), "--out", str(data)]
        subprocess.run([*program, *corpus], check=True)
    return data


COMMANDS = {
    "reference": reference,
    "recipe": recipe,
    "parts": parts,
    "noise": noise,
    "report": report,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--size", choices=SIZES, default="0.44m")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/recipes"))
    parser.add_argument("--data", type=Path, help="another corpus, of 4,096 entries or so")
    parser.add_argument("--slots", type=int, default=2)
    options, flags = parser.parse_known_args()
    data = options.data or prepare(options.folder / "data")
    COMMANDS[options.command](Bench(options.folder, data, options.size, options.slots, flags))


if __name__ == "__main__":
    main()
