"""A resume takes the options that were not typed from the checkpoint."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import forked_ranks
from gpt2.base.errors import ConfigError
from gpt2.checkpoint import store
from gpt2.checkpoint.metadata import read_metadata
from gpt2.cli import main, train
from gpt2.cli.train import TrainCommand, parse_before_resume, parse_train
from gpt2.config import options, presets
from gpt2.config.options import NEVER_FROM_CHECKPOINT
from gpt2.config.run import RunConfig
from gpt2.distributed import device
from gpt2.train import trainer
from support import small_config, small_flags

SHAPE = {"n_layer": 1, "n_head": 3, "n_embd": 24, "total_batch_size": 32, "dropout": 0.2}
"""not that of any preset; 3 heads fit no preset's width"""
QUICK = {"max_steps": 4, "eval_interval": None, "checkpoint_interval": 2, "min_lr_ratio": 0.5}


def command(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2 train", *map(str, flags)])
    return train.train_main()


@pytest.fixture(scope="module")
def data_root(characters: Path) -> Path:
    return characters


@pytest.fixture
def begun(data_root: Path, tmp_path: Path, tmp_path_factory) -> Path:
    """The --out_dir of a finished run of four steps with unusual options."""
    made = tmp_path_factory.getbasetemp() / "resume_options"  # for all tests, with their key
    if not made.exists():
        trainer.run(small_config(data_root, made, **SHAPE | QUICK))
    return Path(shutil.copytree(made, tmp_path / "out", symlinks=True))


def state_of(out: Path, step: int) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / store.file_name(step), weights_only=True)


def config_of(out: Path, step: int) -> RunConfig:
    return options.of_stored(state_of(out, step)["config"])


def rewritten(out: Path, step: int, **changes: Any) -> None:
    """Saves a checkpoint again, with other content, as this user."""
    folder = out / "checkpoints"
    state = state_of(out, step)
    metadata = read_metadata(folder / f"step_{step:06d}.json")
    assert metadata is not None and state.pop("schema")
    store.save(folder, state | changes, metadata.training, keep_last=5)


def overrides(printed: str) -> list[str]:
    """The options that the banner lists."""
    block = printed.partition("Resuming from:\n")[2].partition("\nRun ")[0].splitlines()
    return [line for line in block if line.startswith("  - ") and " before, " in line]


def test_a_resume_takes_the_ramp_of_the_checkpoint(tmp_path: Path):
    stored = small_config(tmp_path, tmp_path, batch_ramp=["3:8", "7:16"]).to_dict()
    run = train.parse_run(TrainCommand, ["--resume", "latest", "--seed", "3"], stored=stored).run
    assert (run.data.batch_ramp, run.machine.seed) == (("3:8", "7:16"), 3)
    without = train.parse_run(TrainCommand, ["--resume", "latest", "--batch_ramp"], stored=stored)
    assert without.run.data.batch_ramp == (), "which the run refuses"
    flags = ["--resume", "latest", "--batch_ramp", "3:8", "7:16", "--max_steps", "40"]
    command = parse_before_resume(TrainCommand, flags)  # no ramp of the preset
    assert (command.run.data.batch_ramp, command.run.data.max_steps) == ((), 40)


def test_the_folder_alone_resumes_a_run_of_any_shape(begun: Path, monkeypatch, capsys):
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest", "--max_steps", 6) == 0
    assert overrides(capsys.readouterr().out) == ["  - max_steps: 4 before, 6 from here"]
    before, now = config_of(begun, 4), config_of(begun, 6)
    changed = {"max_steps": 6, "resume": "latest", "device": "auto"}
    folders = {"checkpoint_dir": "checkpoints", "log_dir": "logs", "runs_dir": "runs"}
    folders = {name: begun / folder for name, folder in folders.items()}
    assert now == options.overlay(before, changed | folders)


@pytest.mark.parametrize("how", [["--resume", "2"], ["--init_from", "resume"]])
def test_every_way_to_resume_does(begun: Path, monkeypatch, how: list[str]):
    assert command(monkeypatch, "--out_dir", begun, *how, "--max_steps", 5) == 0
    assert config_of(begun, 5).model == config_of(begun, 4).model


def test_weights_of_a_checkpoint_do_not_bring_its_options(begun: Path, monkeypatch, capsys):
    weights = begun / "checkpoints" / "latest.pt"
    flags = ("--preset", "demo", "--out_dir", begun / "new", "--init_from", weights)
    assert command(monkeypatch, *flags) == 2
    assert "n_layer: 1 in the checkpoint, 4 now" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--resume", "latest"], ["--init_from", "resume"]])
def test_an_experiment_is_resumed_by_name_and_gpu(
    data_root: Path, tmp_path: Path, monkeypatch, capsys, how: list[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = small_flags(data_root, tmp_path, **SHAPE | QUICK, wandb_project="mine")
    at = flags.index("--out_dir")
    del flags[at : at + 2]  # the folders are those of the name
    assert command(monkeypatch, *flags, "--experiment_name", "exp", "--gpu_id", "cpu") == 0
    named = ("--experiment_name", "exp", "--gpu_id", "cpu", *how)
    assert command(monkeypatch, *named, "--learning_rate", "1e-3", "--max_steps", 6) == 0
    printed = capsys.readouterr()
    assert overrides(printed.out) == [
        "  - max_steps: 4 before, 6 from here",
        "  - learning_rate: 0.006 before, 0.001 from here",
    ]
    assert "WARNING: learning rate: " in printed.err
    path = tmp_path / "checkpoints" / "exp_gpu_cpu" / "step_000006.pt"
    now = options.of_stored(torch.load(path, weights_only=True)["config"])
    assert (now.model.n_head, now.experiment.wandb_project) == (3, "mine")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "ckpt_exp_exp_gpu_cpu.pt",
        "exp_gpu_cpu",
    ]


def test_the_presets_folder_is_enough(data_root: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = small_flags(data_root, tmp_path, **SHAPE | QUICK)
    at = flags.index("--out_dir")
    assert command(monkeypatch, *flags[:at], *flags[at + 2 :]) == 0
    assert command(monkeypatch, "--resume", "latest") == 2  # a new run, which has no data here
    error = capsys.readouterr().err
    assert "NEW run from step 0; --preset demo continues the run in checkpoints/demo" in error
    again = ("--preset", "demo", "--resume", "latest")
    assert command(monkeypatch, *again, "--max_steps", 5) == 0
    assert (tmp_path / "checkpoints/demo/step_000005.json").exists()
    assert command(monkeypatch, *again, "--n_head", 3, "--max_steps", 6) == 0  # fits no preset
    assert (tmp_path / "checkpoints/demo/step_000006.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_layer", "2"], "n_layer: 1 in the checkpoint, 2 now"),
        (["--seed", "5"], "seed: 1337 in the checkpoint, 5 now"),
        (["--optimizer", "muon"], "optimizer: adamw in the checkpoint, muon now"),
        (["--n_head", "5"], "cannot continue with these flags: n_embd=24 is not a multiple of"),
        (["--preset", "gpt2-124m"], "(it was made with --preset demo)"),
    ],
)
def test_what_a_checkpoint_fixes_is_refused(begun: Path, monkeypatch, capsys, flags, message):
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest", *flags) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in begun.glob("checkpoints/step_*.pt")) == [
        "step_000002.pt",
        "step_000004.pt",
    ]


def test_a_file_overrides_the_checkpoint_and_flags_override_the_file(begun: Path, tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\nkeep_last = 4\n")
    flags = ["--config", str(file), "--keep_last", "5", "--resume", "latest"]
    stored = state_of(begun, 4)["config"]
    run = train.parse_run(TrainCommand, flags, stored=stored).run
    assert (run.data.epochs, run.checkpoint.keep_last, run.model.n_layer) == (3, 5, 1)
    same = ["--preset", "demo", *flags]
    assert train.parse_run(TrainCommand, same, stored=stored).run.model.n_layer == 1
    other = ["--preset", "gpt2-350m", *flags]
    assert train.parse_run(TrainCommand, other, stored=stored).run == parse_train(other).run


def test_relative_data_is_looked_for_in_the_current_folder(
    begun: Path, data_root: Path, tmp_path: Path, monkeypatch, capsys
):
    stored = state_of(begun, 4)["config"]
    again = ("--out_dir", begun, "--resume", "latest", "--max_steps", 5)
    name = data_root.name
    for root, is_here in ((name, False), (name, True), (f"{name}/*.bin", True)):
        stored["data"]["data_root"] = root
        rewritten(begun, 4, config=stored)
        monkeypatch.chdir(data_root.parent if is_here else tmp_path)
        assert command(monkeypatch, *again) == (0 if is_here else 2)
        error = capsys.readouterr().err
        assert ("WARNING: --data" in error, "error" in error) == (False, not is_here)
        if not is_here:
            assert error.count("\n") == 1 and f"folder, {tmp_path}; resume it where" in error


def test_what_is_of_one_process_is_never_taken():
    values = {
        "data.cache_dir": "elsewhere",
        "checkpoint.resume": "7",
        "checkpoint.init_from": "resume",
        "checkpoint.checkpoint_dir": "elsewhere",
        "checkpoint.trust_checkpoint": True,
        "watch.log_dir": "elsewhere",
        "watch.runs_dir": "elsewhere",
        "watch.profile": 9,
        "watch.memory_snapshot": True,
        "machine.device": "cuda",
        "machine.collective_timeout": 5.0,
        "experiment.experiment_name": "other",
        "experiment.gpu_id": "7",
        "experiment.wandb_run_name": "other",
    }
    assert values.keys() == set(NEVER_FROM_CHECKPOINT)
    stored = options.overlay(presets.preset("demo"), values | {"data_root": "http://a:b@host/x"})
    run = RunConfig()
    taken = options.on_stored(run, stored.to_dict())
    expected = {name: run.to_dict()[(p := name.split("."))[0]][p[1]] for name in values}
    expected["data_root"] = run.data.data_root
    assert taken == options.overlay(presets.preset("demo"), expected)


def test_a_password_in_an_address_is_not_shown():
    before = options.overlay(RunConfig(), {"data_root": "http://me:secret@host/data"})
    rows = options.overridden(before.to_dict(), RunConfig())
    assert rows == [("data_root", "http://…@host/data", "data/fineweb_edu")]


def test_a_password_is_in_no_file_of_a_run(data_root: Path, tmp_path: Path, monkeypatch, capsys):
    memory = MemoryFileSystem()
    memory.put(str(data_root), "/me:hidden@host/data", recursive=True)
    root, out = "memory://me:hidden@host/data", tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    flags = small_flags(root, out, **SHAPE | QUICK)
    try:
        assert command(monkeypatch, *flags, "--use_tensorboard") == 0
        again = ("--out_dir", out, "--resume", "latest", "--max_steps", 5)
        assert command(monkeypatch, *again) == 2  # the data of the preset is other data
        assert "--data_root memory://…@host/data is not taken" in capsys.readouterr().err
        assert command(monkeypatch, *again, "--data_root", root) == 0
        assert "hidden" not in "".join(sys.argv)
        shown = "".join(capsys.readouterr())
    finally:
        memory.rm("/me:hidden@host", recursive=True)
    assert "step 5" in shown and "hidden" not in shown
    assert config_of(out, 5).data.data_root == ("memory://…@host/data",)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if b"hidden" in path.read_bytes()] == []


def test_a_checkpoint_of_an_earlier_version(begun: Path, monkeypatch):
    """Its configuration lacks options that were added since, and has one that is gone."""
    stored = state_of(begun, 4)["config"]
    del stored["model"]["architecture"], stored["optim"]["optimizer"], stored["experiment"]
    del stored["optim"]["max_bad_steps"]
    stored["optim"]["warp"] = stored["rocket"] = {"warp": 9}
    rewritten(begun, 4, config=stored)
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest", "--max_steps", 5) == 0
    assert config_of(begun, 5).optim.optimizer == "adamw"


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("optim", "learning_rate", float("nan")),
        ("machine", "seed", 2**64),
        ("model", "n_layer", "many"),
        ("data", "data_root", 5),
        ("optim", "beta1", torch.zeros(2)),
    ],
)
def test_stored_values_are_checked_as_flags_are(begun, monkeypatch, capsys, part, name, value):
    """A file of another user may hold anything."""
    stored = state_of(begun, 4)["config"]
    stored[part][name] = value
    rewritten(begun, 4, config=stored)
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and name in error


@pytest.mark.parametrize("stored", [None, [], {"preset": "gpt5"}, {"preset": [1]}])
def test_a_stored_configuration_may_be_none_at_all(begun: Path, monkeypatch, capsys, stored):
    rewritten(begun, 4, config=stored)
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_foreign_file_runs_no_code_and_its_trust_is_not_taken(
    begun: Path, tmp_path: Path, monkeypatch, capsys
):
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    stored = state_of(begun, 4)["config"]
    stored["checkpoint"]["trust_checkpoint"] = True
    rewritten(begun, 4, config=stored | {"extra": Code()})
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another_user"))
    again = ("--out_dir", begun, "--resume", "latest", "--max_steps", 5)
    assert command(monkeypatch, *again) == 2
    assert "--trust_checkpoint" in capsys.readouterr().err
    file = tmp_path / "run.toml"
    file.write_text("[checkpoint]\ntrust_checkpoint = true\n")
    assert command(monkeypatch, *again, "--config", file) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: trust_checkpoint is not") and error.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    command(monkeypatch, *again, "--trust_checkpoint")
    assert (tmp_path / "ran").exists()  # so that the test would notice


def test_an_empty_folder_begins_a_new_run_loudly(data_root, tmp_path, monkeypatch, capsys):
    flags = small_flags(data_root, tmp_path, **QUICK)
    assert command(monkeypatch, *flags, "--resume", "latest") == 0
    assert "starting a NEW run from step 0" in capsys.readouterr().err
    flags = ("--preset", "demo", "--out_dir", tmp_path / "other", "--n_head", 3)
    assert command(monkeypatch, *flags, "--resume", "latest") == 2  # not a run with other heads
    assert "n_embd=64 is not a multiple of n_head=3" in capsys.readouterr().err


def test_sizes_wait_for_the_checkpoint_only_at_a_resume():
    flags = ["--preset", "demo", "--n_head", "3"]
    with pytest.raises(ConfigError, match="n_head=3"):
        parse_before_resume(TrainCommand, flags)
    run = parse_before_resume(TrainCommand, [*flags, "--resume", "latest"]).run
    assert run.checkpoint.resume == "latest"
    with pytest.raises(ConfigError, match="learning_rate=inf"):
        parse_before_resume(TrainCommand, [*flags, "--resume", "latest", "--learning_rate=inf"])
    with pytest.raises(ConfigError, match="n_head=3"):  # jobs of a pool are complete
        parse_train([*flags, "--resume", "latest"])


def test_a_configuration_of_a_pool_takes_nothing(begun: Path, data_root: Path):
    changes = SHAPE | QUICK | {"max_steps": 5, "keep_last": 7, "resume": "latest"}
    run = small_config(data_root, begun, **changes)
    trainer.run(run)
    assert config_of(begun, 5) == run.with_vocab_size(128)  # of the data


def test_deterministic_is_taken(begun: Path, monkeypatch):
    rewritten(
        begun,
        4,
        config=options.overlay(config_of(begun, 4), {"deterministic": True}).to_dict(),
    )
    made: list[bool] = []
    monkeypatch.setattr(device, "make_deterministic", lambda: made.append(True))
    assert command(monkeypatch, "--out_dir", begun, "--resume", "latest", "--max_steps", 5) == 0
    assert made


def test_the_doctor_takes_them_too(begun: Path, monkeypatch, capsys):
    flags = ["--out_dir", str(begun), "--resume", "latest", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gpt2", "doctor", *flags])
    main.main()
    printed = capsys.readouterr().out
    assert "at step 4, with " in printed and "in the checkpoint" not in printed


def test_two_ranks_resume_bit_identically_without_flags(data_root: Path, tmp_path: Path):
    flags = small_flags(data_root, tmp_path / "typed", **SHAPE | QUICK)
    forked_ranks.run(flags, 2, tmp_path)
    shutil.copytree(tmp_path / "typed", tmp_path / "taken")
    further = ["--resume", "latest", "--max_steps", "6", "--device", "cpu"]
    typed = forked_ranks.run([*flags, *further], 2, tmp_path)
    taken = forked_ranks.run(["--out_dir", str(tmp_path / "taken"), *further], 2, tmp_path)
    assert overrides(typed) == overrides(taken) != []
    one, other = (state_of(tmp_path / name, 6) for name in ("typed", "taken"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    wrong = ["--out_dir", str(tmp_path / "taken"), "--resume", "latest", "--n_head", "5"]
    refused = forked_ranks.run(wrong, 2, tmp_path, expect=2)
    assert "n_embd=24 is not a multiple of n_head=5" in refused and "Traceback" not in refused
