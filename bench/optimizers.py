"""How many steps Muon needs for the loss of AdamW: `python bench/optimizers.py`.

The demo model on the standard library. Both optimisers have the learning rates of a small grid,
AdamW in the demo's 500 steps, Muon in 70 % of them with a schedule that ends there; then each has
three seeds at its best. The sweeps are those of `gpt2 seeds`: the same command goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from gpt2 import metrics

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
        runs = [metrics.read_runs(log)[-1].val_losses for log in logs]
        return {step: statistics.mean(run[step] for run in runs) for step in runs[0]}


def draw(curves: dict[str, dict[int, float]], goal: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        steps = [step for step in sorted(curve) if step > 0]
        axes.plot(steps, [curve[step] for step in steps], label=name)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="validation loss, mean of three seeds", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/optimizers"))
    parser.add_argument("--picture", type=Path, default=Path("docs/optimizers.png"))
    options, flags = parser.parse_known_args()
    rates = ["0.003", "0.006", "0.012", "0.024"]
    fewer = round(SHARE * options.steps)
    arms = [
        Arm("adamw", "cosine", options.steps, rates, options.folder / "adamw"),
        Arm("muon", "cosine", fewer, rates, options.folder / "muon"),
        Arm("muon", "wsd", fewer, rates, options.folder / "muon_wsd"),
    ]
    curves, finals = {}, {}
    for arm in arms:
        found = arm.sweep(arm.rates, 1, flags)
        best = min(found, key=lambda rate: found[rate][0])
        losses = arm.sweep([best], SEEDS, flags)[best]
        by_rate = ", ".join(f"{rate}: {found[rate][0]:.4f}" for rate in found)
        by_seed = ", ".join(f"{loss:.4f}" for loss in losses)
        finals[arm.name] = statistics.mean(losses)
        curves[f"{arm.name}, learning rate {best}"] = arm.curve(best)
        print(f"{arm.name}: seed 0 by learning rate {by_rate}")
        print(f"  at {best}: {by_seed}; mean {finals[arm.name]:.4f}")
    goal = finals[arms[0].name]
    for arm in arms[1:]:
        reached = "reaches" if finals[arm.name] <= goal else "does not reach"
        print(f"{arm.name} {reached} the {goal:.4f} of {arms[0].name}: {finals[arm.name]:.4f}")
    draw(curves, goal, options.picture)


if __name__ == "__main__":
    main()
