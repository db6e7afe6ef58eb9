"""W&B without a network: a module that takes its place."""

import sys
import types
from pathlib import Path

from gpt2.config.experiment_name import ExperimentConfig
from gpt2.metrics.wandb import WandB


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, object]]] = []
        self.error: Exception | None = None
        self.dir = "runs/wandb/offline-run/files"

    def log(self, values: dict[str, object], step: int) -> None:
        if self.error:
            raise self.error
        self.rows.append((step, values))

    def finish(self) -> None:
        if self.error:
            raise self.error


class FakeWandB(types.ModuleType):
    """The part of W&B that the sink uses; going online raises `failure`."""

    class UsageError(Exception):
        pass

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(UsageError=self.UsageError)
        self.failure, self.run = failure, FakeRun()
        self.started: list[dict[str, object]] = []
        self.Html = str
        self.Settings, self.setup, self.teardown = dict, lambda settings: None, lambda: None

    def login(self) -> None:
        if self.failure:
            raise self.failure

    def init(self, **options: object) -> FakeRun:
        self.started.append(options)
        if any(letter in ":;,#?/'" for letter in str(options["id"])):  # as W&B does
            raise self.UsageError("Run ID cannot contain the characters")
        if self.failure and options["mode"] != "offline":
            raise self.failure
        return self.run


NAME = "exp_gpu_2_20260101_000000"


def open_wandb(
    monkeypatch, module: object, logged_step: int = 0, run_id: str = NAME, **settings: str
) -> WandB:
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = ExperimentConfig(use_wandb=True, **settings)
    return WandB(config, Path("runs"), NAME, run_id, {}, logged_step)
