"""Weights & Biases as a metrics sink."""

import hashlib
import html
import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.config.experiment_name import ExperimentConfig
from gpt2.metrics import curves
from gpt2.metrics.records import EventRecord, Record, SamplesRecord

logger = logging.getLogger(__name__)

INSTALL = "pip install --editable '.[wandb]'"
CONNECT_S = 30
FINISH_S = 20  # torchrun kills a stopped rank after 30 s
LONGEST_ID = 128
UNSAFE = re.compile(r"[^A-Za-z0-9_.=+-]")


def safe_id(name: str) -> str:
    """The name as an id that W&B accepts: itself if it is one, else with a digest in place of what
    makes it invalid or too long."""
    safe = UNSAFE.sub("_", name)
    if safe == name and 0 < len(name) <= LONGEST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{safe[: LONGEST_ID - len(digest) - 1]}-{digest}"


def require_usable(settings: ExperimentConfig) -> None:
    """Raises ConfigError if wandb is not installed, no user is logged in, or the project has no
    valid name. A server that does not answer is only a warning: its runs are kept offline."""
    wandb = _load()
    try:
        wandb.setup(settings=_settings(wandb, project=settings.wandb_project))
        wandb.login()
    except wandb.errors.UsageError as error:
        raise _refused(error) from error
    except Exception as error:  # of many kinds: the server does not answer, or refuses
        logger.warning("W&B does not answer: %.120s", _first_line(error))
    finally:
        wandb.teardown()


class WandB:
    """Curves and samples of one run, which keeps its id however often it is resumed.

    W&B does not take back a step: those before `logged_step`, which an earlier process logged, stay
    as they are. If its server does not answer, the records go to `folder`/wandb for `wandb sync`.
    """

    def __init__(
        self,
        settings: ExperimentConfig,
        folder: Path,
        run_name: str,
        run_id: str,
        hparams: dict[str, Any],
        logged_step: int,
    ) -> None:
        """Raises ConfigError as `require_usable`."""
        self._wandb = _load()
        self._logged_step = logged_step
        options = {
            "project": settings.wandb_project,
            "name": settings.wandb_run_name or settings.name or run_name,
            "group": settings.name,
            "id": safe_id(run_id),
            "resume": "allow",
            "dir": str(folder),
            "config": hparams,
        }
        try:
            self._run = self._begin(options)
        except self._wandb.errors.UsageError as error:
            raise _refused(error) from error
        except Exception as error:  # of many kinds: the server does not answer, or refuses
            self._wandb.teardown()  # else the id counts as in use
            self._run = self._begin(options, mode="offline")
            place = Path(self._run.dir).parent
            reason = f"{_first_line(error):.120}"
            logger.warning("W&B is offline (%s); upload later with: wandb sync %s", reason, place)

    def _begin(self, options: Mapping[str, Any], mode: str | None = None) -> Any:
        quiet = _settings(self._wandb)
        self._wandb.setup(settings=quiet)  # so that it does not prompt for a key
        return self._wandb.init(**options, mode=mode, settings=quiet)

    def write(self, record: Record) -> None:
        match record:
            case EventRecord():
                pass
            case SamplesRecord(step, texts):
                blocks = "<hr>".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
                self._log({"samples": self._wandb.Html(blocks)}, step)
            case _:
                points = curves.under_former_names(curves.points_of(record)).items()
                self._log({name: at for name, at in points if math.isfinite(at)}, record.step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._call(self._run.finish)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._logged_step:  # its validation may be missing
            self._call(lambda: self._run.log(values, step=step))

    def _call(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # of many kinds; none is a bug of this package
            raise OSError(f"{type(error).__name__}: {_first_line(error)}") from error


def _settings(wandb: Any, **more: Any) -> Any:
    return wandb.Settings(
        silent=True, console="off", init_timeout=CONNECT_S, finish_timeout=FINISH_S, **more
    )


def _refused(error: Exception) -> ConfigError:
    return ConfigError(
        f"--use_wandb: {str(error).rstrip('.')}; or keep the records "
        "on this machine with WANDB_MODE=offline"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _load() -> Any:
    try:
        return importlib.import_module("wandb")  # half a second, and optional
    except ImportError as error:
        raise ConfigError(f"--use_wandb needs W&B's package ({error}); run: {INSTALL}") from error
