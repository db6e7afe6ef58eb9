"""A Ray cluster of a head and two machines, all of them processes here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.given import is_alive, wait_until
from experiments.ray_cluster import Machines
from gpt2.base.errors import ConfigError
from gpt2.experiments.pool import ray_engine, slots
from gpt2.experiments.pool.ray_engine import Home
from support import ROOT, loss_lines, run_command, small_flags

GPT2 = [sys.executable, "-m", "gpt2"]


@pytest.fixture(autouse=True)
def tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a test starts: the functions of its sweeps are in experiments.jobs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def sweep(machines: Machines, out: Path, *more: str) -> list[str]:
    """`gpt2 seeds` of a function that counts; it leaves a line for every start."""
    flags = ["--checkpoint_dir", f"{out}/sweep", "--log_dir", f"{out}/logs", "--grid"]
    flags += [f"trace={out}/trace", "until=20", *more]
    target = ["seeds", "--target", "experiments.jobs:counts_for_seed"]
    return [*GPT2, *target, *flags, "--engine", "ray", "--ray_address", machines.address]


def started(owner: "subprocess.Popen[Any]", out: Path, count: int) -> list[int]:
    """The processes of the first `count` jobs, as soon as these run."""
    trace = out / "trace"
    wait_until(
        lambda: (
            owner.poll() is not None or (trace.exists() and trace.read_text().count("\n") >= count)
        )
    )
    lines = trace.read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("counts")]


def results(out: Path) -> dict[int, dict[str, object]]:
    lines = [json.loads(line) for line in (out / "sweep/results.jsonl").read_text().splitlines()]
    assert len({line["job"] for line in lines}) == len(lines)
    return {line["values"]["seed"]: line for line in lines}


@pytest.mark.soak
def test_a_machine_that_is_lost_costs_no_job(machines: Machines, tmp_path: Path):
    """Its job runs elsewhere, though nothing may be retried; machines that come later are used."""
    command = sweep(machines, tmp_path, "pause=0.1")
    owner = subprocess.Popen(
        [*command, "--num_seeds", "7", "--retries", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = started(owner, tmp_path, 2)
    machines.ask("kill")
    wait_until(lambda: not all(map(is_alive, pids)))  # its worker ends with it
    machines.ask("add")
    _, said = owner.communicate()
    assert owner.returncode == 0, said
    found = results(tmp_path)
    assert sorted(found) == list(range(7))
    assert {line["result"]["value"] for line in found.values()} == {20}
    assert {line["attempt"] for line in found.values()} == {1}
    assert len((tmp_path / "trace").read_text().splitlines()) == 8
    assert "its machine is lost; it runs again" in said


@pytest.mark.soak
def test_interrupt_asks_jobs_to_stop_and_the_same_command_goes_on(
    machines: Machines, tmp_path: Path
):
    command = [*sweep(machines, tmp_path, "pause=0.1"), "--num_seeds", "3"]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = started(owner, tmp_path, 2)
    owner.send_signal(signal.SIGINT)
    said, _ = owner.communicate()
    assert owner.returncode == 130 and "run the same command to continue" in said
    assert (tmp_path / "trace").read_text().count("stops") == 2
    assert not any(map(is_alive, pids))
    said = run_command(command).stdout
    assert "finished: 3 of 3 done" in said and len(results(tmp_path)) == 3


@pytest.mark.soak
def test_nothing_outlives_an_owner_that_is_killed(machines: Machines, tmp_path: Path):
    owner = subprocess.Popen([*sweep(machines, tmp_path, "pause=60"), "--num_seeds", "2"], cwd=ROOT)
    pids = started(owner, tmp_path, 2)
    assert all(map(is_alive, pids))
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize(
    "address",
    ["ray://head:10001", "localhost:1", "localhost:many"],
)
def test_no_cluster_at_the_address(tmp_path: Path, address: str):
    with (
        pytest.raises(ConfigError, match="ray start --head"),
        ray_engine.connected(address, tmp_path, 1, "cpu"),
    ):
        pass


def test_machine_without_the_files_of_the_owner_is_refused(tmp_path: Path):
    home = Home.of_owner(tmp_path)
    (tmp_path / "owner.json").write_text('{"host": "other", "pid": 1, "started": "now"}')
    with pytest.raises(ConfigError, match="must see the same files"):
        home.enter()


@pytest.mark.parametrize(
    ("options", "count", "demand"),
    [
        ({}, 12, {"num_gpus": 1.0, "num_cpus": 0.0}),
        ({"max_gpus": 2}, 2, {"num_gpus": 1.0, "num_cpus": 0.0}),
        ({"count": 24}, 24, {"num_gpus": 0.5, "num_cpus": 0.0}),
        ({"count": 13}, 13, {"num_gpus": 0.5, "num_cpus": 0.0}),
        ({"ddp": 4}, 3, {"num_gpus": 4.0, "num_cpus": 0.0}),
        ({"device": "cpu"}, 6, {"num_cpus": 10.6666}),
        ({"device": "cpu", "count": 2}, 2, {"num_cpus": 32.0}),
    ],
)
def test_what_a_slot_of_a_cluster_holds(options: dict[str, Any], count: int, demand: object):
    machines = [{"GPU": 8.0, "CPU": 32.0}, {"GPU": 4.0, "CPU": 32.0}, {"CPU": 16.0}]
    asked = {"count": None, "device": "auto", "max_gpus": None, "ddp": 1} | options
    places, held = ray_engine.share_out(machines, **asked)
    assert (len(places), held) == (count, demand)


def test_more_gpus_for_a_training_than_a_machine_has():
    with pytest.raises(ConfigError, match="--ddp 8 needs as many GPUs of one machine, got 4"):
        ray_engine.share_out([{"GPU": 4.0, "CPU": 8.0}] * 2, None, "auto", None, ddp=8)


def test_a_cluster_without_cores_and_too_few_gpus():
    with pytest.raises(ConfigError, match="no cores"):
        ray_engine.share_out([{"CPU": 0.0}], None, "auto", None, 1)
    with pytest.raises(ConfigError, match="and --max_gpus 2"):
        ray_engine.share_out([{"GPU": 8.0, "CPU": 8.0}], None, "auto", 2, 4)


def test_threads_are_those_of_the_machines_with_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machines = [{"GPU": 8.0, "CPU": 16.0}, {"CPU": 128.0}]
    (place, *_), _ = ray_engine.share_out(machines, None, "auto", None, 1)
    assert place.environment == {"OMP_NUM_THREADS": "2"}


def test_fair_shares():
    assert slots.fair_share([8.0], 8) == 1.0
    assert slots.fair_share([8.0, 4.0], 3) == 4.0
    assert slots.fair_share([4.0, 3.0], 4) == 1.5
    assert slots.fair_share([2.0], 3) == 0.6666
    assert slots.fair_share([], 2) == 0.0


@pytest.mark.soak
def test_trainings_and_a_lost_machine(machines: Machines, data_root: Path, tmp_path: Path):
    """They go on from their checkpoints, and their losses are those of trainings on this
    machine."""
    (tmp_path / "often.toml").write_text("[checkpoint]\ncheckpoint_interval = 10\n")
    flags = small_flags(data_root, tmp_path, checkpoint_interval=1800, max_steps=100)
    shared = [*GPT2, "seeds", *flags, "--config", f"{tmp_path}/often.toml", "--num_seeds", "3"]

    def folders(name: str) -> list[str]:
        return ["--checkpoint_dir", str(tmp_path / name), "--log_dir", str(tmp_path / name)]

    run_command([*shared, *folders("here")])
    cluster = ["--engine", "ray", "--ray_address", machines.address, "--retries", "0"]
    owner = subprocess.Popen(
        [*shared, *folders("there"), *cluster], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    first = tmp_path / "there" / "seed=0"
    wait_until(lambda: owner.poll() is not None or (first / "step_000020.json").exists())
    machines.ask("kill")
    machines.ask("add")
    _, said = owner.communicate()
    assert owner.returncode == 0, said
    for seed in range(3):
        logs = [tmp_path / name / f"seed={seed}" / "log.txt" for name in ("here", "there")]
        assert loss_lines(logs[0]) == loss_lines(logs[1])
    assert "its machine is lost" in said
