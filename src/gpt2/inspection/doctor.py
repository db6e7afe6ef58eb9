"""What a person needs to know before a run of ten days, one finding per line.

`examine` gathers the facts of this machine and of the run that is planned. What is called `judge_…`
judges facts that it is given and touches nothing; `find_…` looks for itself, and changes nothing.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

from gpt2.base import folder_lock, log
from gpt2.base.errors import UserError
from gpt2.base.text import counted
from gpt2.checkpoint import store
from gpt2.config import flops
from gpt2.config.run import RunConfig
from gpt2.data.remote import Storage
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index, open_files_needed
from gpt2.distributed import device as distributed
from gpt2.distributed.world import World
from gpt2.evaluation import hellaswag
from gpt2.inspection import machine
from gpt2.inspection.machine import Gpu, Torch
from gpt2.metrics import wandb
from gpt2.train import experiment_folder, resume, setup

Level = Literal["ok", "note", "PROBLEM"]
COLORS: dict[Level, str] = {"ok": "green", "note": "yellow", "PROBLEM": "bold red"}
NCCL_SHARED_MEMORY = 1_000_000_000
"""what NVIDIA's manual gives a container (docker run --shm-size=1g)"""
BUSY = 0.1
"""share of a GPU's memory that, if taken, is another process's and not a desktop's"""
INSTALL = "pip install --editable ."


@dataclass(frozen=True)
class Finding:
    """What was looked at and found; a problem keeps the run from its end, a note does not."""

    level: Level
    what: str
    fact: str
    remedy: str = ""


@dataclass(frozen=True)
class Need:
    """Disk space that the run will take."""

    what: str
    folder: Path
    bytes: int
    remedy: str


def print_findings(findings: Iterable[Finding], out: Console) -> int:
    """Each finding as soon as it is made; returns how many problems there are."""
    problems = 0
    for finding in findings:
        problems += finding.level == "PROBLEM"
        text = f"; {finding.remedy}" if finding.remedy else ""
        line = Text(f"{finding.level:<8} ", style=COLORS[finding.level])
        told = Text(
            f"{finding.what:<13} {finding.fact}{text}",
            style=COLORS["PROBLEM"] if finding.level == "PROBLEM" else "",
        )
        out.print(line + told, soft_wrap=True)
    total = counted(problems, "problem") if problems else "No problem"
    out.print(f"\n{total} found", soft_wrap=True)
    return problems


def examine(run_config: RunConfig, ranks: int | None = None) -> Iterator[Finding]:
    """All findings about a run with these options; without `ranks`, of one per GPU."""
    yield from _software(run_config)
    wanted = run_config.machine.device
    build, driver = machine.installed_torch(), machine.driver()
    gpus: list[Gpu] = []
    if wanted != "cpu":
        try:
            gpus = machine.gpus()
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0]
            yield Finding("PROBLEM", "GPU", said, "nvidia-smi tells more; a reboot may help")
    count = ranks or (max(1, len(gpus)) if run_config.experiment.name is None else 1)
    yield judge_device(wanted, len(gpus), build, driver)
    yield from judge_gpus(gpus, flops.state_bytes(run_config.model))
    if gpus and count > 1:
        yield judge_nccl(build)
    device = torch.device("cuda" if gpus else "cpu")
    yield judge_precision(run_config.machine.dtype, distributed.has_fast_bfloat16(device), device)
    yield judge_batch(run_config, count, len(gpus))
    yield from _of_this_run(run_config, device)
    yield from _of_this_machine(run_config, count, device)


def _software(run_config: RunConfig) -> Iterator[Finding]:
    needed = machine.requirements()
    if needed is None:
        yield Finding("note", "packages", "gpt2-from-scratch is not installed", INSTALL)
    else:
        required = [Requirement(text) for text in needed[1]]
        ours = [item for item in required if item.marker is None or item.marker.evaluate()]
        there = {item.name: machine.version_of(item.name) for item in ours}
        yield judge_python(machine.python_version(), needed[0])
        yield from judge_packages(ours, there)
    if run_config.experiment.use_wandb and find_spec("wandb") is None:
        yield Finding("PROBLEM", "W&B", "is not installed", wandb.INSTALL)
    watch = run_config.watch
    if watch.use_tensorboard and find_spec("tensorboard") is None:
        yield Finding("PROBLEM", "TensorBoard", "is not installed", "pip install tensorboard")


def judge_python(version: str, needed: str) -> Finding:
    """Whether this Python is one of those that the package is made for."""
    if SpecifierSet(needed).contains(version, prereleases=True):
        return Finding("ok", "Python", version)
    return Finding("PROBLEM", "Python", f"{version}, needed {needed}", "make .venv with another")


def judge_packages(
    needed: Iterable[Requirement], there: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Whether each package is in the range that was tested."""
    good = []
    for item in needed:
        version = there[item.name]
        if version is not None and item.specifier.contains(version, prereleases=True):
            good.append(f"{item.name} {version}")
        else:
            fact = f"{item.name} {version or 'is missing'}, needed {item.specifier}"
            yield Finding("PROBLEM", "packages", fact, f"pip install '{item}'")
    yield Finding("ok", "packages", ", ".join(good))


def judge_device(wanted: str, gpus: int, build: Torch, driver: str | None) -> Finding:
    """What the run computes on; to have no GPU is no problem, to have one that is idle is."""
    made = f"torch {build.version} for {f'CUDA {build.cuda}' if build.cuda else 'CPUs alone'}"
    drives = f"driver {driver}" if driver else "no NVIDIA driver"
    if gpus:
        return Finding("ok", "device", f"{counted(gpus, 'GPU')}: {made}, {drives}")
    if wanted == "cpu":
        return Finding("ok", "device", f"CPU: {made}, {drives}")
    if driver:
        remedy = "nvidia-smi tells whether the driver works, and CUDA_VISIBLE_DEVICES may hide GPUs"
        if not build.cuda:
            remedy = "install the torch for CUDA that pytorch.org names"
        fact = f"{drives}, but torch sees no GPU ({made})"
        return Finding("PROBLEM", "device", fact, f"{remedy}; or --device cpu")
    if wanted == "cuda":
        fact = f"--device cuda, but torch sees no GPU ({made}, {drives})"
        return Finding("PROBLEM", "device", fact, "use --device cpu")
    return Finding("note", "device", f"CPU, because there is no GPU: {made}, {drives}")


def judge_gpus(gpus: list[Gpu], state_bytes: int) -> Iterator[Finding]:
    """Whether the model fits on each GPU; what a batch takes beside it, its first step tells."""
    # Weights and both moments, as a checkpoint has them, and the gradient: a third of that.
    needed = state_bytes * 4 // 3
    for index, gpu in enumerate(gpus):
        yield _judge_gpu(f"GPU {index}", gpu, needed)
    if len({gpu.name for gpu in gpus}) > 1:
        yield Finding("note", "GPUs", "are of several kinds: all wait for the slowest")


def _judge_gpu(what: str, gpu: Gpu, needed: int) -> Finding:
    taken = gpu.memory_bytes - gpu.free_bytes
    fact = f"{gpu.name}, {_gb(gpu.memory_bytes)}, {_gb(gpu.free_bytes)} free"
    if needed > gpu.memory_bytes:
        fact += f"; weights, gradient and moments alone take {_gb(needed)}"
        return Finding("PROBLEM", what, fact, "use a smaller --preset")
    if needed > gpu.free_bytes or taken > BUSY * gpu.memory_bytes:
        level: Level = "PROBLEM" if needed > gpu.free_bytes else "note"
        fact += f": another process has {_gb(taken)}"
        return Finding(level, what, fact, "nvidia-smi shows it; CUDA_VISIBLE_DEVICES chooses GPUs")
    return Finding("ok", what, fact)


def judge_nccl(build: Torch) -> Finding:
    """Whether gradients can go from GPU to GPU."""
    if build.nccl is None:
        return Finding("PROBLEM", "NCCL", "torch has none", "install a torch from pytorch.org")
    return Finding("ok", "NCCL", build.nccl)


def judge_precision(dtype: str, fast_bfloat16: bool, device: torch.device) -> Finding:
    """What the matrix products are computed in."""
    if dtype == "float32" or (dtype == "auto" and not fast_bfloat16):
        fact = "float32" + ("" if fast_bfloat16 else f": this {_kind(device)} has no fast bfloat16")
        slow = device.type == "cuda" or fast_bfloat16
        return Finding("note" if slow else "ok", "precision", fact)
    if fast_bfloat16:
        return Finding("ok", "precision", "bfloat16")
    fact = f"bfloat16, which this {_kind(device)} only emulates"
    return Finding("note", "precision", fact, "--dtype auto is faster here")


def judge_batch(run_config: RunConfig, ranks: int, gpus: int) -> Finding:
    """How a step is divided among the ranks."""
    rows, mini = run_config.rows_per_step, run_config.data.mini_batch_size
    if gpus and ranks > gpus:
        fact = f"{ranks} ranks on {counted(gpus, 'GPU')}"
        return Finding("PROBLEM", "batch", fact, f"use --nproc_per_node={gpus}")
    try:
        setup.require_enough_rows(run_config, World(0, ranks, torch.device("cpu")))
    except UserError as error:
        return _problem("batch", error)
    steps = run_config.grad_accum_steps(ranks, mini)
    share = f"{rows / ranks:g} rows" if rows % ranks == 0 else f"{rows // ranks} or one row more"
    fact = (
        f"{counted(ranks, 'rank')} of {share} per step, {min(mini, -(-rows // ranks))} at once, "
        f"gradient accumulation {steps}"
    )
    if rows % ranks:
        return Finding("note", "batch", fact + ": ranks wait for those with more")
    return Finding("ok", "batch", fact)


def _of_this_run(run_config: RunConfig, device: torch.device) -> Iterator[Finding]:
    data, finding = find_data(run_config)
    yield finding
    yield find_hellaswag(run_config)
    yield from find_checkpoints(run_config, data)
    shards = len(data.shards) if data else 0
    yield judge_open_files(machine.open_files_limit(), shards)
    folders = writable_folders(run_config)
    refused = {flag: machine.unwritable(folder) for flag, folder in folders.items()}
    yield from judge_folders(folders, refused)
    disks: dict[int, list[Need]] = {}
    for need in disk_needs(run_config, data):
        disks.setdefault(machine.disk(need.folder)[0], []).append(need)
    for needs in disks.values():
        yield judge_disk(machine.disk(needs[0].folder)[1], needs)


def find_data(run_config: RunConfig) -> tuple[DatasetIndex | None, Finding]:
    """Opens the shards as the run will; copies none that are far away."""
    storage = Storage(run_config.data.data_root)
    if corpus := setup.to_prepare(storage):
        fact = f"{storage} is made from {corpus.source} when the run starts"
        return None, Finding("ok", "data", fact)
    try:
        data = load_index(storage, setup.cache_of(run_config))
        setup.require_known_ids(run_config, data)
        train = TokenDataset(data, "train", run_config.model.block_size)
        if storage.path is not None:  # elsewhere, that would fetch the whole split
            TokenDataset(data, "val", run_config.model.block_size)
    except UserError as error:
        return None, _problem("data", error)
    steps = run_config.total_steps(sum(train.rows_per_shard))
    whose = "all in the manifest" if data.has_manifest else "without a manifest"
    fact = (
        f"{storage}: {data.tokens('train'):,} training tokens, {data.tokens('val'):,} for "
        f"validation, {counted(len(data.shards), 'shard')}, {whose}: {steps:,} steps"
    )
    return data, Finding("ok", "data", fact)


def find_hellaswag(run_config: RunConfig, folder: Path = hellaswag.FOLDER) -> Finding:
    """Whether the tasks of the HellaSwag evaluation are at hand and can be read."""
    settings = run_config.evaluation
    if settings.hellaswag_interval is None:
        return Finding("ok", "HellaSwag", "off")
    path = hellaswag.find(settings.hellaswag_path, folder)
    if path is None:
        fact = f"not in {folder}: the run loads it from the Hugging Face hub, or goes on without"
        return Finding("note", "HellaSwag", fact)
    try:
        tasks = hellaswag.load(path, settings.hellaswag_limit)
    except UserError as error:
        return _problem("HellaSwag", error)
    return Finding("ok", "HellaSwag", f"{path}: {counted(len(tasks), 'task')}")


def find_checkpoints(run_config: RunConfig, data: DatasetIndex | None) -> Iterator[Finding]:
    """What the run begins with; a checkpoint is verified as it will be then."""
    folder = run_config.checkpoint.checkpoint_dir
    if folder_lock.is_held(folder):
        owner = folder_lock.owner(folder)
        by = f"process {owner.pid} on {owner.host}, since {owner.started}" if owner else "a process"
        remedy = "another run needs another --out_dir"
        yield Finding("note", "running", f"{by} trains in {folder}", remedy)
    with log.collecting_warnings() as warnings:
        ending = _beginning(run_config, data)
    for warning in warnings:
        yield Finding("note", "checkpoints", warning)
    yield ending


def _beginning(run_config: RunConfig, data: DatasetIndex | None) -> Finding:
    settings = run_config.checkpoint
    folder, wanted = settings.checkpoint_dir, settings.resume_from
    try:
        experiment_folder.require_possible(run_config)
        if wanted is None:
            resume.require_fresh(folder)
        path = store.find(folder, wanted) if wanted else None
        if path is not None:
            trust = settings.trust_checkpoint
            state = store.load(path, trust=trust)
            begin = resume.Start(path=path, state=state)
            fingerprint = data.fingerprint() if data else state["data_fingerprint"]
            begin.require_agreement(run_config, fingerprint)
            return Finding("ok", "begins", f"at step {begin.step}, with {path}, which is whole")
        weights, origin = settings.init_from, ""
        if weights not in ("scratch", "resume"):
            resume.load_weights(run_config)
            origin = f" with the weights of {weights}"
        return Finding("ok", "begins", f"a new run{origin}: no checkpoint in {folder}")
    except UserError as error:
        return _problem("begins", error)


def writable_folders(run_config: RunConfig) -> dict[str, Path]:
    """The folders that the run writes to, by the flag that chooses each."""
    folders = {
        "checkpoint_dir": run_config.checkpoint.checkpoint_dir,
        "log_dir": run_config.watch.log_dir,
    }
    if run_config.watch.use_tensorboard or run_config.experiment.use_wandb:
        folders["runs_dir"] = run_config.watch.runs_dir
    storage = Storage(run_config.data.data_root)
    if storage.path is None:
        folders["cache_dir"] = run_config.data.cache_dir
    elif setup.to_prepare(storage):
        folders["data_root"] = storage.path
    return folders


def judge_folders(
    folders: Mapping[str, Path], refused: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Whether each folder takes files."""
    for flag, reason in refused.items():
        if reason is not None:
            fact = f"{folders[flag]} cannot be written: {reason}"
            yield Finding("PROBLEM", "folders", fact, f"choose another with --{flag}")
    good = [str(folder) for flag, folder in folders.items() if refused[flag] is None]
    if good:
        yield Finding("ok", "folders", f"can be written: {', '.join(good)}")


def disk_needs(run_config: RunConfig, data: DatasetIndex | None) -> list[Need]:
    """The disk space that the run will take beyond what it has already."""
    settings, size = run_config.checkpoint, flops.state_bytes(run_config.model)
    kept = max(2, settings.keep_last) + 2  # and the best, and the one that is being written
    folder = settings.checkpoint_dir
    has = sum(item.metadata.bytes for item in store.list_checkpoints(folder))
    needs = [
        Need(
            f"{kept} checkpoints of {_gb(size)}",
            folder,
            max(0, kept * size - has),
            "make room, lower --keep_last, or choose another --checkpoint_dir",
        )
    ]
    cache = setup.cache_of(run_config)
    if data is not None and data.storage.path is None:
        whole = sum(shard.bytes for shard in data.shards)
        share = whole if cache.limit_bytes is None else min(whole, cache.limit_bytes)
        has = sum(path.stat().st_size for path in cache.folder.glob("*") if path.is_file())
        remedy = "lower --cache_gb, or choose another --cache_dir"
        needs.append(Need("copies of shards", cache.folder, max(0, share - has), remedy))
    return needs


def judge_disk(free: int, needs: list[Need]) -> Finding:
    """Whether a disk has room for everything that the run puts on it."""
    listed = " and ".join(f"{need.what} take {_gb(need.bytes)} more" for need in needs)
    fact = f"{_gb(free)} free for {needs[0].folder}; {listed}"
    if sum(need.bytes for need in needs) > free:
        return Finding("PROBLEM", "disk", fact, "; ".join(need.remedy for need in needs))
    return Finding("ok", "disk", fact)


def judge_open_files(limit: int | None, shards: int) -> Finding:
    """The hard limit, because a run raises the soft one to what its shards need."""
    wanted = open_files_needed(shards)
    if limit is not None and limit < wanted:
        fact = f"{limit:,} allowed, {wanted:,} needed for {counted(shards, 'shard')}"
        remedy = "raise it: LimitNOFILE= of systemd, or nofile in /etc/security/limits.conf"
        return Finding("PROBLEM", "open files", fact, remedy)
    allowed = "no limit" if limit is None else f"{limit:,} allowed"
    return Finding("ok", "open files", f"{allowed}, {wanted:,} needed")


def _of_this_machine(run_config: RunConfig, ranks: int, device: torch.device) -> Iterator[Finding]:
    on_gpu, state_bytes = device.type == "cuda", flops.state_bytes(run_config.model)
    yield judge_memory(machine.memory_bytes(), state_bytes, 0 if on_gpu else ranks)
    yield judge_shared_memory(machine.shared_memory_bytes(), ranks if on_gpu else 1)
    yield judge_own_name(machine.own_address(), ranks)
    folder = run_config.checkpoint.checkpoint_dir
    newest = max(
        (item.metadata.time for item in store.list_checkpoints(folder)),
        default=Path(__file__).stat().st_mtime,
    )
    yield judge_clock(time.time(), newest)
    if on_gpu and find_spec("pynvml") is None:
        yield Finding("note", "GPU watch", "no utilisation", "pip install nvidia-ml-py")


def judge_memory(available: int | None, state_bytes: int, ranks_on_cpu: int) -> Finding:
    """Whether the host has room for the copy that a checkpoint is written from, and, without a
    GPU, for what each rank trains."""
    training = ranks_on_cpu * state_bytes * 4 // 3
    needed = state_bytes + training
    parts = f"{_gb(state_bytes)} for a checkpoint on its way to the disk"
    if training:
        parts += f", {_gb(training)} for weights, gradients and moments"
    if available is None:
        return Finding("note", "memory", f"unknown; needed: {parts}")
    fact = f"{_gb(available)} available; needed beside activations: {parts}"
    if needed > available:
        return Finding("PROBLEM", "memory", fact, "free some, or use a smaller --preset")
    return Finding("ok", "memory", fact)


def judge_shared_memory(free: int, ranks_on_gpu: int) -> Finding:
    """NCCL moves gradients through it where GPUs cannot reach each other; nothing else uses it:
    batches are read by threads, and gloo talks through sockets."""
    fact = f"{_gb(free)} free in {machine.SHARED_MEMORY}"
    if ranks_on_gpu > 1 and free < NCCL_SHARED_MEMORY:
        fact += f", NCCL wants {_gb(NCCL_SHARED_MEMORY)}"
        return Finding("PROBLEM", "shared memory", fact, "docker run --shm-size=1g")
    return Finding("ok", "shared memory", fact)


def judge_own_name(address: str | None, ranks: int) -> Finding:
    """Ranks find each other by the name of the machine."""
    if address is not None:
        return Finding("ok", "host name", f"is {address}")
    level: Level = "PROBLEM" if ranks > 1 else "note"
    remedy = 'echo "127.0.0.1 $(hostname)" | sudo tee -a /etc/hosts'
    return Finding(level, "host name", "has no address: ranks cannot find each other", remedy)


def judge_clock(now: float, newest: float) -> Finding:
    """Forecasts and the order of curves go by the clock; no result of training does."""
    said = f"{datetime.fromtimestamp(now):%Y-%m-%d %H:%M}"
    if now < newest:
        fact = f"{said}, but a file was written {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
        return Finding("note", "clock", fact, "sudo timedatectl set-ntp true")
    return Finding("ok", "clock", said)


def _problem(what: str, error: UserError) -> Finding:
    """An error as the run would print it, its way out included."""
    return Finding("PROBLEM", what, " ".join(str(error).split()))


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"
