"""bench/gpu_check.py without a GPU: its plan, its processes and what it prints."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from support import ROOT, wait_until

FAKES = """
import json, os, signal, subprocess, sys
from pathlib import Path

def finds(record, setting):
    record.add("an item", "1 ms", "less than 2 ms", is_ok=True, exact=1.25)

def roomy(record, setting):
    record.add("memory", "141 GB", memory_gb=141)

def fails(record, setting):
    record.add("before it failed", "3")
    raise ValueError("the reason")

def dies(record, setting):
    record.add("before it died", "4", "5", is_ok=False)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(record, setting):
    wait = [sys.executable, "-c", "import signal; signal.pause()"]
    record.add("child", str(subprocess.Popen(wait, start_new_session=True).pid))
    signal.pause()

def interrupts(record, setting):
    record.add("before it was interrupted", "6")
    os.kill(os.getppid(), signal.SIGINT)
    Path(os.environ["SO_FAR"]).with_name("sent").touch()
    signal.pause()

def reads(record, setting):
    so_far = json.loads(Path(os.environ["SO_FAR"]).read_text())
    record.add("summary so far", so_far["summary"])

def meets(record, setting, own, other):
    (setting.folder / f"met_{own}").touch()
    while not (setting.folder / f"met_{other}").exists():
        pass
    record.add("met", str(other))
"""


@pytest.fixture
def gpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose parts may be those of FAKES."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SO_FAR", str(tmp_path / "found.json"))
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("gpu_check")


def fake(gpu_check: ModuleType, name: str, **changes: object):
    values = {"name": name, "work": f"fakes:{name}", "about": "", "limit_s": math.inf, **changes}
    return gpu_check.Part(**values)


def run(gpu_check: ModuleType, tmp_path: Path, *stages: tuple, **options: object):
    """The exit code, and what the JSON file says of each part."""
    path = tmp_path / "found.json"
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    parsed = gpu_check.parsed(["--json", str(path), "--budget_s", "10000", *given], stages)
    code = gpu_check.check(parsed, stages)
    return code, {part["part"]: part for part in json.loads(path.read_text())["parts"]}


def test_what_a_part_has_found_stays(gpu_check: ModuleType, tmp_path: Path, capsys):
    names = ("finds", "fails", "dies", "reads")
    code, parts = run(gpu_check, tmp_path, *((fake(gpu_check, name),) for name in names))
    assert code == 1
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {"finds": "done", "fails": "failed", "dies": "failed", "reads": "done"}
    assert parts["finds"]["findings"][0]["numbers"] == {"exact": 1.25}
    assert [each["found"] for each in parts["dies"]["findings"]] == ["4"]
    [so_far] = parts["reads"]["findings"]  # the file is written after each part
    assert so_far["found"] == (
        "1 as predicted; 1 NOT; 1 without a prediction; failed: fails, dies; not run: reads"
    )
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "part item predicted found" in lines
    assert "finds an item less than 2 ms 1 ms ok" in lines
    assert "dies before it died 5 4 NOT" in lines
    assert "FAILED ended with code -9" in lines
    assert "ValueError: the reason" in lines


def test_all_as_predicted_is_exit_code_0(gpu_check: ModuleType, tmp_path: Path):
    code, _ = run(gpu_check, tmp_path, (fake(gpu_check, "finds"),))
    assert code == 0


def test_a_part_that_hangs_ends_with_all_its_processes(gpu_check: ModuleType, tmp_path: Path):
    setting = gpu_check.Setting(False, tmp_path)
    outcome = gpu_check.Outcome("hangs")
    process = gpu_check.PartProcess.start(fake(gpu_check, "hangs"), outcome, setting, math.inf)
    wait_until(lambda: gpu_check.gpu_report.read_findings(process.findings), process.log.read_text)
    process.deadline = time.monotonic()
    assert gpu_check.first_to_end([process]) is process
    process.end()
    assert outcome.state == "too long"
    [child] = outcome.findings
    wait_until(lambda: not is_running(int(child.found)))


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_part_has_the_rest_of_the_budget_at_most(gpu_check: ModuleType, tmp_path: Path):
    setting = gpu_check.Setting(False, tmp_path)
    limits = {}
    for own, left in ((50, 300), (50, 20)):
        part = fake(gpu_check, "finds", limit_s=own)
        process = gpu_check.PartProcess.start(part, gpu_check.Outcome("finds"), setting, left)
        limits[own, left] = process.deadline - process.started, process.limit
        process.process.wait()
        process.end()
    assert limits[50, 300] == (pytest.approx(50, abs=1), "its limit of 50 s")
    assert limits[50, 20] == (pytest.approx(20, abs=1), "the end of the budget")


def test_nothing_begins_after_the_budget(gpu_check: ModuleType, tmp_path: Path):
    code, parts = run(gpu_check, tmp_path, (fake(gpu_check, "finds"),), budget_s=0)
    assert code == 1
    assert (parts["finds"]["state"], parts["finds"]["findings"]) == ("not run", [])
    assert parts["finds"]["reason"] == "the budget was used up"


def test_nothing_runs_without_what_is_required(gpu_check: ModuleType, tmp_path: Path):
    first = fake(gpu_check, "fails", is_required=True)
    _, parts = run(gpu_check, tmp_path, (first,), (fake(gpu_check, "finds"),))
    assert {name: part["state"] for name, part in parts.items()} == {
        "fails": "failed",
        "finds": "not run",
    }


def test_ctrl_c_prints_what_is_known(gpu_check: ModuleType, tmp_path: Path, capsys):
    names = ("finds", "interrupts", "reads")
    code, parts = run(gpu_check, tmp_path, *((fake(gpu_check, name),) for name in names))
    assert code == 130
    assert parts["interrupts"]["reason"] == "interrupted"
    assert [each["found"] for each in parts["interrupts"]["findings"]] == ["6"]
    assert parts["reads"]["state"] == "not run"
    printed = capsys.readouterr().out
    assert "less than 2 ms" in printed and "before it was interrupted" in printed


def test_ctrl_c_while_a_part_is_started_ends_that_part(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def start_late(*given: object, **more: object) -> subprocess.Popen[bytes]:
        process = popen(*given, **more)
        wait_until((tmp_path / "sent").exists)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start_late)
    code, parts = run(gpu_check, tmp_path, (fake(gpu_check, "interrupts"),))
    assert code == 130
    assert parts["interrupts"]["reason"] == "interrupted"


def test_parts_of_a_stage_run_together_on_a_large_gpu(gpu_check: ModuleType, tmp_path: Path):
    together = tuple(
        fake(gpu_check, f"meets {own}", work="fakes:meets", arguments=(own, 1 - own))
        for own in (0, 1)
    )
    code, _ = run(gpu_check, tmp_path, (fake(gpu_check, "roomy"),), together)
    assert code == 0


def test_parts_are_chosen_by_name_and_keep_their_order(gpu_check: ModuleType):
    stages = gpu_check.chosen(gpu_check.STAGES, "tests,step,ranks")
    assert [[part.name for part in stage] for stage in stages] == [["step"], ["ranks", "tests"]]


def test_an_unknown_part_is_one_line(gpu_check: ModuleType, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.chosen(gpu_check.STAGES, "step,speed64")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --parts speed64 is unknown; did you mean speed-64?")
    assert line.count("\n") == 1


def test_the_most_important_parts_come_first(gpu_check: ModuleType):
    names = [part.name for stage in gpu_check.STAGES for part in stage]
    assert names[:3] == ["versions", "speed-64", "step"]
    assert len(set(names)) == len(names)
    assert all(part.limit_s <= 120 for stage in gpu_check.STAGES for part in stage)


def test_every_part_exists(gpu_check: ModuleType):
    for part in [part for stage in gpu_check.STAGES for part in stage]:
        module, _, function = part.work.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_default_run_measures_little_by_the_count_of_flops(gpu_check: ModuleType):
    """The figures of docs/benchmarks.md."""
    pieces = importlib.import_module("gpu_pieces")
    shares = pieces.flops_shares(pieces.questions(1000))
    assert shares["validation"] == pytest.approx(0.02667, abs=1e-5)
    assert shares["HellaSwag"] == pytest.approx(0.0032, abs=3e-4)
    assert shares["samples"] < 1e-5
    total = sum(shares.values())
    assert total / (1 + total) < pieces.MAX_SHARE


IMPORTED = """
import importlib.metadata, sys
import gpu_pieces, gpu_rank, gpu_runs, gpu_speed, gpu_step
from gpt2.cli import train
train.parse_train([])
known = importlib.metadata.packages_distributions()
names = {name.partition(".")[0] for name in sys.modules}
print(*(distribution for name in names for distribution in known.get(name, ())))
"""


def test_the_packages_that_parts_import_are_known(gpu_check: ModuleType):
    """Of those that this package requires: the check of a bare machine names what is missing."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "bench")))
    command = [sys.executable, "-c", IMPORTED]
    environment = os.environ | {"PYTHONPATH": paths}
    imported = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {Requirement(text).name for text in project["dependencies"]}
    found = required & set(imported.stdout.split())
    assert "tokenizers" in found and found <= set(gpu_check.NEEDED)


def test_a_missing_package_is_a_finding(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_check, "NEEDED", ("json", "no_such_package"))
    options = ["--serve", "fakes:finds", "--findings", str(tmp_path / "found.jsonl")]
    with pytest.raises(SystemExit, match="--wheels FOLDER installs them"):
        gpu_check.serve(gpu_check.parsed(options, ()))
    (finding,) = gpu_check.gpu_report.read_findings(tmp_path / "found.jsonl")
    assert (finding.found, finding.is_ok) == ("missing: no_such_package", False)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_gelu_3", "compiled by Inductor"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser and norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(gpu_check: ModuleType, kernel: str, kind: str):
    assert importlib.import_module("gpu_step").kind_of(kernel) == kind


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_smoke(tmp_path: Path):
    """Every part runs without a GPU, and finds nothing that is not as predicted."""
    path = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "bench/gpu_check.py"), "--smoke", "--budget_s", "1700"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in json.loads(path.read_text())["parts"]:
        assert part["state"] == "done" and part["findings"], part["part"]
