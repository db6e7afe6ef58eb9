"""How many of GPT-2's tokens the recipe needs: `python bench/recipes.py`.

GPT-2 with AdamW and the recipe of the `fast` presets train on the standard library, with a
tokenizer of 4,096 entries, so that the matrices and not the head are what counts. Every training
has a schedule that ends with it; losses of the middle of a training are not compared.

    python bench/recipes.py reference     GPT-2 at several learning rates
    python bench/recipes.py recipe        the recipe at several shares of GPT-2's tokens
    python bench/recipes.py parts         every part that was tried, and without each of them
    python bench/recipes.py tried         the recipe with other options that it does not have
    python bench/recipes.py noise         both again with two other seeds
    python bench/recipes.py repeat        the same without parts whose worth may be noise
    python bench/recipes.py report        the share at which the recipe has GPT-2's loss; pictures
    python bench/recipes.py speed         a step of both, in turns

The trainings are sweeps of `gpt2 seeds`: the same command goes on. What has finished is added to
`bench/results/recipes.jsonl`, and is not trained again, also on another machine.
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from turns import Contender, Timed, ratio, serve, take_turns

from gpt2.cli import train
from gpt2.config.run import RunConfig
from gpt2.data import corpora, prepare, tokenizer_training
from gpt2.distributed import rendezvous
from gpt2.inspection import figures
from gpt2.metrics import log_reader
from gpt2.train import trainer
from gpt2.train.replica import Replica

RESULTS = Path(__file__).parent / "results/recipes.jsonl"
VOCABULARY = 4096
EVALUATIONS = 10
WARMUP, MOMENTUM_WARMUP = 0.07, 0.28
"""shares of the steps"""


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
SHARES = (0.125, 0.25)
"""of GPT-2's tokens"""
SHARE_OF_PARTS = 0.125
LEFT_OUT = ["--layer_skip", "--cautious_decay"]
"""parts that were worth nothing, which the presets no longer have"""
WITHOUT: dict[str, list[str]] = {
    "zero_init": ["--no_zero_init"],
    "untied_head": ["--no_untied_head", "--embedding_lr_ratio", "1"],
    "logit_softcap": ["--logit_softcap", "None"],
    "value_embeddings": ["--no_value_embeddings"],
    "embedding_skip": ["--no_embedding_skip"],
    "layer_skip": ["--layer_skip=false"],
    "normuon": ["--optimizer", "muon"],
    "muon": ["--optimizer", "adamw"],
    "cautious_decay": ["--cautious_decay=false"],
    "momentum_warmup": ["--momentum_warmup", "0"],
    "embedding_lr_ratio": ["--embedding_lr_ratio", "1"],
    "wsd": ["--schedule", "cosine", "--min_lr_ratio", "0.1"],
}
"""flags that take a part of the recipe with `LEFT_OUT` away"""
TRIED: dict[str, tuple[list[str], int]] = {
    "sliding_window": (["--sliding_window", "64"], 0),
    "head_lr_ratio 0.3": (["--head_lr_ratio", "0.3"], 0),
    "head_lr_ratio 3": (["--head_lr_ratio", "3"], 0),
    "scalar_lr_ratio 0.3": (["--scalar_lr_ratio", "0.3"], 0),
    "scalar_lr_ratio 3": (["--scalar_lr_ratio", "3"], 0),
    "batch_ramp": (["--batch_ramp", "100:2048"], 50),
    "one head": (["--n_head", "1"], 0),
}
"""flags that are added to the recipe, and more steps, so that it has as many tokens"""


@dataclass(frozen=True)
class Trained:
    """One finished training, a line of RESULTS."""

    size: str
    arm: str
    learning_rate: float
    steps: int
    seed: int
    settings: str
    """digest of the run's options, without learning rate, seed and folders, and of its data"""
    tokens: int
    val_loss: float
    bits_per_byte: float
    hellaswag: float | None
    train_s: float
    """with the load that the machine had"""
    curve: dict[int, float]
    """step -> validation loss"""


@dataclass(frozen=True)
class Arm:
    """Trainings that differ in learning rate and seed alone."""

    name: str
    flags: list[str]
    rates: Sequence[float]
    steps: int


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

    @property
    def reference(self) -> Arm:
        flags = ["--preset", "gpt2-124m"]
        return Arm("gpt2", flags, self.size.reference_rates, self.size.steps)

    def recipe(self, share: float, more_steps: int = 0) -> Arm:
        """The recipe with a share of GPT-2's tokens."""
        steps = round(share * self.size.steps) + more_steps
        return Arm("recipe", self._recipe_flags(steps), [self.size.rate], steps)

    @property
    def every_part(self) -> Arm:
        """The recipe with `LEFT_OUT`."""
        recipe = self.recipe(SHARE_OF_PARTS)
        return replace(recipe, name="every part", flags=[*recipe.flags, *LEFT_OUT])

    def without(self, part: str) -> Arm:
        whole, rate = self.every_part, self.size.rate
        rates = [rate / 16, rate / 8, rate / 4, rate / 2] if part == "muon" else [rate]
        return Arm(f"without {part}", [*whole.flags, *WITHOUT[part]], rates, whole.steps)

    def tried(self, name: str) -> Arm:
        flags, more_steps = TRIED[name]
        arm = self.recipe(SHARE_OF_PARTS, more_steps)
        return replace(arm, name=f"with {name}", flags=[*arm.flags, *flags])

    def train(self, arm: Arm, seeds: int = 1) -> None:
        """Trains what is not in RESULTS yet, and adds it there."""
        wanted = {(rate, seed) for rate in arm.rates for seed in range(seeds)}
        wanted -= {(item.learning_rate, item.seed) for item in self.finished(arm)}
        if not wanted:
            return
        rates = ",".join(str(rate) for rate in sorted({rate for rate, _ in wanted}))
        first = min(seed for _, seed in wanted)
        folder = self.folder / self.size_name / f"{arm.name},{arm.steps},{self._settings(arm)}"
        print(f"{self.size_name} {arm.name}: {arm.steps} steps at {rates}", flush=True)
        command = [
            *(sys.executable, "-m", "gpt2", "seeds", *self._flags(arm), "--keep_last", "2"),
            *("--first_seed", str(first), "--num_seeds", str(seeds - first)),
            *("--grid", f"learning_rate={rates}"),
            *("--checkpoint_dir", str(folder), "--log_dir", str(folder / "logs")),
            *("--runs_dir", str(folder / "runs"), "--slots", str(self.slots)),
        ]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code not in (0, 1):  # 1: some have failed, and the others count
            raise SystemExit(code)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as results:
            for item in self._read(arm, folder):
                if (item.learning_rate, item.seed) in wanted:
                    wanted.remove((item.learning_rate, item.seed))
                    results.write(json.dumps(asdict(item)) + "\n")
        for rate, seed in sorted(wanted):
            print(f"{self.size_name} {arm.name}: failed at {rate}, seed {seed}")

    def finished(self, arm: Arm) -> list[Trained]:
        """The trainings of an arm in RESULTS, with its options of today."""
        if not RESULTS.exists():
            return []
        settings = self._settings(arm)
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        return [
            Trained(**{**line, "curve": {int(step): loss for step, loss in line["curve"].items()}})
            for line in lines
            if (line["size"], line["arm"], line["settings"]) == (self.size_name, arm.name, settings)
        ]

    def _read(self, arm: Arm, folder: Path) -> Iterator[Trained]:
        """What has finished in the folder of a sweep."""
        results = folder / "results.jsonl"
        for line in results.read_text().splitlines() if results.exists() else ():
            record = json.loads(line)
            if record["state"] != "finished":
                continue
            values, result = record["values"], record["result"]
            run = log_reader.read_runs(folder / record["job"] / "log.txt")[-1]
            yield Trained(
                size=self.size_name,
                arm=arm.name,
                learning_rate=values["learning_rate"],
                steps=arm.steps,
                seed=values["seed"],
                settings=self._settings(arm),
                tokens=result["tokens"],
                val_loss=result["val_loss"],
                bits_per_byte=result["bits_per_byte"],
                hellaswag=result["hellaswag"],
                train_s=result["train_s"],
                curve=dict(run.val_losses),
            )

    def _recipe_flags(self, steps: int) -> list[str]:
        """The options of the `fast` presets, whose sizes and lengths are replaced."""
        return ["--preset", "fast-124m", "--momentum_warmup", str(int(MOMENTUM_WARMUP * steps))]

    def _flags(self, arm: Arm) -> list[str]:
        return [
            *("--data_root", str(self.data), "--max_steps", str(arm.steps)),
            *(f"--{name}={value}" for name, value in self.size.flags.items()),
            *("--shuffle", "global", "--warmup_steps", str(int(WARMUP * arm.steps))),
            *("--eval_rows", "512", "--eval_interval", str(-(-arm.steps // EVALUATIONS))),
            *("--sample_interval", "None", "--hellaswag_interval", "None"),
            *("--mini_batch_size", "16", "--dtype", "float32", *arm.flags, *self.flags),
        ]

    def _settings(self, arm: Arm) -> str:
        """A digest of what decides about a training, beside learning rate and seed: options that
        are not at their defaults, and the tokens."""
        run, default = train.parse_train(self._flags(arm)).run.to_dict(), RunConfig().to_dict()
        decides = {
            f"{part}.{name}": value
            for part in ("model", "data", "optim", "evaluation", "machine")
            for name, value in run[part].items()
            if value != default[part][name] and name != "data_root"
        }
        manifest = json.loads((self.data / "manifest.json").read_text())
        shards = [shard["sha256"] for shard in manifest["shards"]]
        text = json.dumps([decides, shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def train_reference(bench: Bench) -> None:
    bench.train(bench.reference)


def train_recipe(bench: Bench) -> None:
    for share in SHARES:
        bench.train(bench.recipe(share))


def train_parts(bench: Bench) -> None:
    bench.train(bench.every_part)
    for part in WITHOUT:
        bench.train(bench.without(part))


def train_tried(bench: Bench) -> None:
    for name in TRIED:
        bench.train(bench.tried(name))


def repeat_parts(bench: Bench) -> None:
    """Two more seeds without each part whose worth may be noise: its loss differs by less than two
    standard errors of the difference of two trainings."""
    whole = [item.val_loss for item in bench.finished(bench.every_part)]
    two_errors = 2 * math.sqrt(2) * statistics.stdev(whole)
    known = {part: bench.finished(bench.without(part)) for part in WITHOUT}
    worth = {part: abs(_mean(found, {0}) - whole[0]) for part, found in known.items() if found}
    for part in sorted(worth, key=worth.__getitem__):
        if worth[part] < two_errors:
            bench.train(bench.without(part), seeds=3)


def train_noise(bench: Bench) -> None:
    bench.train(bench.every_part, seeds=3)
    for share in SHARES:
        bench.train(bench.recipe(share), seeds=3)
    best = best_rate(bench.finished(bench.reference))
    bench.train(replace(bench.reference, rates=[best]), seeds=3)


def best_rate(trained: Iterable[Trained]) -> float:
    """The learning rate with the lowest loss at seed 0."""
    of_seed_0 = [item for item in trained if item.seed == 0]
    return min(of_seed_0, key=lambda item: item.val_loss).learning_rate


def steps_of(bench: Bench, arm: Arm) -> Timed:
    """What times train steps of an arm on one thread, with random tokens."""
    torch.set_num_threads(1)
    run = train.parse_train(bench._flags(arm)).run.with_vocab_size(VOCABULARY)
    tokens_RT = torch.randint(VOCABULARY, (run.rows_per_step, run.model.block_size + 1))
    micro_batches = [
        (rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous())
        for rows_BT in tokens_RT.split(int(run.data.mini_batch_size))
    ]
    with rendezvous.join(run.machine) as world:
        replica = Replica(run, world)

    def timed(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            trainer.train_step(replica, micro_batches, run.data.total_batch_size, 1e-3)
            times.append(time.perf_counter() - began)
        return times

    return timed


def speed(bench: Bench) -> None:
    contenders = []
    for name in ("gpt2", "recipe"):
        command = [sys.executable, __file__, "speed", "--size", bench.size_name, "--serve", name]
        contenders.append(Contender.start(name, [*command, "--data", str(bench.data)]))
        contenders[-1].run(2)
    for _ in take_turns(contenders, rounds=7, steps=4):
        pass
    for contender in contenders:
        contender.end()
    reference, recipe = (contender.rounds for contender in contenders)
    print(f"a step of GPT-2: {1000 * statistics.median(reference):.0f} ms")
    print(f"a step of the recipe takes {ratio(reference, recipe)} times as long")


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
    reference = sorted(bench.finished(bench.reference), key=lambda i: (i.learning_rate, i.seed))
    for item in reference:
        print(f"GPT-2, {item.learning_rate}, seed {item.seed}: {_shown(item)}")
    best = [item for item in reference if item.learning_rate == best_rate(reference)]
    recipes = {share: bench.finished(bench.recipe(share)) for share in SHARES}
    for share, found in recipes.items():
        for item in found:
            print(f"recipe, {share} of the tokens, seed {item.seed}: {_shown(item)}")
    seeds = {item.seed for item in best}
    trained = {share: found for share, found in recipes.items() if found}
    for found in trained.values():
        seeds &= {item.seed for item in found}
    if not seeds:
        raise SystemExit("no seed has both recipes yet")
    goal = _mean(best, seeds)
    share = share_at(goal, {share: _mean(found, seeds) for share, found in trained.items()})
    where = "is not reached" if share is None else f"is reached with {share:.3f} of the tokens"
    print(f"{len(seeds)} seeds: GPT-2's {goal:.4f} {where}")
    for part in WITHOUT:
        compare(bench.finished(bench.without(part)), bench.finished(bench.every_part))
    for name in TRIED:
        compare(bench.finished(bench.tried(name)), recipes[SHARE_OF_PARTS])
    if bench.flags or bench.data.name != "python_stdlib":
        return  # the pictures of docs/recipe.md are of the bench as it stands
    picture = Path(f"docs/recipe_{bench.size_name.replace('.', '_')}.png")
    curves = [item for item in (*best, *itertools.chain(*recipes.values())) if item.seed == 0]
    figures.write(lambda: draw(curves, goal), picture)


def compare(changed: Iterable[Trained], whole: Iterable[Trained]) -> None:
    """Prints the losses of a changed recipe, and their difference for the same seeds on average."""
    losses = {item.seed: item.val_loss for item in whole}
    found = sorted((item for item in changed if item.seed in losses), key=_rate)
    for rate, of_rate in itertools.groupby(found, _rate):
        items = sorted(of_rate, key=lambda item: item.seed)
        more = statistics.mean(item.val_loss - losses[item.seed] for item in items)
        listed = ", ".join(f"{item.val_loss:.4f}" for item in items)
        print(f"{items[0].arm}, {rate}: {listed} ({more:+.4f})")


def _rate(item: Trained) -> float:
    return item.learning_rate


def _mean(trained: Iterable[Trained], seeds: Container[int]) -> float:
    return statistics.mean(item.val_loss for item in trained if item.seed in seeds)


def draw(trained: Iterable[Trained], goal: float) -> Figure:
    """Validation losses by tokens."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for item in sorted(trained, key=lambda item: item.tokens):
        steps = [step for step in sorted(item.curve) if step > 0]
        tokens = [step * item.tokens / item.steps / 1e6 for step in steps]
        name = "GPT-2, AdamW" if item.arm == "gpt2" else "recipe"
        label = f"{name}, {item.tokens / 1e6:.1f} million tokens"
        axes.plot(tokens, [item.curve[step] for step in steps], label=label)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="million tokens", ylabel="validation loss")
    axes.legend()
    return figure


def _shown(item: Trained) -> str:
    hellaswag = "" if item.hellaswag is None else f", HellaSwag {item.hellaswag:.3f}"
    return f"{item.val_loss:.4f}, {item.bits_per_byte:.4f} bits per byte{hellaswag}"


def prepared(folder: Path) -> Path:
    """The standard library in tokens of a tokenizer that is learned from it."""
    corpus, data = corpora.CORPORA["python_stdlib_4k"], folder / "python_stdlib"
    if not (data / "manifest.json").exists():
        prepare.prepare(corpus, data, tokenizer=tokenizer_training.tokenizer_of(corpus))
    return data


COMMANDS = {
    "reference": train_reference,
    "recipe": train_recipe,
    "parts": train_parts,
    "tried": train_tried,
    "noise": train_noise,
    "repeat": repeat_parts,
    "report": report,
    "speed": speed,
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
    parser.add_argument("--serve", choices=("gpt2", "recipe"), help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    data = options.data or prepared(options.folder / "data")
    bench = Bench(options.folder, data, options.size, options.slots, flags)
    if options.serve:
        arm = bench.reference if options.serve == "gpt2" else bench.recipe(1)
        serve(lambda: steps_of(bench, arm))
    else:
        COMMANDS[options.command](bench)


if __name__ == "__main__":
    main()
