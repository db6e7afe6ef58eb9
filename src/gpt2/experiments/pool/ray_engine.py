"""The jobs of an experiment on a Ray cluster: on whichever of its machines has room.

A worker process is the same there as on the owner's machine. It is the child of a Ray task, its
guard, which holds the GPUs or cores that the job may use, and hands on what owner and worker say
to each other, through a mailbox: an actor on the owner's machine. All machines share the folders.
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
from dataclasses import dataclass
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
from gpt2.experiments.pool import slots
from gpt2.experiments.pool.job import Slot
from gpt2.experiments.pool.process import Engine, WorkerProcess

ASK_EVERY_S = 1.0
CONNECT_S = 5.0
LOST = (NodeDiedError, LocalRayletDiedError)
OF_THE_MACHINE = ("CUDA_", "NCCL_", "RAY_", "SLURM_")
"""variables that a worker has from its own machine alone"""


@contextlib.contextmanager
def connected(
    address: str | None,
    folder: Path,
    count: int | None,
    device: str,
    max_gpus: int | None = None,
    ddp: int = 1,
) -> Iterator[Engine]:
    """The engine of a Ray cluster while the block runs, for the experiment in `folder`.

    Without `address` it is the one of RAY_ADDRESS or of this machine, else a new one of this
    machine alone. It has `count` slots, by default one for each `ddp` GPUs that a machine has, of
    these `max_gpus` at most, and without GPUs two on each machine. Raises ConfigError if nothing
    answers at the address, and if no machine has `ddp` GPUs.
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
        places, demand = share_out(_machines(), count, device, max_gpus, ddp)
        with Cluster(folder, demand) as cluster:
            yield Engine(places, cluster.start_worker, is_fixed=False)
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Home:
    """What a worker must find on its machine as the owner has it."""

    folder: Path
    """of the experiment; absolute"""
    owner: folder_lock.Owner | None
    """who has the folder"""
    working_directory: str
    environment: Mapping[str, str]
    search_path: list[str]

    @classmethod
    def of_owner(cls, folder: Path) -> "Home":
        mine = {
            name: value for name, value in os.environ.items() if not name.startswith(OF_THE_MACHINE)
        }
        return cls(folder.resolve(), folder_lock.owner(folder), os.getcwd(), mine, list(sys.path))

    def enter(self) -> None:
        """Makes this process like the owner; what its machine says otherwise stays.

        Raises ConfigError if the machine does not have the experiment's folder.
        """
        if (
            folder_lock.owner(self.folder) != self.owner
            or not Path(self.working_directory).is_dir()
        ):
            raise ConfigError(
                f"machine {socket.gethostname()} has not the same {self.folder} as the owner of "
                "the experiment: every machine of the cluster must see the same files, by NFS or "
                "the like"
            )
        os.chdir(self.working_directory)
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        sys.path += [entry for entry in self.search_path if entry not in sys.path]


class Mailbox:
    """The actor that keeps messages until they are asked for."""

    def __init__(self) -> None:
        self._news: list[tuple[int, dict[str, Any]]] = []
        self._has_news = asyncio.Event()
        self._orders: dict[int, asyncio.Queue[dict[str, Any]]] = {}

    async def tell(self, number: int, messages: list[dict[str, Any]]) -> None:
        """Worker `number` says something to the owner."""
        self._news += [(number, message) for message in messages]
        self._has_news.set()

    async def news(self) -> list[tuple[int, dict[str, Any]]]:
        """What workers have said, as soon as there is anything, or after a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_news.wait(), ASK_EVERY_S)
        self._has_news.clear()
        news, self._news = self._news, []
        return news

    async def ring(self) -> None:
        """Hands out the news at once, though there may be none."""
        self._has_news.set()

    async def order(self, number: int, order: dict[str, Any]) -> None:
        """The owner says something to worker `number`."""
        self._orders.setdefault(number, asyncio.Queue()).put_nowait(order)

    async def next_order(self, number: int) -> dict[str, Any]:
        """The next thing that the owner says; nothing when the worker has ended."""
        order = await self._orders.setdefault(number, asyncio.Queue()).get()
        if not order:
            self._orders.pop(number, None)
        return order

    async def close(self, number: int) -> None:
        """Worker `number` has ended."""
        if number in self._orders:
            self._orders[number].put_nowait({})


class Cluster:
    """The owner's side: hires workers, and hears of all of them in one thread."""

    def __init__(self, folder: Path, demand: Mapping[str, float]) -> None:
        """Each worker holds what `demand` names of its machine: num_cpus, num_gpus."""
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
        """whether some machine has run a worker: it is not the experiment that none can"""
        self._lost = ""
        """why the cluster as a whole is lost"""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="mailbox", daemon=True)

    def __enter__(self) -> "Cluster":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def start_worker(self, slot: Slot, log: Path) -> "RemoteWorker":
        """A worker on whichever machine has room, now or later; raises TrainingError if the cluster
        is lost."""
        if self._lost:
            raise TrainingError(f"{self._lost}; the same command goes on")
        number = next(self._numbers)
        task = (
            ray.remote(guard)
            .options(max_retries=0, name=f"{self._folder.name} {slot.name}", **self._demand)
            .remote(self.mailbox, number, slot, log.resolve(), Home.of_owner(self._folder))
        )
        hired = self._workers[number] = RemoteWorker(self.mailbox, number, task, log)
        return hired

    def _listen(self) -> None:
        """Hands out what workers say, and notices how they end, until the experiment has."""
        ending: list[RemoteWorker] = []
        try:
            asked = self.mailbox.news.remote()
            while not self._over.is_set():
                tasks = {worker.task: worker for worker in list(self._workers.values())}
                ready, _ = ray.wait([asked, *tasks], num_returns=1)
                if ready != [asked]:
                    self.mailbox.ring.remote()
                for number, message in ray.get(asked):
                    self._has_run = True
                    if number in self._workers:
                        self._workers[number].hear(message)
                for worker in ending:
                    worker.end(**self._how_ended(worker.task))
                    del self._workers[worker.number]
                left = [task for task, worker in tasks.items() if worker not in ending]
                ended, _ = ray.wait(left, num_returns=len(left), timeout=0) if left else ([], [])
                ending = [tasks[task] for task in ended]
                for worker in ending:  # it may have died, and not said so
                    self.mailbox.close.remote(worker.number)
                # After the look for ends: these news hold the last words of who has ended.
                asked = self.mailbox.news.remote()
        except Exception as error:  # whatever it is, nobody would hear a worker any more
            self._lost = f"the Ray cluster is lost: {_first_line(error)}"
            for worker in self._workers.values():
                worker.end(self._lost, is_lost=True)

    def _how_ended(self, task: Any) -> dict[str, Any]:
        """How a guard that has ended did so, as `RemoteWorker.end` takes it."""
        try:
            return {"how": ray.get(task)}
        except TaskCancelledError:
            return {"how": "it was ended before it began"}
        except LOST:
            return {"how": "its machine is lost", "is_lost": True}
        except RayTaskError as error:
            cause = error.cause
            words = _first_line(cause or error)
            if not isinstance(cause, UserError):
                words = f"a machine of the Ray cluster cannot run a worker: {words}"
            return {"how": words, "is_refused": not self._has_run}
        except RayError as error:
            return {"how": f"its process was ended by Ray: {_first_line(error)}"}


class RemoteWorker:
    """A worker process on a machine of the cluster, as its owner sees it."""

    def __init__(self, mailbox: Any, number: int, task: Any, log: Path) -> None:
        self.log, self.pid, self.host = log, 0, ""
        self.machine_is_lost = False
        self.number, self.task = number, task
        self._mailbox = mailbox
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._heard: deque[dict[str, Any]] = deque()
        self._how = ""
        self._is_refused = self._is_killed = False
        self._ending = threading.Lock()
        """the bell must not be gone when it is rung for the last time"""

    @property
    def handles(self) -> list[int]:
        return [self._bell]

    @property
    def has_ended(self) -> bool:
        return bool(self._how)

    def hear(self, message: dict[str, Any]) -> None:
        """Takes what the worker says; called by the thread that listens."""
        self._heard.append(message)
        os.eventfd_write(self._bell, 1)

    def end(self, how: str, *, is_lost: bool = False, is_refused: bool = False) -> None:
        """Takes note that it has ended; called by the thread that listens."""
        with self._ending:
            self.machine_is_lost, self._is_refused = is_lost, is_refused
            self._how = how
            os.eventfd_write(self._bell, 1)

    def receive(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        messages = []
        while self._heard:
            message = self._heard.popleft()
            if "hired" in message:
                self.pid, self.host = message["hired"], message["host"]
            else:
                messages.append(message)
        return messages

    def send(self, message: Any) -> None:
        self._order({"send": message})

    def signal(self, number: int) -> None:
        self._order({"signal": number})
        if not self.pid and number == signal.SIGTERM:  # it may never begin
            ray.cancel(self.task)

    def end_when_idle(self) -> None:
        self._order({"end_when_idle": True})

    def kill(self) -> None:
        self._order({"kill": True})
        if self._is_killed or not self.pid:
            ray.cancel(self.task, force=self._is_killed)
        self._is_killed = True

    def collect_exit_status(self) -> str:
        """Says how it ended. Raises TrainingError if its machine cannot run any worker."""
        if self._is_refused:
            self._is_refused = False
            raise TrainingError(f"{self._how}; the same command goes on")
        with self._ending:
            os.close(self._bell)
        return self._how

    def _order(self, order: dict[str, Any]) -> None:
        with contextlib.suppress(RayError):  # the thread that listens will notice
            self._mailbox.order.remote(self.number, order)


def guard(mailbox: Any, number: int, slot: Slot, log: Path, home: Home) -> str:
    """The Ray task: runs a worker process on its machine, and says how that ended."""
    home.enter()
    hired = WorkerProcess(slot, log)
    threading.Thread(target=_obey, args=(mailbox, number, hired), daemon=True).start()
    try:
        _done(mailbox.tell.remote(number, [{"hired": hired.pid, "host": socket.gethostname()}]))
        while True:
            wait(hired.handles)
            has_ended = hired.has_ended  # before its last words are read
            if messages := hired.receive():
                _done(mailbox.tell.remote(number, messages))
            if has_ended:
                return hired.collect_exit_status()
    except BaseException:  # it is cancelled, or the owner's machine is gone
        hired.kill()
        raise
    finally:
        mailbox.close.remote(number)


def _obey(mailbox: Any, number: int, hired: WorkerProcess) -> None:
    """Does to the worker what the owner says, until the guard ends."""
    try:
        while order := _done(mailbox.next_order.remote(number)):
            if "send" in order:
                hired.send(order["send"])
            elif "signal" in order:
                hired.signal(order["signal"])
            elif "end_when_idle" in order:
                hired.end_when_idle()
            else:
                hired.kill()
    except RayError:  # it would wait for answers for ever
        hired.kill()


def _done(reference: Any) -> Any:
    """The result of a call. Not `ray.get`, in which a task lends its cores to others."""
    return reference.future().result()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _require_answer(address: str) -> None:
    """Raises ConfigError if nothing answers at the address, which Ray takes minutes to say."""
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
    """What each machine of the cluster has, as Ray counts it."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def share_out(
    machines: Sequence[Mapping[str, float]],
    count: int | None,
    device: str,
    max_gpus: int | None,
    ddp: int,
) -> tuple[list[Slot], dict[str, float]]:
    """The slots on these machines, and what a worker on one of them holds of its machine."""
    cores = [machine.get("CPU", 0.0) for machine in machines]
    gpus = [] if device == "cpu" else [machine["GPU"] for machine in machines if "GPU" in machine]
    if device == "cuda" and not gpus:
        raise ConfigError("device=cuda, but the Ray cluster has no GPU; use --device cpu")
    if gpus:
        groups = sum(int(of_machine) // ddp for of_machine in gpus)
        if not groups:
            raise ConfigError(f"--ddp {ddp}: no machine of the cluster has so many GPUs")
        if max_gpus and max_gpus < ddp:
            raise ConfigError(f"--max_gpus {max_gpus} is less than the GPUs of --ddp {ddp}")
        count = count or min(groups, (max_gpus or groups * ddp) // ddp)
        share = float(ddp)
        if ddp == 1 and count > groups:  # a part of a GPU lies on one of them
            share = slots.rounded(1 / math.ceil(count / groups))
        demand = {"num_gpus": share, "num_cpus": 0.0}
        with_gpus = [machine for machine in machines if machine.get("GPU", 0.0) >= share]
        threads = min(machine.get("CPU", 1.0) * share / machine["GPU"] for machine in with_gpus)
    else:
        shares = sum(min(slots.CPU_SHARES, int(of_machine)) for of_machine in cores)
        if not shares:
            raise ConfigError("the Ray cluster has no cores for jobs yet; let a machine join first")
        count = count or min(shares, max_gpus or shares)
        demand = {"num_cpus": slots.fair_share(cores, count)}
        threads = demand["num_cpus"]
    mine = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(threads / ddp)))
    environment = {"OMP_NUM_THREADS": mine}
    return [Slot(index, f"ray{index}", environment) for index in range(count)], demand
