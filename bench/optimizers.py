"""How many steps Muon needs for the loss of AdamW: `python bench/optimizers.py`.

The demo model on the standard library: AdamW in 500 steps, Muon in 70 % of them, with a schedule
that ends there. Each has the learning rates of a small grid, the two best of them have three seeds,
and the one with the lowest mean counts. The sweeps are those of `gpt2 seeds`: the same command goes
on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from gpt2.inspection import figures
from gpt2.metrics import log_reader

SHARE = 0.7
SEEDS = 3
EVERY = 50


@dataclass(frozen=True)
class Arm:
    """One optimiser, its number of steps, and where its sweep is kept."""

    optimizer: str
    schedule: str
    steps: int
    rates: list[str]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.schedule}, {self.steps} steps"

    def sweep(self, rates: list[str], seeds: int, flags: list[str]) -> dict[str, list[float]]:
        """Learning rate -> final validation losses of the seeds."""
        subprocess.run(
            [
                *(sys.executable, "-m", "gpt2", "seeds", "--preset", "demo"),
                *("--optimizer", self.optimizer, "--schedule", self.schedule),
                *("--max_steps", str(self.steps), "--eval_interval", str(EVERY)),
                *("--sample_interval", "None", "--checkpoint_dir", str(self.folder)),
                *("--log_dir", str(self.folder / "logs"), "--runs_dir", str(self.folder / "runs")),
                *("--num_seeds", str(seeds), "--grid", f"learning_rate={','.join(rates)}"),
                *flags,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        losses: dict[str, list[float]] = {}
        for line in (self.folder / "results.jsonl").read_text().splitlines():
            record = json.loads(line)
            rate = str(record["values"]["learning_rate"])
            losses.setdefault(rate, []).append(record["result"]["val_loss"])
        return losses

    def curve(self, rate: str) -> dict[int, float]:
        """Step -> mean validation loss over the seeds."""
        logs = [
            self.folder / f"learning_rate={rate},seed={seed}" / "log.txt" for seed in range(SEEDS)
        ]
        runs = [log_reader.read_runs(log)[-1].val_losses for log in logs]
        return {step: statistics.mean(run[step] for run in runs) for step in runs[0]}


def draw(curves: dict[str, dict[int, float]], goal: float) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        steps = [step for step in sorted(curve) if step > 0]
        axes.plot(steps, [curve[step] for step in steps], label=name)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="validation loss, mean of three seeds")
    axes.legend()
    return figure


def _listed(found: dict[str, list[float]]) -> str:
    ordered = sorted(found, key=float)
    return ", ".join(f"{rate}: {found[rate][0]:.4f}" for rate in ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/optimizers"))
    parser.add_argument("--picture", type=Path, default=Path("docs/optimizers.png"))
    options, flags = parser.parse_known_args()
    rates = ["0.003", "0.006", "0.012", "0.024", "0.048"]
    fewer = round(SHARE * options.steps)
    arms = [
        Arm("adamw", "cosine", options.steps, rates[:4], options.folder / "adamw"),
        Arm("muon", "cosine", fewer, rates[1:], options.folder / "muon"),
    ]
    curves, finals = {}, {}
    for arm in arms:
        found = arm.sweep(arm.rates, 1, flags)
        print(f"{arm.name}: seed 0 by learning rate {_listed(found)}")
        good = sorted(arm.rates, key=lambda rate: found[rate][0])[:2]
        tried = {rate: arm.sweep(good, SEEDS, flags)[rate] for rate in good}
        means = {rate: statistics.mean(losses) for rate, losses in tried.items()}
        for rate, losses in tried.items():
            by_seed = ", ".join(f"{loss:.4f}" for loss in losses)
            print(f"  at {rate}: {by_seed}; mean {means[rate]:.4f}", flush=True)
        best = min(means, key=means.__getitem__)
        finals[arm.name] = means[best]
        curves[f"{arm.name}, learning rate {best}"] = arm.curve(best)
    goal = finals[arms[0].name]
    for arm in arms[1:]:
        reached = "reaches" if finals[arm.name] <= goal else "does not reach"
        print(f"{arm.name} {reached} the {goal:.4f} of {arms[0].name}: {finals[arm.name]:.4f}")
    figures.write(lambda: draw(curves, goal), options.picture)


if __name__ == "__main__":
    main()
