"""Workers on the machines of a Ray cluster, each on the first machine that has room.

A worker process is the same there as on the owner's machine. It is the child of a Ray task, its
guard, which holds the GPUs or cores of the job and forwards the messages of owner and worker
through a mailbox, an actor on the owner's machine. The scheduler sees a RemoteWorker. All machines
share the folders.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpt2.base import folder_lock
from gpt2.base.errors import ConfigError, TrainingError, UserError
from gpt2.experiments.pool import messages, slots
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.pool.messages import (
    EndWhenIdle,
    Kill,
    Message,
    SendSignal,
    WorkerStarted,
)
from gpt2.experiments.pool.process import Engine, WorkerProcess

logger = logging.getLogger(__name__)

OWNER_WAIT_S = 1.0
"""how long the mailbox keeps the owner waiting"""
CONNECT_S = 5.0
LOST = (NodeDiedError, LocalRayletDiedError)
OF_THE_MACHINE = ("CUDA_", "NCCL_", "RAY_", "SLURM_")
"""prefixes of variables that a worker takes from its own machine"""


@contextlib.contextmanager
def connected(
    address: str | None,
    folder: Path,
    count: int | None,
    device: str,
    max_gpus: int | None = None,
    ddp: int = 1,
) -> Iterator[Engine]:
    """The engine of a Ray cluster within the block, for the experiment in `folder`.

    Without `address` it is the cluster of RAY_ADDRESS or of this machine, else a new one of this
    machine alone. It has `count` slots with `ddp` GPUs each. The default is as many as the machines
    have groups of `ddp` GPUs, `max_gpus` GPUs at most; without GPUs, two per machine. Raises
    ConfigError if nothing answers at the address, and if no machine has `ddp` GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _require_answer(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--ray_address {address or 'auto'}: {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        cluster_slots, demand = share_out(_machines(), count, device, max_gpus, ddp)
        with Cluster(folder, demand) as cluster:
            yield Engine(cluster_slots, cluster.start_worker, is_fixed=False)
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Home:
    """What a worker must share with the owner: files, directory, environment, modules."""

    folder: Path
    """of the experiment; absolute"""
    owner: folder_lock.Owner | None
    """the process that holds the lock of the folder"""
    working_directory: str
    environment: Mapping[str, str]
    search_path: list[str]

    @classmethod
    def of_owner(cls, folder: Path) -> "Home":
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(OF_THE_MACHINE)
        }
        return cls(folder.resolve(), folder_lock.owner(folder), os.getcwd(), own, list(sys.path))

    def enter(self) -> None:
        """Gives this process the owner's directory, variables and search path; variables that its
        machine sets stay. Raises ConfigError if the machine does not see the experiment's folder.
        """
        if (
            folder_lock.owner(self.folder) != self.owner
            or not Path(self.working_directory).is_dir()
        ):
            raise ConfigError(
                f"machine {socket.gethostname()} does not see the owner's {self.folder}: every "
                "machine of the cluster must see the same files, for example through NFS"
            )
        os.chdir(self.working_directory)
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        sys.path += [entry for entry in self.search_path if entry not in sys.path]


class Mailbox:
    """The actor, on the owner's machine, through which owner and guards exchange messages as lines.

    It keeps them until they are fetched: those of all guards together, those to each guard apart.
    """

    def __init__(self) -> None:
        self._to_owner: list[tuple[int, bytes]] = []
        self._has_lines = asyncio.Event()
        self._to_guards: dict[int, asyncio.Queue[bytes]] = {}

    async def send_to_owner(self, number: int, lines: list[bytes]) -> None:
        """Called by the guard of worker `number`."""
        self._to_owner += [(number, line) for line in lines]
        self._has_lines.set()

    async def next_for_owner(self) -> list[tuple[int, bytes]]:
        """What guards have sent, each with the number of its worker: as soon as there is anything,
        or an empty list after OWNER_WAIT_S."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_lines.wait(), OWNER_WAIT_S)
        self._has_lines.clear()
        lines, self._to_owner = self._to_owner, []
        return lines

    async def answer_owner(self) -> None:
        """Makes `next_for_owner` return at once."""
        self._has_lines.set()

    async def send_to_guard(self, number: int, line: bytes) -> None:
        """Called by the owner."""
        self._to_guards.setdefault(number, asyncio.Queue()).put_nowait(line)

    async def next_for_guard(self, number: int) -> bytes:
        """The next line for the guard of worker `number`; empty when the worker has ended."""
        line = await self._to_guards.setdefault(number, asyncio.Queue()).get()
        if not line:
            self._to_guards.pop(number, None)
        return line

    async def close(self, number: int) -> None:
        """Worker `number` has ended."""
        if number in self._to_guards:
            self._to_guards[number].put_nowait(b"")


class Cluster:
    """The owner's side: starts workers, and receives from all of them in one thread."""

    def __init__(self, folder: Path, demand: Mapping[str, float]) -> None:
        """Each worker holds `demand` of its machine: num_cpus, num_gpus."""
        self._folder, self._demand = folder, demand
        here = ray.get_runtime_context().get_node_id()
        self.mailbox: Any = (
            ray.remote(Mailbox)
            .options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
            )
            .remote()
        )
        self._numbers = itertools.count()
        self._workers: dict[int, RemoteWorker] = {}
        self._has_run = False
        """whether any machine has run a worker: if none has, the experiment cannot run at all"""
        self._lost = ""
        """why the cluster as a whole is lost"""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="mailbox", daemon=True)

    def __enter__(self) -> "Cluster":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def start_worker(self, slot: Slot, log: Path) -> "RemoteWorker":
        """A worker on the first machine that has room, now or later; raises TrainingError if the
        cluster is lost."""
        if self._lost:
            raise TrainingError(f"{self._lost}; run the same command to continue")
        number = next(self._numbers)
        task = (
            ray.remote(guard)
            .options(max_retries=0, name=f"{self._folder.name} {slot.name}", **self._demand)
            .remote(self.mailbox, number, slot, log.resolve(), Home.of_owner(self._folder))
        )
        started = self._workers[number] = RemoteWorker(self.mailbox, number, task, log)
        return started

    def _receive(self) -> None:
        """The thread: passes on what workers send, and notices how they end."""
        ending: list[RemoteWorker] = []
        try:
            pending = self.mailbox.next_for_owner.remote()
            while not self._over.is_set():
                tasks = {worker.task: worker for worker in list(self._workers.values())}
                ready, _ = ray.wait([pending, *tasks], num_returns=1)
                if ready != [pending]:
                    self.mailbox.answer_owner.remote()
                for number, line in ray.get(pending):
                    self._has_run = True
                    if number in self._workers:
                        self._workers[number].on_message(messages.decode(line))
                for worker in ending:
                    worker.on_end(self._ending_of(worker.task))
                    del self._workers[worker.number]
                left = [task for task, worker in tasks.items() if worker not in ending]
                ended, _ = ray.wait(left, num_returns=len(left), timeout=0) if left else ([], [])
                ending = [tasks[task] for task in ended]
                for worker in ending:  # it may have died before it closed its part of the mailbox
                    self.mailbox.close.remote(worker.number)
                # Requested after the look for ends: this answer has the last messages of `ending`.
                pending = self.mailbox.next_for_owner.remote()
        except Exception as error:  # whatever it is, no worker can be reached any more
            if not isinstance(error, RayError):
                logger.exception("the thread that receives from the Ray cluster failed:")
            self._lost = f"the Ray cluster is lost: {_first_line(error)}"
            for worker in self._workers.values():
                worker.on_end(Ending(self._lost, is_machine_lost=True))

    def _ending_of(self, task: Any) -> "Ending":
        """How a guard that has ended did so."""
        try:
            return Ending(ray.get(task))
        except TaskCancelledError:
            return Ending("it was cancelled before it started")
        except LOST:
            return Ending("its machine is lost", is_machine_lost=True)
        except RayTaskError as error:
            cause = error.cause
            reason = _first_line(cause or error)
            if not isinstance(cause, UserError):
                reason = f"a machine of the Ray cluster cannot run a worker: {reason}"
            return Ending(reason, is_refused=not self._has_run)
        except RayError as error:
            return Ending(f"its process was ended by Ray: {_first_line(error)}")


@dataclass(frozen=True)
class Ending:
    """How a worker ended."""

    reason: str
    is_machine_lost: bool = False
    is_refused: bool = False
    """whether no machine can run a worker, which ends the experiment"""


class RemoteWorker:
    """A worker process on a machine of the cluster, as the scheduler sees it."""

    def __init__(self, mailbox: Any, number: int, task: Any, log: Path) -> None:
        self.log, self.pid, self.host = log, 0, ""
        self.machine_is_lost = False
        self.number, self.task = number, task
        self._mailbox = mailbox
        self._readable = os.eventfd(0, os.EFD_NONBLOCK)
        self._received: deque[Message] = deque()
        self._ending: Ending | None = None
        self._is_killed = False
        self._lock = threading.Lock()
        """the eventfd is not closed while the other thread writes to it"""

    @property
    def handles(self) -> list[int]:
        return [self._readable]

    @property
    def has_ended(self) -> bool:
        return self._ending is not None

    def on_message(self, message: Message) -> None:
        """The worker has sent it; called by the thread that receives."""
        self._received.append(message)
        os.eventfd_write(self._readable, 1)

    def on_end(self, ending: Ending) -> None:
        """The worker has ended; called by the thread that receives."""
        with self._lock:
            self.machine_is_lost = ending.is_machine_lost
            self._ending = ending
            os.eventfd_write(self._readable, 1)

    def receive(self) -> list[Message]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._readable)
        received: list[Message] = []
        while self._received:
            message = self._received.popleft()
            if isinstance(message, WorkerStarted):
                self.pid, self.host = message.pid, message.host
            else:
                received.append(message)
        return received

    def send(self, message: Message) -> None:
        with contextlib.suppress(RayError):  # the thread that receives will notice
            self._mailbox.send_to_guard.remote(self.number, messages.encode(message))

    def signal(self, number: int) -> None:
        self.send(SendSignal(number))
        if not self.pid and number == signal.SIGTERM:  # it may never start
            ray.cancel(self.task)

    def end_when_idle(self) -> None:
        self.send(EndWhenIdle())

    def kill(self) -> None:
        self.send(Kill())
        if self._is_killed or not self.pid:
            ray.cancel(self.task, force=self._is_killed)
        self._is_killed = True

    def collect_exit_status(self) -> str:
        """How it ended. Raises TrainingError, once, if no machine can run a worker."""
        ending = self._ending
        assert ending is not None
        if ending.is_refused:
            self._ending = replace(ending, is_refused=False)
            raise TrainingError(f"{ending.reason}; run the same command to continue")
        with self._lock:
            os.close(self._readable)
        return ending.reason


def guard(mailbox: Any, number: int, slot: Slot, log: Path, home: Home) -> str:
    """The Ray task: runs a worker process on its machine, forwards messages, and returns how the
    worker ended."""
    home.enter()
    worker = WorkerProcess(slot, log)
    threading.Thread(target=_forward_to, args=(worker, mailbox, number), daemon=True).start()

    def send(received: Sequence[Message]) -> None:
        lines = [messages.encode(message) for message in received]
        _result(mailbox.send_to_owner.remote(number, lines))

    try:
        send([WorkerStarted(worker.pid, socket.gethostname())])
        while True:
            wait(worker.handles)
            has_ended = worker.has_ended  # before its last messages are read
            if received := worker.receive():
                send(received)
            if has_ended:
                return worker.collect_exit_status()
    except BaseException:  # the task is cancelled, or the owner's machine is gone
        worker.kill()
        raise
    finally:
        mailbox.close.remote(number)


def _forward_to(worker: WorkerProcess, mailbox: Any, number: int) -> None:
    """A thread of the guard: obeys and forwards what the owner sends, until the worker ends."""
    try:
        while line := _result(mailbox.next_for_guard.remote(number)):
            match messages.decode(line):
                case SendSignal(number_of_signal):
                    worker.signal(number_of_signal)
                case EndWhenIdle():
                    worker.end_when_idle()
                case Kill():
                    worker.kill()
                case message:
                    worker.send(message)
    except (RayError, ValueError):  # ValueError: a message of another version
        worker.kill()  # the job would wait for replies for ever


def _result(reference: Any) -> Any:
    """The result of a call. Not `ray.get`, during which a task lends its cores to others."""
    return reference.future().result()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _require_answer(address: str) -> None:
    """Raises ConfigError if nothing answers at the address, which takes Ray minutes to report."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray_address {address}: the owner of an experiment runs on a machine of the "
            "cluster; log in there, and use --ray_address auto"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--ray_address {address}: {error}; on the cluster's first machine run: "
                "ray start --head"
            ) from error


def _machines() -> list[Mapping[str, float]]:
    """The resources of each machine of the cluster, by Ray's names."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def share_out(
    machines: Sequence[Mapping[str, float]],
    count: int | None,
    device: str,
    max_gpus: int | None,
    ddp: int,
) -> tuple[list[Slot], dict[str, float]]:
    """The slots on these machines, and the resources that each worker holds of its machine."""
    cores = [machine.get("CPU", 0.0) for machine in machines]
    gpus = [] if device == "cpu" else [machine["GPU"] for machine in machines if "GPU" in machine]
    if device == "cuda" and not gpus:
        raise ConfigError("device=cuda, but the Ray cluster has no GPU; use --device cpu")
    if gpus:
        groups = sum(int(of_machine) // ddp for of_machine in gpus)
        if not groups:
            raise ConfigError(f"--ddp {ddp}: no machine of the cluster has that many GPUs")
        if max_gpus and max_gpus < ddp:
            raise ConfigError(f"--max_gpus {max_gpus} is less than --ddp {ddp}")
        count = count or min(groups, (max_gpus or groups * ddp) // ddp)
        share = float(ddp)
        if ddp == 1 and count > groups:  # slots share GPUs; a share lies on one GPU
            share = slots.rounded(1 / math.ceil(count / groups))
        demand = {"num_gpus": share, "num_cpus": 0.0}
        with_gpus = [machine for machine in machines if machine.get("GPU", 0.0) >= share]
        threads = min(machine.get("CPU", 1.0) * share / machine["GPU"] for machine in with_gpus)
    else:
        shares = sum(min(slots.CPU_SHARES, int(of_machine)) for of_machine in cores)
        if not shares:
            raise ConfigError("the Ray cluster has no cores yet; first let a machine join it")
        count = count or min(shares, max_gpus or shares)
        demand = {"num_cpus": slots.fair_share(cores, count)}
        threads = demand["num_cpus"]
    of_each = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(threads / ddp)))
    environment = {"OMP_NUM_THREADS": of_each}
    return [Slot(index, f"ray{index}", environment) for index in range(count)], demand
