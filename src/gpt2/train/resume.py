"""Where a run starts: from scratch, with given weights, or at a checkpoint."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2.base.errors import CheckpointError, ConfigError, DataError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import CheckpointState, read_metadata
from gpt2.config import mixture, options, presets
from gpt2.config.lr_schedule import lr_at
from gpt2.config.mixture import StepPhase
from gpt2.config.run import RunConfig
from gpt2.data import saved_tokenizer
from gpt2.data.manifest import Shard, Split
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler
from gpt2.data.shards import ENDS, DatasetIndex, Fingerprint
from gpt2.data.tokenizer import GPT2_TOKENIZER, Tokenizer
from gpt2.data.training_data import UNNAMED, TrainingData
from gpt2.distributed.world import World
from gpt2.inference import interchange
from gpt2.train import dataset, experiment_folder, launch, saved_run
from gpt2.train.evaluator import Validation, validation
from gpt2.train.micro_batch import FittedRows
from gpt2.train.replica import Replica
from gpt2.train.saved_run import SavedRun
from gpt2.train.state import TrainState

logger = logging.getLogger(__name__)
SPLITS: dict[Split, str] = {"train": "training data", "val": "validation data"}
MIXTURE = "mixture"
"""in a checkpoint of a run with several corpora: the phases, first those that have begun"""
UNNOTICED = 0.01
"""a relative change of the learning rate at a resume that is not reported"""
Validations = tuple[Validation, Validation]
"""in the run of a checkpoint, and from here on"""
Configure = Callable[[Mapping[str, Any] | None], RunConfig]
"""the configuration that was typed, on top of the one in a checkpoint; None for a new run"""


@dataclass(frozen=True)
class InitialWeights:
    """What --init_from names."""

    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer | None
    """None for a checkpoint that does not say"""

    def require_tokens_of(self, data: TrainingData, source: str) -> None:
        """Raises CheckpointError if the data has tokens of another tokenizer; it calls the weights
        `source`."""
        if not saved_tokenizer.is_same(self.tokenizer, data.tokenizer):
            before = saved_tokenizer.described(self.tokenizer or GPT2_TOKENIZER)
            raise CheckpointError(
                f"the weights of {source} are for the tokens of {before}, {data} has those "
                f"of {saved_tokenizer.described(data.tokenizer)}; use data of the same tokenizer, "
                "or omit --init_from"
            )


@dataclass(frozen=True)
class Sampling:
    """Which rows a run trains on, and for how long."""

    sampler: Sampler
    phases: tuple[StepPhase, ...]
    """the weights of several corpora, from the first step of the run on; none with one corpus"""
    total_steps: int


@dataclass(frozen=True)
class StartingPoint:
    """A checkpoint to resume, weights to start with, or neither: a run from scratch."""

    path: Path | None = None
    """of the checkpoint"""
    checkpoint: CheckpointState | None = None
    weights: InitialWeights | None = None

    @classmethod
    def find(cls, run_config: RunConfig, world: World) -> "StartingPoint":
        """What --resume and --init_from name; every rank calls it.

        Raises CheckpointError if it is not there, is damaged, or is not trusted.
        """
        settings = run_config.checkpoint
        folder = settings.checkpoint_dir
        # torchrun --max-restarts starts the same command again, which may have saved since.
        has_saved = world.run_on_rank0(lambda: launch.saved_before_restart(folder))
        requested = "latest" if has_saved else settings.resume_from

        def locate() -> Path | None:
            if requested is not None:
                return store.find(folder, requested, set_aside=True)
            require_fresh(folder)
            return None

        path = world.run_on_rank0(locate)
        if path is not None:
            trust = settings.trust_checkpoint
            state = saved_run.load(path, trust=trust, world=world, parts=SavedRun)
            return cls(path=path, checkpoint=state)
        if requested is not None:
            logger.warning(
                "no checkpoint in %s: starting a NEW run from step 0%s", folder, _elsewhere(folder)
            )
        if settings.init_from in ("scratch", "resume"):
            return cls()
        logger.info("Loading weights from: %s", settings.init_from)
        return cls(weights=load_weights(run_config, world))

    def configured(self, run_config: RunConfig, configure: Configure | None) -> RunConfig:
        """The configuration that trains: what was not typed comes from the checkpoint, and the
        vocabulary size also from the weights of --init_from.

        `run_config` has the folders; without `configure` it is complete. Raises ConfigError if what
        was typed does not fit the rest, or the checkpoint has values that flags could not have, and
        DataError if its data is missing because the run began in another folder.
        """
        if configure is None:
            return self._with_vocab_size(run_config)
        if self.checkpoint is None:
            return self._with_vocab_size(experiment_folder.resolve(configure(None)))
        stored: Any = self.checkpoint.get("config")
        try:
            roots = options.of_stored(stored).data.data_root
            configured = experiment_folder.resolve(configure(stored))
        except ConfigError as error:
            raise ConfigError(f"{self.path} cannot continue with these flags: {error}") from error
        if roots == configured.data.data_root:
            _require_data_here(roots)
        if warning := options.password_warning(roots, configured):
            logger.warning(warning)
        return self._with_vocab_size(configured)

    def _with_vocab_size(self, run_config: RunConfig) -> RunConfig:
        if self.checkpoint is not None:
            return run_config.with_vocab_size(self.checkpoint["config"]["model"]["vocab_size"])
        if self.weights is not None:
            return run_config.with_vocab_size(self.weights.tensors[interchange.EMBEDDING].size(0))
        return run_config

    @property
    def corpora(self) -> tuple[str, ...] | None:
        """The names of the corpora of the checkpoint's run; None for a run that begins."""
        return None if self.checkpoint is None else tuple(_fingerprints(self.checkpoint))

    def sampling(
        self,
        run_config: RunConfig,
        rows_per_shard: Mapping[str, tuple[int, ...]],
        state: TrainState,
    ) -> Sampling:
        """Which rows the run trains on; `rows_per_shard` is by name of corpus."""
        rows = {name: sum(of_shards) for name, of_shards in rows_per_shard.items()}
        total_steps = run_config.total_steps(sum(rows.values()))
        is_mixture = UNNAMED not in rows
        phases = self._phases(run_config, rows, total_steps, state) if is_mixture else ()
        return Sampling(run_config.sampler(rows_per_shard, phases), phases, total_steps)

    def _phases(
        self, run_config: RunConfig, rows: Mapping[str, int], total_steps: int, state: TrainState
    ) -> tuple[StepPhase, ...]:
        """The weights of the corpora from the first step of the run on: those of the checkpoint,
        unless other ones are typed, which begin now."""
        named, settings = mixture.corpora(run_config.data.data_root), run_config.data.mixture
        planned = mixture.planned(named, settings, rows, total_steps)
        if len(planned) < len(settings):
            logger.warning(
                "--mixture: phases left out because they are shorter than a step: %d of %d",
                len(settings) - len(planned),
                len(settings),
            )
        if self.checkpoint is None:
            return planned
        begun = mixture.from_plain(self.checkpoint[MIXTURE])
        of_runs = options.of_stored(self.checkpoint["config"]).data, run_config.data
        before, now = (mixture.typed(one.data_root, one.mixture) for one in of_runs)
        if before == now:
            return begun
        return mixture.continued(begun, planned, state.data_step(state.step))

    def require_agreement(self, run_config: RunConfig, data: TrainingData | None) -> None:
        """Raises CheckpointError if the checkpoint is of another run, field by field, or if the
        weights of --init_from are for other tokens. None is for data that is not opened yet."""
        if self.weights is not None and data is not None:
            self.weights.require_tokens_of(data, run_config.checkpoint.init_from)
        if self.checkpoint is None or self.path is None:
            return
        stored = self.checkpoint["config"]
        rows = options.changed(stored, run_config, options.FIXED_BY_CHECKPOINT)
        if data is not None:
            rows += _data_differences(self.checkpoint, data)
        has_other_preset = stored["preset"] != run_config.preset
        hint = f"it was made with --preset {stored['preset']}" if has_other_preset else ""
        _refuse_contradictions(self.path, rows, hint)

    def validations(self, run_config: RunConfig, data: TrainingData) -> Validations:
        """What validation losses are of."""
        now = validation(run_config, data)
        if self.checkpoint is None:
            return now, now
        known = _fingerprints(self.checkpoint)
        before = TrainingData({name: data.corpora[name] for name in data.corpora if name in known})
        return validation(options.of_stored(self.checkpoint["config"]), before), now

    def train_state(
        self, world: World | None = None, validations: Validations | None = None
    ) -> TrainState:
        """The state that training begins with, as `train_state` below returns it."""
        if self.checkpoint is None or self.path is None:
            return TrainState()
        return train_state(self.checkpoint, self.path, world, validations)

    @property
    def fitted_rows(self) -> FittedRows | None:
        """The micro-batch that was found to fit before the checkpoint; None if it was given."""
        return FittedRows.from_dict(self.checkpoint and self.checkpoint.get("fitted_rows"))

    def completed(self, data: TrainingData) -> TrainingData:
        """The data with the digests of the checkpoint, which may know those of shards without a
        manifest."""
        known = _fingerprints(self.checkpoint) if self.checkpoint else {}
        return TrainingData(
            {name: _completed(index, known.get(name)) for name, index in data.corpora.items()}
        )

    def restore(self, replica: Replica, step: int) -> None:
        """Takes weights, optimiser and random streams out of the checkpoint, if there is one."""
        if self.checkpoint is not None and self.path is not None:
            with saved_run.explained(self.path):
                replica.load_state_dict(self.checkpoint, step)

    def notes(self, run_config: RunConfig, world: World, data: TrainingData) -> list[str]:
        """Permitted differences from the checkpoint, for the banner."""
        assert self.checkpoint is not None
        rows = options.overridden(self.checkpoint["config"], run_config)
        notes = [f"{name}: {old} before, {new} from here" for name, old, new in rows]
        if isinstance(self.checkpoint.get("data_fingerprint"), str):
            notes.append(
                "Data: the checkpoint is of an earlier version, which did not record all of the "
                "data's content; the next one does"
            )
        known = _fingerprints(self.checkpoint)
        if added := [name for name in data.validated if name not in known]:
            notes.append(
                f"Validation: also of {', '.join(added)} from here, so val loss does not compare "
                "with before, and the best checkpoint is one from here on"
            )
        ranks = len(self.checkpoint["rng"])
        if ranks != world.size:
            notes.append(f"Ranks: {ranks} before, {world.size} from here; the data is the same")
            if run_config.model.dropout > 0:
                notes.append("Dropout draws other numbers: its random streams belong to the ranks")
        return notes

    def rate_warning(
        self, run_config: RunConfig, rows_per_epoch: Mapping[str, int], step: int
    ) -> str | None:
        """What to say of a learning rate that jumps at this resume; None if it does not.

        `rows_per_epoch` is by name of corpus.
        """
        assert self.checkpoint is not None
        before = options.of_stored(self.checkpoint["config"])
        known = sum(rows_per_epoch[name] for name in _fingerprints(self.checkpoint))
        totals = [
            before.total_steps(known),
            run_config.total_steps(sum(rows_per_epoch.values())),
        ]
        old, new = before.lr_schedule(totals[0]), run_config.lr_schedule(totals[1])
        last, expected, rate = lr_at(max(0, step - 1), old), lr_at(step, old), lr_at(step, new)
        is_smooth = any(math.isclose(rate, one, rel_tol=UNNOTICED) for one in (last, expected))
        if step >= totals[1] or is_smooth:
            return None
        text = f"learning rate: {last:.3g} before, {rate:.3g} from here"
        with_old_decay = replace(new, decay_steps=old.decay_steps)
        if not math.isclose(expected, lr_at(step, with_old_decay), rel_tol=UNNOTICED):
            return text  # the decay alone is not the cause
        way_out = f"use --decay_steps {old.decay_steps} to leave it there; "
        if new.floor == 0:  # where nothing would be learned
            way_out = ""
        return (
            f"{text}: its decay ended at step {old.decay_steps}, and now ends at "
            f"{new.decay_steps}; {way_out}a run that begins with --schedule wsd can be continued "
            "from before its cooldown without a jump"
        )


def train_state(
    checkpoint: CheckpointState,
    path: Path,
    world: World | None = None,
    validations: Validations | None = None,
) -> TrainState:
    """The state that a checkpoint holds, with what was measured after it was saved, which is in the
    metadata beside it. With `validations`, it has only losses that compare with those to come.

    All ranks of a `world` call it, and take the metadata that rank 0 reads: machines may have
    copies of different age, but all ranks must agree on what is left to measure.
    """
    state = TrainState.from_dict(checkpoint["progress"])
    state.plain_head |= not checkpoint["config"]["machine"].get("fast", True)
    if validations and validations[0] != validations[1]:
        state.drop_validation()
    read_it = functools.partial(read_metadata, path.with_suffix(".json"))
    metadata = world.run_on_rank0(read_it) if world else read_it()
    if metadata is None or metadata.training.step != state.step:
        return state
    measured = metadata.training
    # The metadata of an earlier version does not say what a loss is of.
    is_comparable = validations is None or validations[1] == (
        measured.validated or validations[0].corpora,
        measured.val_rows or validations[0].rows,
    )
    if measured.val_loss is not None and state.validated_step != state.step and is_comparable:
        state.add_validation(measured.val_loss, measured.bits_per_byte)
    if measured.hellaswag is not None and state.scored_step != state.step:
        state.add_hellaswag(measured.hellaswag)
    if measured.is_evaluated:
        state.evaluated_step = state.step
    return state


def located(run_config: RunConfig) -> StartingPoint:
    """The checkpoint that --resume names, for one process that does not train. Raises
    CheckpointError as `StartingPoint.find` does."""
    settings = run_config.checkpoint
    path = settings.resume_from and store.find(settings.checkpoint_dir, settings.resume_from)
    if not path:
        return StartingPoint()
    return StartingPoint(path, saved_run.load(path, trust=settings.trust_checkpoint))


def load_weights(run_config: RunConfig, world: World | None = None) -> InitialWeights:
    """What `--init_from` names, a checkpoint of ours or of another tool, for the run's model.

    Raises CheckpointError if it is not there or has another shape.
    """
    source, trust = run_config.checkpoint.init_from, run_config.checkpoint.trust_checkpoint
    if interchange.is_foreign(source):
        found = interchange.load(source, run_config.model, trust=trust)
        return InitialWeights(found.weights, found.tokenizer)
    path = store.at(Path(source))
    if path is None:
        raise CheckpointError(
            f"no checkpoint at {source}; --init_from takes a path, hf:FOLDER or nanogpt:FILE; "
            "--resume also takes latest, best or a step"
        )
    state = saved_run.load(path, trust=trust, world=world)
    shape = tuple(name for name in options.FIXED_BY_CHECKPOINT if name.startswith("model."))
    run_config = run_config.with_vocab_size(state["config"]["model"]["vocab_size"])
    if rows := options.changed(state["config"], run_config, shape):
        flags = " ".join(f"--{name} {old}" for name, old, _ in rows)
        raise CheckpointError(
            f"the weights of {path} do not fit this model: {_listed(rows)}; --init_from takes no "
            f"options from the checkpoint; add {flags}"
        )
    return InitialWeights(state["model"], saved_tokenizer.of_checkpoint(state))


def require_fresh(folder: Path) -> None:
    """Raises CheckpointError if an earlier run has checkpoints in the folder: a new run would mix
    with them, and remove them as its own grow old."""
    earlier = sorted(folder.glob("step_*.json"))
    if earlier:
        raise CheckpointError(
            f"{folder} holds {counted(len(earlier), 'checkpoint')} of an earlier run, up to "
            f"{earlier[-1].stem}; continue it with --resume latest, or keep a new run "
            "elsewhere with --out_dir NAME or --experiment_name NAME"
        )


def _elsewhere(folder: Path) -> str:
    """Which preset has a run in a folder of its own, if `folder` is that of another preset."""
    folders = {name: run.checkpoint.checkpoint_dir for name, run in presets.PRESETS.items()}
    for name, other in folders.items():
        if other != folder and folder in folders.values() and any(other.glob("step_*.json")):
            return f"; --preset {name} continues the run in {other}"
    return ""


def _require_data_here(roots: Sequence[str]) -> None:
    """Raises DataError if a relative --data_root of a checkpoint has no data below the current
    folder. An embedded corpus is prepared there."""
    for corpus in mixture.corpora(roots):
        root, storage = corpus.root, Storage(corpus.root)
        if storage.path is None or storage.path.is_absolute() or dataset.to_prepare(storage):
            continue
        if not storage.files():
            raise DataError(
                f"no training data in {root}, the --data_root of the checkpoint, which is relative "
                f"to the current folder, {Path.cwd()}; resume it where the run began, or type "
                "another --data_root"
            )


def _fingerprints(checkpoint: CheckpointState) -> dict[str, Fingerprint | str]:
    """By name of corpus; a text is that of an earlier version."""
    found: Any = checkpoint.get("data_fingerprint", "")
    return found if MIXTURE in checkpoint else {UNNAMED: found}


def _completed(index: DatasetIndex, known: Fingerprint | str | None) -> DatasetIndex:
    if known is None or isinstance(known, str):
        return index
    digests = {split: iter(known[split]) for split in known}
    pairs = [(shard, next(digests[shard.split])) for shard in index.shards]
    return replace(
        index,
        shards=tuple(
            shard
            if shard.sha256 or digest is None or digest.startswith(ENDS)
            else replace(shard, sha256=digest)
            for shard, digest in pairs
        ),
    )


def _data_differences(
    checkpoint: CheckpointState, data: TrainingData
) -> list[tuple[str, Any, Any]]:
    """How the data differs from that of the checkpoint, as far as digests are known. Corpora may be
    added to a mixture."""
    known = _fingerprints(checkpoint)
    if UNNAMED in {*known, *data.corpora} and known.keys() != data.corpora.keys():
        before, now = (
            ", ".join(filter(None, of)) or "one without a name" for of in (known, data.corpora)
        )
        return [("corpora", before, now)]
    if missing := [name for name in known if name not in data.corpora]:
        without = (
            f"without {', '.join(missing)} (the weight 0 keeps a corpus without training on it)"
        )
        return [("corpora", ", ".join(known), without)]
    rows: list[tuple[str, Any, Any]] = []
    roots = options.of_stored(checkpoint["config"]).data.data_root
    typed = {corpus.name: corpus.root for corpus in mixture.corpora(roots)}
    for name, fingerprint in known.items():
        root = typed.get(name, roots[0])  # of a glob over several folders
        rows += _corpus_differences(root, fingerprint, data.corpora[name])
    recorded = saved_tokenizer.of_checkpoint(checkpoint)
    if recorded and not saved_tokenizer.is_same(recorded, data.tokenizer):
        before, now = map(saved_tokenizer.described, (recorded, data.tokenizer))
        rows.append(("tokenizer", before, now))
    return rows


def _corpus_differences(
    root: str, known: Fingerprint | str, data: DatasetIndex
) -> list[tuple[str, Any, Any]]:
    """How a corpus differs from what is known of it, where it was in `root`."""
    if isinstance(known, str):
        if (now := data.former_fingerprint()) == known:
            return []
        return [("training data", f"{root} ({known})", f"{data.storage.root} ({now})")]
    rows: list[tuple[str, Any, Any]] = []
    for split, name in SPLITS.items():
        before, shards = known[split], data.of(split)
        if len(before) != len(shards):
            rows.append((name, counted(len(before), "shard"), counted(len(shards), "shard")))
            continue
        others = [
            shard.file
            for shard, digest in zip(shards, before, strict=True)
            if digest and _identity(data, shard, digest) not in (None, digest)
        ]
        if others:
            count = f"{len(others)} of {counted(len(shards), 'shard')}"
            now = f"{data.storage.root}, where {count} differ in content, first {others[0]}"
            rows.append((name, root, now))
    return rows


def _identity(data: DatasetIndex, shard: Shard, before: str) -> str | None:
    """What identifies a shard now, of the same kind as `before`; None if that is unknown."""
    return data.ends_of(shard) if before.startswith(ENDS) else data.digest(shard)


def _listed(rows: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{name}: {old} in the checkpoint, {new} now" for name, old, new in rows)


def _refuse_contradictions(path: Path, rows: list[tuple[str, Any, Any]], hint: str = "") -> None:
    if rows:
        raise CheckpointError(
            f"{path} cannot continue with these flags{f' ({hint})' if hint else ''}: "
            f"{_listed(rows)}; "
            "use the checkpoint's values, or start another run with --out_dir NAME or "
            "--experiment_name NAME"
        )
