"""Workers on the machines of a Ray cluster, each on the first machine that has room.

A worker process is the same there as on the owner's machine. It is the child of a Ray actor, its
guard, which holds the GPUs or cores of the job. The scheduler sees a RemoteWorker, whose thread
passes messages on to and from the guard. All machines share the folders.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from gpt2.base import folder_lock
from gpt2.base.errors import ConfigError
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Job, Slot
from gpt2.experiments.pool.messages import (
    JobEnded,
    JobPhase,
    JobReported,
    Message,
    Reply,
    WorkerEnded,
)
from gpt2.experiments.pool.process import Engine, Inbox, WorkerProcess

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
MAX_LOST_MACHINES = 5
"""that a job may lose without a report in between"""
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
        cluster_slots, demand = share_out(
            [node["Resources"] for node in _nodes()], count, device, max_gpus, ddp
        )
        yield Engine(cluster_slots, partial(RemoteWorker, demand, folder))
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


class Guard:
    """The actor beside a worker process, on its machine; the worker dies with it."""

    def start(self, slot: Slot, log: Path, home: Home) -> tuple[int, str, str]:
        """Starts the worker; returns its pid, and the name and Ray's id of its machine."""
        home.enter()
        self._inbox: Inbox = queue.SimpleQueue()
        self._worker = WorkerProcess(slot, log, self._inbox)
        self._last, self._lock = dict[int, Message](), threading.Lock()
        return self._worker.pid, socket.gethostname(), ray.get_runtime_context().get_node_id()

    def exchange(self, number: int, *to_send: Job | Reply | None) -> Message:
        """Sends this to the worker, and returns the worker's message of this number, as soon as it
        arrives. The owner may call it again if it got no answer."""
        with self._lock:
            if number not in self._last:
                for message in to_send:
                    self._worker.send(message)
                self._last = {number: self._inbox.get()[1]}
            return self._last[number]

    def signal(self, number: int) -> None:
        self._worker.signal(number)


class RemoteWorker:
    """A worker process on a machine of the cluster, as the scheduler sees it.

    If its machine is lost, its job runs again on another one, which is not the job's fault and no
    business of the scheduler.
    """

    def __init__(
        self, demand: Mapping[str, float], folder: Path, slot: Slot, log: Path, inbox: Inbox
    ) -> None:
        """It holds `demand` of its machine: num_cpus, num_gpus."""
        self.log, self.pid, self.host = log, 0, ""
        self._home, self._slot = Home.of_owner(folder), slot
        self._demand, self._inbox = demand, inbox
        self._outbox: queue.SimpleQueue[Job | Reply | None] = queue.SimpleQueue()
        self._guard: Any = None
        self._machine = ""
        """Ray's id of it"""
        self._is_stopping = False
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, message: Job | Reply | None) -> None:
        self._outbox.put(message)

    def signal(self, number: int) -> None:
        self._is_stopping |= number in (signal.SIGTERM, signal.SIGKILL)
        with contextlib.suppress(RayError):  # the thread will notice
            if self._guard and (number == signal.SIGKILL or not self.pid):
                ray.kill(self._guard)  # with it, all that it started; or it may never start
            elif self._guard:
                self._guard.signal.remote(number)

    def _run(self) -> None:
        """The thread: until the worker has ended for good."""
        try:
            ended = self._relay()
        except RayTaskError as error:
            ended = WorkerEnded(_first_line(error.cause or error), lost="engine")
        except Exception as error:  # whatever it is, no worker can be reached any more
            if not isinstance(error, RayError):
                logger.exception("the thread of a worker on the Ray cluster failed:")
            ended = WorkerEnded(f"the Ray cluster is lost: {_first_line(error)}", lost="engine")
        self._leave_machine()
        self._inbox.put((self, ended))

    def _relay(self) -> WorkerEnded:
        """Passes on messages in both directions, on one machine after another if these are lost;
        returns how the worker ended."""
        job: Job | None = None
        number, to_send = 0, [self._outbox.get()]
        lost_machines = 0  # since the job last reported
        while True:
            job = next((item for item in to_send if isinstance(item, Job)), job)
            try:
                guard = self._guard or self._new_guard()
                message: Message = ray.get(guard.exchange.remote(number, *to_send))
            except RayActorError as error:
                if isinstance(error, ActorUnavailableError) and self.pid:
                    continue  # until it answers, or Ray knows that it is dead
                if self._is_stopping or job is None:
                    return WorkerEnded("its machine is lost" if self.pid else "it had not started")
                if self._machine in [node["NodeID"] for node in _nodes()]:
                    return WorkerEnded(f"its process was ended by Ray: {_cause(error)}")
                lost_machines += 1
                if lost_machines > MAX_LOST_MACHINES:
                    return WorkerEnded(f"{lost_machines} machines in a row were lost")
                logger.warning("%s: its machine is lost; it runs again", job.name)
                self._leave_machine()
                self._inbox.put((self, JobPhase("waiting")))
                number, to_send = 0, [job]
                continue
            if isinstance(message, WorkerEnded):
                return message
            self._inbox.put((self, message))
            is_answered = isinstance(message, JobReported)
            if is_answered:
                lost_machines = 0
            elif isinstance(message, JobEnded):
                job, is_answered = None, not message.takes_no_more
            number, to_send = number + 1, [self._outbox.get()] if is_answered else []

    def _new_guard(self) -> Any:
        """A guard, as soon as a machine has room for it."""
        name = f"{self._home.folder.name} {self._slot.name}"
        actor: Any = ray.remote(Guard)
        guard = self._guard = actor.options(max_concurrency=3, **self._demand).remote()
        if self._is_stopping:  # `signal` did not see it
            ray.kill(guard)
        started = guard.start.options(name=name).remote(self._slot, self.log.resolve(), self._home)
        self.pid, self.host, self._machine = ray.get(started)
        return guard

    def _leave_machine(self) -> None:
        guard, self._guard, self.pid, self._machine = self._guard, None, 0, ""
        if guard:
            with contextlib.suppress(RayError):
                ray.kill(guard)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _cause(error: RayActorError) -> str:
    """Why an actor died: the line below the facts about it, which are indented."""
    first, *others = str(error).splitlines()
    return next((line for line in others if not line.startswith("\t")), first).rstrip(".")


def _require_answer(address: str) -> None:
    """Raises ConfigError if nothing answers at the address, which takes Ray minutes to report."""
    host, _, port = address.rpartition(":")
    try:
        if host:
            socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"--ray_address {address}: {error}; expected the HOST:PORT that `ray start --head` "
            "prints, on a machine that has joined that cluster"
        ) from error


def _nodes() -> list[Mapping[str, Any]]:
    """The machines of the cluster, as Ray describes them."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


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
        count = count or min(groups, (max_gpus or groups * ddp) // ddp)
        if not groups or not count:
            raise ConfigError(
                f"--ddp {ddp} needs as many GPUs of one machine, got {max(map(int, gpus))} at most"
                + (f" and --max_gpus {max_gpus}" if max_gpus else "")
            )
        # Slots may share GPUs; the share of a slot lies on one of them.
        share = float(ddp) if ddp > 1 else slots.fair_share([1.0] * groups, count)
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
    environment = {"OMP_NUM_THREADS": slots.threads(threads / ddp)}
    return [Slot(index, f"ray{index}", environment) for index in range(count)], demand
