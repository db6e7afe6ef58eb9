"""Checks before a long run whether this machine and the run's options, data and folders are fit.

`examine` gathers the facts and yields one finding per line; `gpt2.inspection.checks` draws the
conclusions. Nothing is changed.
"""

import contextlib
import shlex
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from gpt2.base import addresses, folder_lock, log
from gpt2.base.errors import ConfigError, UserError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.config import flops, mixture
from gpt2.config.run import RunConfig
from gpt2.data import saved_tokenizer, shards, verifier
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex
from gpt2.data.tokenizer import GPT2_TOKENIZER
from gpt2.data.training_data import TrainingData
from gpt2.data.vocabulary import Characters
from gpt2.distributed import precision, visible_gpus
from gpt2.evaluation import hellaswag
from gpt2.inspection import checks, machine
from gpt2.inspection.checks import Finding, Need, Severity
from gpt2.inspection.machine import Gpu
from gpt2.metrics import wandb
from gpt2.train import dataset, experiment_folder, resume, saved_run, status
from gpt2.train.evaluator import validation_rows
from gpt2.train.resume import Configure, StartingPoint

COLORS: dict[Severity, str] = {"ok": "green", "note": "yellow", "PROBLEM": "bold red"}
INSTALL = "pip install --editable ."
NAMED_SHARDS = 3
"""named in a note about many"""


def print_findings(findings: Iterable[Finding], out: Console) -> int:
    """Prints each finding as soon as it is made; returns the number of problems."""
    problems = 0
    for finding in findings:
        problems += finding.level == "PROBLEM"
        text = f"; {finding.remedy}" if finding.remedy else ""
        line = Text(f"{finding.level:<8} ", style=COLORS[finding.level])
        rest = Text(
            f"{finding.what:<13} {addresses.without_secrets(finding.fact + text)}",
            style=COLORS["PROBLEM"] if finding.level == "PROBLEM" else "",
        )
        out.print(line + rest, soft_wrap=True)
    total = counted(problems, "problem") if problems else "No problem"
    out.print(f"\n{total} found", soft_wrap=True)
    return problems


def examine(run_config: RunConfig, ranks: int | None = None) -> Iterator[Finding]:
    """All findings about a run with these options. Without `ranks`: one per GPU, or without GPUs as
    many as the run in --checkpoint_dir had without GPUs, if it is resumed."""
    yield from _software(run_config)
    device_option = run_config.machine.device
    build, driver = machine.installed_torch(), machine.driver()
    gpus: list[Gpu] = []
    try:
        visible_gpus.ids()  # without GPUs, too, a run is refused if these are invalid
        gpus = [] if device_option == "cpu" else machine.gpus()
    except ConfigError as error:
        yield Finding("PROBLEM", "GPU", str(error))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        yield Finding("PROBLEM", "GPU", reason, "see nvidia-smi; a reboot may help")
    count = ranks or _usual_ranks(run_config, len(gpus))
    sized = dataset.with_vocab_size_if_known(run_config)
    yield checks.check_device(device_option, len(gpus), build, driver)
    yield from checks.check_gpus(gpus, flops.training_bytes(sized.model, sized.optim.optimizer))
    yield from checks.check_kernels(gpus, build)
    yield from checks.check_compiler(gpus, run_config.machine.compile)
    if gpus and count > 1:
        yield checks.check_nccl(build)
    device = torch.device("cuda" if gpus else "cpu")
    dtype = run_config.machine.dtype
    yield checks.check_precision(dtype, precision.fast_dtype(device), device)
    least = min((gpu.free_bytes for gpu in gpus), default=None)
    yield checks.check_batch(sized, count, len(gpus), least)
    yield checks.check_cards(sized, count)
    yield from _of_this_run(run_config, device)
    yield from _of_this_machine(sized, count, device)


def _usual_ranks(run_config: RunConfig, gpus: int) -> int:
    if run_config.experiment.name is not None:
        return 1
    folder, wanted = run_config.checkpoint.checkpoint_dir, run_config.checkpoint.resume_from
    is_in_folder = wanted is not None and (wanted in ("latest", "best") or wanted.isdigit())
    before = status.read(folder) if is_in_folder else None
    return gpus or (before.plan.world_size if before and before.plan.device == "cpu" else 1)


def _software(run_config: RunConfig) -> Iterator[Finding]:
    requirements = machine.requirements()
    if requirements is None:
        yield Finding("note", "packages", "gpt2-from-scratch is not installed", INSTALL)
    else:
        all_of_them = [Requirement(text) for text in requirements.packages]
        expected = [item for item in all_of_them if item.marker is None or item.marker.evaluate()]
        installed = {item.name: machine.version_of(item.name) for item in expected}
        yield checks.check_python(
            machine.python_version(), requirements.python, requirements.tested_pythons
        )
        yield from checks.check_packages(expected, installed)
    if run_config.experiment.use_wandb and find_spec("wandb") is None:
        yield Finding("PROBLEM", "W&B", "is not installed", wandb.INSTALL)
    watch = run_config.watch
    if watch.use_tensorboard and find_spec("tensorboard") is None:
        yield Finding("PROBLEM", "TensorBoard", "is not installed", "pip install tensorboard")


def _of_this_run(run_config: RunConfig, device: torch.device) -> Iterator[Finding]:
    data, finding = find_data(run_config)
    yield finding
    if data is not None:
        yield from find_unverified(data)
    yield find_hellaswag(run_config)
    yield from find_checkpoints(run_config, data)
    count = sum(len(item.shards) for item in data.corpora.values()) if data else 0
    yield checks.check_open_files(machine.open_files_limit(), count)
    folders = writable_folders(run_config)
    refused = {flag: machine.unwritable(folder) for flag, folder in folders.items()}
    yield from checks.check_folders(folders, refused)
    disks: dict[int, list[Need]] = {}
    sized = dataset.with_vocab_size(run_config, data) if data else run_config
    for need in disk_needs(sized, data):
        disks.setdefault(machine.disk(need.folder)[0], []).append(need)
    for needs in disks.values():
        yield checks.check_disk(machine.disk(needs[0].folder)[1], needs)


def find_data(run_config: RunConfig) -> tuple[TrainingData | None, Finding]:
    """Opens the shards as the run will; returns their index, or None if that fails.

    Of shards that are as they were verified, a few bytes are read; what has changed is hashed.
    Copies no remote shards.
    """
    for typed in mixture.corpora(run_config.data.data_root):
        storage = Storage(typed.root)
        if corpus := dataset.to_prepare(storage):
            fact = f"{storage} is prepared from {corpus.source} when the run starts"
            return None, Finding("ok", "data", fact)
    try:
        data = dataset.find(run_config, _corpora_of_run(run_config))
        dataset.with_vocab_size(run_config, data)  # raises for ids that the model lacks
        data = data.changed(lambda index: verifier.checked(index, remember=False))
        train = dataset.training_split(run_config, data)
        local = {name: item for name, item in data.corpora.items() if item.storage.path is not None}
        if local:  # of remote data, that would fetch the whole split
            validation_rows(run_config, TrainingData(local))
    except UserError as error:
        return None, checks.problem("data", error)
    rows = {name: sum(of_shards) for name, of_shards in train.rows_per_shard.items()}
    facts = [_data_fact(name, index) for name, index in data.corpora.items()]
    fact = f"{'; '.join(facts)}: {counted(run_config.total_steps(sum(rows.values())), 'step')}"
    return data, Finding("ok", "data", fact)


def _corpora_of_run(run_config: RunConfig) -> tuple[str, ...] | None:
    """The names of the corpora of the run that is resumed, if folders depend on them."""
    if not dataset.is_mixed_by_folders(run_config):
        return None
    with contextlib.suppress(UserError), log.collecting_warnings():
        return resume.located(run_config).corpora
    return None


def _data_fact(name: str, index: DatasetIndex) -> str:
    manifest = "all in the manifest" if index.has_manifest else "without a manifest"
    if index.tokenizer is not GPT2_TOKENIZER:
        manifest += f", tokens of {saved_tokenizer.described(index.tokenizer)}"
    if isinstance(index.tokenizer, Characters):
        manifest += ", without HellaSwag"
    return (
        f"{f'{name} in ' if name else ''}{index.storage}: {index.tokens('train'):,} training "
        f"tokens, {index.tokens('val'):,} for validation, {counted(len(index.shards), 'shard')}, "
        f"{manifest}"
    )


def find_unverified(data: TrainingData) -> Iterator[Finding]:
    """A note if there are shards of which no digest is remembered."""
    for index in data.corpora.values():
        never = [shard.file for shard in verifier.never_verified(index)]
        if never:
            first = ", ".join(never[:NAMED_SHARDS])
            more = ", …" if len(never) > NAMED_SHARDS else ""
            fact = (
                f"{len(never):,} of {counted(len(index.shards), 'shard')} were never verified "
                f"({first}{more}); a run does it while it trains"
            )
            command = f"gpt2 data verify {shlex.quote(index.storage.root)}"
            yield Finding("note", "data", fact, f"before that, type {command}")


def find_hellaswag(run_config: RunConfig, folder: Path = hellaswag.FOLDER) -> Finding:
    """Whether the tasks of the HellaSwag evaluation are on this machine and readable."""
    settings = run_config.evaluation
    if settings.hellaswag_interval is None:
        return Finding("ok", "HellaSwag", "off")
    path = hellaswag.find(settings.hellaswag_path, folder)
    if path is None:
        fact = f"not in {folder}: the run downloads it from the hub, or trains without it"
        return Finding("note", "HellaSwag", fact)
    try:
        tasks = hellaswag.load(path, settings.hellaswag_limit)
    except UserError as error:
        return checks.problem("HellaSwag", error)
    return Finding("ok", "HellaSwag", f"{path}: {counted(len(tasks), 'task')}")


def as_resumed(run_config: RunConfig, configure: Configure) -> RunConfig:
    """The configuration that will train: with the options of the checkpoint that it resumes, if
    there is one. If that cannot be loaded, `find_checkpoints` says why."""
    try:
        with log.collecting_warnings():
            start = resume.located(run_config)
    except UserError:
        return run_config
    return start.configured(run_config, configure)


def find_checkpoints(run_config: RunConfig, data: TrainingData | None) -> Iterator[Finding]:
    """Where the run begins; a checkpoint is loaded and verified as the run will do it."""
    folder = run_config.checkpoint.checkpoint_dir
    if folder_lock.is_held(folder):
        by = folder_lock.owner(folder) or "a process"
        remedy = "another run needs another --out_dir"
        yield Finding("note", "running", f"{by} trains in {folder}", remedy)
    with log.collecting_warnings() as warnings:
        begins, start = _check_beginning(run_config, data)
        of_corpora = [*_of_mixture(run_config, data, start)] if data and start else []
    for warning in warnings:
        yield Finding("note", "checkpoints", warning)
    yield begins
    yield from of_corpora


def _of_mixture(
    run_config: RunConfig, data: TrainingData, start: StartingPoint
) -> Iterator[Finding]:
    """For each corpus of a mixture its share of the rows, now and later, and how often it is
    read."""
    if not data.is_mixture:
        return
    length, state = run_config.model.block_size, start.train_state()
    rows = {
        name: shards.rows_per_shard(index, "train", length) for name, index in data.corpora.items()
    }
    try:
        sampling = start.sampling(run_config, rows, state)
    except UserError as error:
        yield checks.problem("mixture", error)
        return
    now, *later = mixture.phases_from(sampling.phases, state.data_step(state.step))
    epochs = sampling.sampler.corpus_epochs(state.data_step(sampling.total_steps))
    steps = counted(sampling.total_steps, "step")
    for name, of_corpus in zip(rows, epochs, strict=True):
        changes = (
            f", {phase.shares.get(name, 0):.1%} from step "
            f"{state.step_that_reads(phase.first_step)} on"
            for phase in later
        )
        share = f"{now.shares.get(name, 0):.1%} of the rows now{''.join(changes)}"
        size = f"{counted(sum(rows[name]), 'row')} of {length} tokens"
        yield Finding(
            "ok", "mixture", f"{name}: {share}; {size}, {of_corpus:.2f} epochs in {steps}"
        )


def _check_beginning(
    run_config: RunConfig, data: TrainingData | None
) -> tuple[Finding, StartingPoint | None]:
    """Where the run begins: a checkpoint, loaded weights, or nothing; None if it cannot."""
    settings = run_config.checkpoint
    folder, wanted = settings.checkpoint_dir, settings.resume_from
    try:
        experiment_folder.require_possible(run_config)
        if wanted is None:
            resume.require_fresh(folder)
        path = store.find(folder, wanted) if wanted else None
        if path is not None:
            trust = settings.trust_checkpoint
            state = saved_run.load(path, trust=trust)
            start = StartingPoint(path=path, checkpoint=state)
            start.require_agreement(start.configured(run_config, None), data)
            fact = f"at step {state['progress']['step']}, with {path}, which is whole"
            return Finding("ok", "begins", fact), start
        weights, origin, start = settings.init_from, "", StartingPoint()
        if weights not in ("scratch", "resume"):
            start = StartingPoint(weights=resume.load_weights(run_config))
            start.require_agreement(run_config, data)
            origin = f" with the weights of {weights}"
        return Finding("ok", "begins", f"a new run{origin}: no checkpoint in {folder}"), start
    except UserError as error:
        return checks.problem("begins", error), None


def writable_folders(run_config: RunConfig) -> dict[str, Path]:
    """The folders that the run writes to, by the flag that sets each."""
    folders = {
        "checkpoint_dir": run_config.checkpoint.checkpoint_dir,
        "log_dir": run_config.watch.log_dir,
    }
    if run_config.watch.use_tensorboard or run_config.experiment.use_wandb:
        folders["runs_dir"] = run_config.watch.runs_dir
    for corpus in mixture.corpora(run_config.data.data_root):
        storage = Storage(corpus.root)
        if storage.path is None:
            folders["cache_dir"] = run_config.data.cache_dir
        elif dataset.to_prepare(storage):
            folders["data_root"] = storage.path
    return folders


def disk_needs(run_config: RunConfig, data: TrainingData | None) -> list[Need]:
    """The disk space that the run will take in addition to what it uses already."""
    settings = run_config.checkpoint
    size = flops.state_bytes(run_config.model, run_config.optim.optimizer)
    kept = max(2, settings.keep_last) + 2  # the best one, and the one that is being written
    folder = settings.checkpoint_dir
    used = sum(item.metadata.bytes for item in store.list_checkpoints(folder))
    needs = [
        Need(
            f"{kept} checkpoints of {checks.gigabytes(size)}",
            folder,
            max(0, kept * size - used),
            "make room, lower --keep_last, or choose another --checkpoint_dir",
        )
    ]
    cache = dataset.cache_of(run_config)
    remote = [
        index for index in (data.corpora.values() if data else ()) if index.storage.path is None
    ]
    if remote:
        whole = sum(shard.bytes for index in remote for shard in index.shards)
        share = whole if cache.limit_bytes is None else min(whole, cache.limit_bytes)
        used = sum(path.stat().st_size for path in cache.folder.glob("*") if path.is_file())
        remedy = "lower --cache_gb, or choose another --cache_dir"
        needs.append(Need("copies of shards", cache.folder, max(0, share - used), remedy))
    return needs


def _of_this_machine(run_config: RunConfig, ranks: int, device: torch.device) -> Iterator[Finding]:
    on_gpu, model, optimizer = device.type == "cuda", run_config.model, run_config.optim.optimizer
    training_bytes = 0 if on_gpu else ranks * flops.training_bytes(model, optimizer)
    state_bytes = flops.state_bytes(model, optimizer)
    yield checks.check_memory(machine.memory_bytes(), state_bytes, training_bytes)
    yield checks.check_shared_memory(machine.shared_memory_bytes(), ranks if on_gpu else 1)
    yield checks.check_host_name(machine.own_address(), ranks)
    folder = run_config.checkpoint.checkpoint_dir
    newest = max(
        (item.metadata.time for item in store.list_checkpoints(folder)),
        default=Path(__file__).stat().st_mtime,
    )
    yield checks.check_clock(time.time(), newest)
    if on_gpu and find_spec("pynvml") is None:
        yield Finding("note", "GPU load", "is not logged", "pip install nvidia-ml-py")
