import contextlib
import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist

from gpt2.base.errors import ConfigError, TrainingError, UserError
from gpt2.config.run import MachineConfig
from gpt2.distributed import device, precision, rendezvous

CPU = MachineConfig(device="cpu")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_ranks_than_gpus(monkeypatch, wanted: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in rendezvous.rank_variables(0, 4, 1).items():
        monkeypatch.setenv(name, value)
    expected = r"4 ranks on a machine with 2 GPUs; use --nproc_per_node=2, or --device cpu"
    with pytest.raises(ConfigError, match=expected), rendezvous.join(MachineConfig(device=wanted)):
        pass


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one"}, "expected a number in the environment variable RANK, got 'one'"),
        ({"WORLD_SIZE": "-1"}, "environment variable WORLD_SIZE, got '-1'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; start several ranks with"),
        ({"MASTER_PORT": "http"}, "environment variable MASTER_PORT, got 'http'"),
        ({"MASTER_PORT": "65536"}, "at most 65535 in MASTER_PORT, got 65536"),
        ({"RANK": "1"}, "WORLD_SIZE is 1, but RANK is 1"),
        (rendezvous.rank_variables(2, 2, 1), "WORLD_SIZE is 2, but RANK is 2"),
    ],
)
def test_variables_that_torchrun_would_not_set(monkeypatch, variables: dict, message: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        rendezvous.env_rank()


def test_a_port_that_is_taken_is_a_line(monkeypatch: pytest.MonkeyPatch):
    """Of rank 0 without torchrun, which starts the store itself."""
    monkeypatch.setattr(rendezvous, "_set_up", lambda *_: None)  # of this process
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in rendezvous.rank_variables(0, 2, port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        expected = rf"another process uses port {port} \(MASTER_PORT\) .*; choose a free port"
        with pytest.raises(TrainingError, match=expected), rendezvous.join(CPU):
            pass


@pytest.mark.parametrize("address", ["localhost", "a" * 80, "no..such"])
def test_a_store_that_does_not_answer_is_a_line(monkeypatch, capfd, address: str):
    """torch would print its C++ frames before it."""
    monkeypatch.setattr(rendezvous, "_set_up", lambda *_: None)  # of this process
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.1)
    for name, value in rendezvous.rank_variables(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", address)
    expected = rf"no connection to {address}:1 \(MASTER_ADDR, MASTER_PORT\); start torchrun"
    with pytest.raises(TrainingError, match=expected), rendezvous.join(CPU):
        pass
    assert capfd.readouterr().err == ""


def test_another_program_in_place_of_the_store_is_a_line(monkeypatch: pytest.MonkeyPatch):
    """torch awaits its answer for ever."""
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.1)
    with socket.create_server(("", 0)) as server:
        for name, value in rendezvous.rank_variables(1, 2, server.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match="no connection to localhost:"):
            rendezvous._shared_store()


def test_a_program_that_hangs_up_is_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "CONNECT_S", 1)
    with socket.create_server(("", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        for name, value in rendezvous.rank_variables(1, 2, server.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match="no connection to localhost:"):
            rendezvous._shared_store()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
    "TORCHINDUCTOR_DYNAMIC_SCALE_RBLOCK": "0",
}


def test_deterministic(monkeypatch: pytest.MonkeyPatch):
    """Inductor may be imported already, with the settings that it had before."""
    import torch._inductor.config as inductor  # takes seconds

    # torch 2.9 does not have all of these settings
    known = {"deterministic": True, "dynamic_scale_rblock": False}
    known = {name: value for name, value in known.items() if hasattr(inductor, name)}
    for name, value in known.items():
        monkeypatch.setattr(inductor, name, not value)
    for name in DETERMINISTIC:
        monkeypatch.setenv(name, "")  # so that it is as before, afterwards
        monkeypatch.delenv(name)
    try:
        with rendezvous.join(MachineConfig(device="cpu", deterministic=True)):
            assert torch.are_deterministic_algorithms_enabled()
            assert DETERMINISTIC.items() <= os.environ.items()
            assert known == {name: getattr(inductor, name) for name in known}
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with four GPUs; the list has those that a process chooses."""
    chosen: list[torch.device] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(device, "use_expandable_segments", lambda: None)
    monkeypatch.setattr(precision, "require_kernels", lambda _: None)
    return chosen


def test_a_run_on_a_chosen_gpu(gpus: list[torch.device]):
    with rendezvous.join(MachineConfig(), gpu="2") as world:
        assert gpus == [world.device] == [torch.device("cuda", 2)]
    with rendezvous.join(MachineConfig(), gpu="cpu") as world:
        assert world.device.type == "cpu"
    for machine, gpu in [(MachineConfig(device="cuda"), "cpu"), (MachineConfig(), "4")]:
        with pytest.raises(ConfigError, match=f"gpu_id={gpu}"), rendezvous.join(machine, gpu):
            pass


class GroupOnCuda:
    """What `join` does with the process groups of rank 1 of 2 on CUDA, without CUDA."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.options: dict[str, object] = {}
        for name, value in rendezvous.rank_variables(1, 2, 0).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # nothing to watch
        store = dist.HashStore()
        monkeypatch.setattr(rendezvous, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
        monkeypatch.setattr(rendezvous, "_require_listener", lambda *_: None)
        monkeypatch.setattr(rendezvous, "_store_of_this_start", lambda *_: store)
        monkeypatch.setattr(dist, "init_process_group", self.init_process_group)
        monkeypatch.setattr(dist, "new_group", lambda **_: None)
        for name in ("destroy_process_group", "distributed_c10d._abort_process_group"):
            monkeypatch.setattr(
                f"torch.distributed.{name}", lambda name=name: self.calls.append(name)
            )

    def init_process_group(self, backend: str, **options: object) -> None:
        self.options = {"backend": backend, **options}


def test_nccl_is_bound_to_the_device_of_the_rank(monkeypatch, gpus):
    group = GroupOnCuda(monkeypatch)
    with rendezvous.join(MachineConfig(device="cuda")) as world:
        assert group.options["device_id"] == world.device == torch.device("cuda", 1)
        assert group.options["backend"] == "cpu:gloo,cuda:nccl"
    assert group.calls == ["destroy_process_group"]
    with rendezvous.join(MachineConfig(device="cpu")):
        assert group.options["device_id"] is None


def test_a_user_error_destroys_the_group_without_waiting_for_other_ranks(monkeypatch, gpus):
    group = GroupOnCuda(monkeypatch)
    with pytest.raises(UserError), rendezvous.join(MachineConfig(device="cuda")):
        raise UserError("the batch does not fit")
    assert group.calls == ["distributed_c10d._abort_process_group"]
    with pytest.raises(UserError), rendezvous.join(MachineConfig(device="cpu")):
        raise UserError("the batch does not fit")
    assert group.calls[1:] == ["destroy_process_group"]
