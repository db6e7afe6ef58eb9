"""Builds a run: everything that `trainer.train` uses, from configuration and starting point."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from gpt2.base import folder_lock
from gpt2.base.errors import ConfigError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.checkpoint.async_save import Saver
from gpt2.config.run import RunConfig
from gpt2.data import verifier
from gpt2.data.training_data import TrainingData
from gpt2.data.verifier import Verifier
from gpt2.distributed import device, precision
from gpt2.distributed.signals import StopRequest
from gpt2.distributed.world import World
from gpt2.metrics import sinks
from gpt2.metrics.records import EventRecord, events_to
from gpt2.train import banner, dataset, experiment_folder, run_identity
from gpt2.train.evaluator import Evaluator
from gpt2.train.notices import Notices, forget_death, post_death_before
from gpt2.train.replica import Replica
from gpt2.train.report import Report
from gpt2.train.resume import Configure, Sampling, StartingPoint
from gpt2.train.run_identity import RunIdentity
from gpt2.train.status import Plan, StatusFile
from gpt2.train.training_run import TrainingRun

logger = logging.getLogger(__name__)


def build(
    run_config: RunConfig,
    run_name: str,
    world: World,
    report: Report,
    stop: StopRequest,
    configure: Configure | None,
    notices: Notices,
) -> TrainingRun:
    """The parts of a run, ready for its next step; every rank calls it.

    `run_name` is that of a new run. All checks come before any file of an earlier run is modified.
    If it raises, no thread runs, no sink is open, and `status.json` is as it was.
    """
    early_events: list[EventRecord] = []  # for the sinks, which are not open yet
    with events_to(early_events.append):
        start, run_config = _start(run_config, world, configure)
        data = _open_data(run_config, world, start)
        run_config = dataset.with_vocab_size(run_config, data)
    identity = _identity(run_config, world, start)
    token_dataset = dataset.training_split(run_config, data)
    require_enough_rows(run_config, world)
    world.run_on_rank0(lambda: sinks.require_folders(run_config))
    state = start.train_state(world, start.validations(run_config, data))
    sampling = start.sampling(run_config, token_dataset.rows_per_shard, state)
    weights = start.weights.tensors if start.weights else None
    corpus_count = len(data.corpora) if data.is_mixture else 0
    replica = Replica(run_config, world, weights, state.plain_head, start.fitted_rows, corpus_count)
    evaluator = Evaluator(run_config, world, replica, data)
    run_name = _run_name(run_config, run_name, start, identity)
    start.restore(replica, state.step)
    plan = _plan(run_config, run_name, sampling, world)
    run = TrainingRun(
        config=run_config,
        name=run_name,
        world=world,
        dataset=token_dataset,
        data=data,
        verifiers=_verifiers(data, world),
        sampler=sampling.sampler,
        phases=sampling.phases,
        schedule=run_config.lr_schedule(sampling.total_steps),
        total_steps=sampling.total_steps,
        replica=replica,
        evaluator=evaluator,
        saver=_saver(run_config, world, start, state.step),
        status=_status_file(run_config, plan, world, notices),
        stop=stop,
        notices=notices,
        report=report,
        peak_flops=device.peak_flops(world, replica.dtype),
        state=state,
        identity=identity,
        resumed_from=start.path,
        earlier_saves=world.run_on_rank0(lambda: _saves_beyond(_folder(run_config), state.step)),
    )
    run.open(early_events)
    _begin(run, data, plan, start)
    return run


def _folder(run_config: RunConfig) -> Path:
    return run_config.checkpoint.checkpoint_dir.resolve()


def _start(
    run_config: RunConfig, world: World, configure: Configure | None
) -> tuple[StartingPoint, RunConfig]:
    """Where the run starts, and with which configuration."""
    start = StartingPoint.find(run_config, world)
    configured = world.run_on_rank0(lambda: start.configured(run_config, configure))
    start.require_agreement(configured, None)
    if configured.machine.deterministic:  # `join` knew only what was typed
        device.make_deterministic()
    precision.set_tf32(not configured.machine.deterministic, world.device)
    return start, configured


def _open_data(run_config: RunConfig, world: World, start: StartingPoint) -> TrainingData:
    """The data, which agrees with the checkpoint, with all digests that are known."""
    data = dataset.open_data(run_config, world, start.corpora)
    start.require_agreement(run_config, data)
    expected = start.completed(data)
    return world.run_on_local_rank0(lambda: expected.changed(verifier.checked))


def _verifiers(data: TrainingData, world: World) -> dict[str, Verifier]:
    """By name of corpus, on the first rank of each machine, for local data."""
    if not world.is_local_rank0:
        return {}
    return {name: Verifier(index) for name, index in data.corpora.items() if index.storage.path}


def _identity(run_config: RunConfig, world: World, start: StartingPoint) -> RunIdentity:
    folder = run_config.checkpoint.checkpoint_dir
    return world.run_on_rank0(lambda: run_identity.find(folder, start.path, start.checkpoint))


def _run_name(
    run_config: RunConfig, new_name: str, start: StartingPoint, identity: RunIdentity
) -> str:
    """The name in the checkpoint, if its run goes on, else `new_name`."""
    if start.checkpoint is None or not run_identity.goes_on(identity, start.checkpoint):
        return new_name
    return experiment_folder.run_name(run_config, start.checkpoint["run_name"])


@contextlib.contextmanager
def _closed_on_error(run: TrainingRun) -> Iterator[None]:
    """Closes the run if the block raises."""
    try:
        yield
    except BaseException:
        run.close()
        raise


def _status_file(run_config: RunConfig, plan: Plan, world: World, notices: Notices) -> StatusFile:
    folder = _folder(run_config) if world.is_rank0 else None
    return StatusFile(folder, plan, notices.sign_of_life)


def _begin(run: TrainingRun, data: TrainingData, plan: Plan, start: StartingPoint) -> None:
    """Logs the banner, and says in `status.json` that the run trains from now on."""
    with _closed_on_error(run):
        run.start_verifiers()
        banner.log(run, data, plan, start)
    if run.world.is_rank0:
        forget_death(_folder(run.config))
    run.notices.begin(plan, run.state.step)
    run.status.write("running", run.state.step)


def _plan(run_config: RunConfig, run_name: str, sampling: Sampling, world: World) -> Plan:
    """What the run will do, for `status.json`."""
    return Plan(
        run_name=run_name,
        preset=run_config.preset,
        total_steps=sampling.total_steps,
        rows_per_step=run_config.rows_per_step,
        rows_per_epoch=sampling.sampler.rows_per_epoch,
        block_size=run_config.model.block_size,
        checkpoint_interval=run_config.checkpoint.checkpoint_interval,
        world_size=world.size,
        device=world.device.type,
        log_file=str(sinks.log_file(run_config).resolve()),
        batch_ramp=run_config.data.batch_ramp,
    )


def _saver(run_config: RunConfig, world: World, start: StartingPoint, step: int) -> Saver:
    """What saves the run's checkpoints."""
    folder, path = _folder(run_config), start.path
    is_in_folder = path is not None and world.run_on_rank0(lambda: _is_complete(path, folder))
    return Saver(
        world,
        run_config.checkpoint,
        resumed_from=path,
        resumed_step=step if is_in_folder else None,
        link=experiment_folder.link(run_config),
    )


def _is_complete(path: Path, folder: Path) -> bool:
    """Whether `path` is a checkpoint in `folder` that has metadata: one without it was loaded
    unverified, and does not count as saved."""
    return path.resolve() in [item.path for item in store.list_checkpoints(folder)]


def _saves_beyond(folder: Path, step: int) -> frozenset[int]:
    """The sequence numbers of the checkpoints in `folder` that are further on than `step`."""
    return frozenset(
        item.metadata.sequence
        for item in store.list_checkpoints(folder)
        if item.training.step > step
    )


@contextlib.contextmanager
def claimed_folder(run_config: RunConfig, world: World, notices: Notices) -> Iterator[None]:
    """Locks the checkpoint folder for this run while the block runs; posts that an earlier process
    was killed, and removes its temporary files.

    Raises CheckpointError if it cannot be written to, and FolderInUse if another run holds it.
    """
    folder = run_config.checkpoint.checkpoint_dir

    with contextlib.ExitStack() as claim:

        def claim_it() -> None:
            folder_lock.require_writable(folder)
            claim.enter_context(folder_lock.held(folder))
            post_death_before(folder, notices.notifier)
            store.remove_unfinished(folder)

        world.run_on_rank0(claim_it)
        yield


def require_enough_rows(run_config: RunConfig, world: World) -> None:
    """Raises ConfigError if a step has fewer rows than there are ranks."""
    data, block_size = run_config.data, run_config.model.block_size
    rows = run_config.ramp.rows_of(0)  # no step has less
    if rows < world.size:
        least = world.size * block_size
        what, remedy = (
            (f"batch_ramp={data.batch_ramp[0]}", f"at least {least} tokens in its first phase")
            if data.batch_ramp
            else (
                f"total_batch_size={data.total_batch_size}",
                f"--total_batch_size {least} or more",
            )
        )
        raise ConfigError(
            f"{what} has {counted(rows, 'row')} of block_size={block_size}, too few for "
            f"{world.size} ranks; use {remedy}"
        )
