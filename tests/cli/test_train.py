import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import forked_ranks
from gpt2.base.errors import ConfigError
from gpt2.cli import estimate, generate, main
from gpt2.cli.status import status_main
from gpt2.cli.train import (
    TrainCommand,
    parse_before_resume,
    parse_train,
    require_effect,
    train_main,
)
from gpt2.config import options, presets
from gpt2.config.options import locate
from gpt2.data import corpora
from gpt2.distributed import rendezvous
from gpt2.train import status, trainer
from support import SMALL_CORPUS, SMALL_RUN, shard_tokens, small_config, small_flags


def call(monkeypatch, function, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2", *arguments])
    return function()


def test_preset_then_file_then_flags(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("n_layer = 6\nn_head = 2\nlearning_rate = 1e-3\n")
    run = parse_train(["--config", str(file), "--preset", "demo", "--n_head", "8"]).run
    assert (run.model.n_layer, run.model.n_head) == (6, 8)
    assert (run.optim.learning_rate, run.model.n_embd) == (1e-3, 64)
    assert run.preset == "demo"


def test_out_dir_holds_all_three_folders_and_flags_win():
    run = parse_train(["--preset", "demo", "--out-dir", "x", "--log_dir", "y"]).run
    assert run.checkpoint.checkpoint_dir == Path("x/checkpoints")
    assert (run.watch.runs_dir, run.watch.log_dir) == (Path("x/runs"), Path("y"))


@pytest.mark.parametrize("command", ["train", "seeds", "models", "search"])
def test_checkpoint_dir_wins_over_out_dir_in_every_command(
    command: str, tmp_path: Path, monkeypatch, capsys
):
    flags = ("--list_checkpoints", "--out_dir", "x", "--checkpoint_dir", str(tmp_path))
    assert call(monkeypatch, main.main, command, *flags) == 0
    assert capsys.readouterr().out == f"No checkpoints in {tmp_path}\n"


@pytest.mark.parametrize(
    ("flags", "bias", "deterministic"),
    [
        (["--no_bias", "--deterministic"], False, True),
        (["--bias", "False", "--deterministic", "True"], False, True),
        (["--bias=true", "--deterministic=false"], True, False),
        (["--sample-prompt", "False", "--deterministic", "false"], True, False),
    ],
)
def test_a_switch_may_have_its_value(flags: list[str], bias: bool, deterministic: bool):
    run = parse_train(flags).run
    assert (run.model.bias, run.machine.deterministic) == (bias, deterministic)


@pytest.mark.parametrize("flags", [["--bias=True", "False"], ["--bias", "True", "False"]])
def test_a_switch_has_one_value(flags: list[str]):
    with pytest.raises(SystemExit):
        parse_train(flags)


def test_hyphens_and_underscores_are_the_same():
    one = parse_train(["--use_tensorboard", "--mini_batch_size", "2", "--eval_interval", "None"])
    other = parse_train(["--use-tensorboard", "--mini-batch-size=2", "--eval-interval", "None"])
    assert one == other
    assert one.run.watch.use_tensorboard
    assert one.run.evaluation.eval_interval is None


def test_a_ramp_fits_the_batch_that_is_typed_beside_it():
    flags = ["--preset", "demo", "--total_batch_size", "4096", "--batch_ramp", "9:1024", "20:2048"]
    run = parse_train(flags).run
    assert run.data.batch_ramp == ("9:1024", "20:2048")
    assert [run.ramp.rows_of(step) for step in (0, 8, 9, 19, 20)] == [8, 8, 16, 16, 32]


def test_flags_of_the_small_run_give_the_small_config(tmp_path: Path):
    run = parse_train(small_flags(tmp_path / "data", tmp_path)).run
    assert run == small_config(tmp_path / "data", tmp_path)
    for name in SMALL_RUN:
        locate(name)  # raises ConfigError for an unknown one


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "gpt3"], "preset=gpt3 is unknown"),
        (["--config", "nowhere.toml"], "cannot read --config nowhere.toml"),
        (["--total_batch_size", "500000"], "nearest: 499712 or 500736"),
        (["--batch_ramp", "200"], "--batch_ramp: expected STEP:TOKENS, got '200'"),
        (["--batch_ramp", "9:1024", "--batch-ramp", "20:2048"], "put all its values behind one"),
    ],
)
def test_user_errors_exit_with_2_and_one_line(monkeypatch, capsys, flags, message):
    assert call(monkeypatch, train_main, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_unknown_flag_suggests(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, train_main, "--lerning_rate", "1")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--lerning_rate" in error
    assert "--learning_rate" in error


def test_other_ranks_are_silent(monkeypatch, capsys):
    for name, value in rendezvous.rank_variables(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, train_main, "--preset", "gpt3") == 2
    with pytest.raises(SystemExit):
        call(monkeypatch, train_main, "--lerning_rate", "1")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_ctrl_c_before_the_first_step_is_no_traceback(monkeypatch):
    def interrupted(_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run", interrupted)
    assert call(monkeypatch, train_main) == 130


def test_gpt2_names_its_commands(monkeypatch, capsys):
    assert call(monkeypatch, main.main) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in main.COMMANDS)
    assert call(monkeypatch, main.main, "generat") == 2
    assert "did you mean generate" in capsys.readouterr().err
    assert call(monkeypatch, main.main, "--version") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "0"], "num_samples=0 is too small; expected 1 or more"),
        (
            ["--top_p", "95"],
            "top_p=95.0 is invalid; expected more than 0 and at most 1, or None (off)",
        ),
        (["--top_k", "None", "--seed", str(2**64)], f"seed={2**64} is too large"),
        (["--interactive", "--prompt", "-"], "both read standard input; leave one of them out"),
    ],
)
def test_generate_flags_are_checked(monkeypatch, capsys, flags, message):
    assert call(monkeypatch, generate.generate_main, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["demo", "demo-fast"])
def test_the_demos_train_on_text_that_every_machine_has(name: str):
    (root,) = presets.preset(name).data.data_root
    corpus = corpora.find(Path(root).name)
    assert corpus is not None and corpus.embedded


def test_a_run_learns_the_tokenizer_of_its_corpus_first(tmp_path: Path, monkeypatch, capsys):
    own = replace(SMALL_CORPUS, name="python_stdlib_4k", embedded=True, vocab_size=300)
    monkeypatch.setitem(corpora.CORPORA, own.name, own)
    data = tmp_path / own.name
    flags = small_flags(data, tmp_path, max_steps=2)
    assert call(monkeypatch, main.main, "train", *flags) == 0
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["vocab_size"] == 300
    assert call(monkeypatch, main.main, "train", *flags, "--resume", "latest") == 0
    assert "step 2 of 2" in capsys.readouterr().out
    again = ("--out", str(tmp_path / "again" / own.name), "--workers", "1")
    assert call(monkeypatch, main.main, "data", "python-stdlib-4k", *again) == 0
    assert shard_tokens(tmp_path / "again" / own.name) == shard_tokens(data)


def test_a_new_users_way(tmp_path: Path, monkeypatch, capsys):
    """Data, training without torchrun, the list, the forecast and samples, as they are typed."""
    data = tmp_path / "data" / "python_stdlib"
    limits = ("--shard_tokens", "20000", "--max_tokens", "60000", "--workers", "1")
    assert call(monkeypatch, main.main, "data", "python-stdlib", "--out", str(data), *limits) == 0
    printed = capsys.readouterr().out.split("\n")
    assert any(line.split()[:3] == ["train", "2", "40,000"] for line in printed)
    assert any(line.split()[:3] == ["val", "1", "20,000"] for line in printed)
    flags = small_flags(data, tmp_path, max_steps=4, checkpoint_interval=2)
    assert call(monkeypatch, main.main, "train", *flags) == 0
    printed = capsys.readouterr().out
    assert "--resume latest --max_steps 8" in printed
    folder = str(tmp_path / "checkpoints")
    assert f"gpt2 generate --checkpoint_dir {folder} --checkpoint best --prompt def" in printed

    flags = ("--out_dir", str(tmp_path), "--list_checkpoints")
    assert call(monkeypatch, train_main, *flags) == 0
    listing = capsys.readouterr().out
    assert listing.index("step_000002.pt") < listing.index("step_000004.pt")

    assert call(monkeypatch, estimate.estimate_main, "--checkpoint_dir", folder) == 0
    assert "step 4 of 4 (100.0%)" in capsys.readouterr().out

    options = ("--checkpoint_dir", folder, "--prompt", "import", "--max_new_tokens", "5")
    assert call(monkeypatch, generate.generate_main, *options, "--num_samples", "3") == 0
    printed = capsys.readouterr()
    assert printed.out.count("\nimport") == 3
    assert "step_000004.pt (step 4)" in printed.err

    options = ("--checkpoint_dir", folder, "--prompt", "-", "--temperature", "0", "--stream")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import\n")))
    assert call(monkeypatch, generate.generate_main, *options, "--max_new_tokens", "5") == 0
    assert capsys.readouterr().out.startswith("import")


def test_generate_without_a_checkpoint(monkeypatch, capsys, tmp_path: Path):
    """A folder with a checkpoint that can be read is named: tests/cli/test_loading.py."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "step_000001.json").touch()
    assert call(monkeypatch, generate.generate_main, "--checkpoint_dir", str(tmp_path)) == 2
    assert "train a model first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("stopped", 3), ("failed", 4), ("running", 4)]
)
def test_status_as_an_exit_code(monkeypatch, capsys, tmp_path: Path, state: str, code: int):
    """A reason may hold brackets, as gloo's do."""
    plan = status.Plan("run", "demo", 10, 1, 1, 1, None, 1, "cpu", "log.txt")
    status.write(tmp_path, plan, state, 5, "[/gloo/pair.cc:5] lost")
    assert call(monkeypatch, status_main, "--checkpoint_dir", str(tmp_path)) == code
    assert "[/gloo/pair.cc:5] lost" in capsys.readouterr().out


TO_A_FULL_DISK = """
import os
from gpt2.cli.train import train_main
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
raise SystemExit(train_main())
"""


def test_a_full_disk_under_standard_output_ends_no_training(tmp_path: Path, data_root: Path):
    script = tmp_path / "to_a_full_disk.py"
    script.write_text(TO_A_FULL_DISK)
    flags = small_flags(data_root, tmp_path, max_steps=2, eval_interval=None)
    error = forked_ranks.run(flags, 1, tmp_path, script)
    assert "WARNING: cannot write to standard output: " in error
    assert "Traceback" not in error
    assert (tmp_path / "checkpoints" / "step_000002.json").is_file()
    assert '"step": 2' in (tmp_path / "logs" / "metrics.jsonl").read_text()


FITTING = [
    ('batch_ramp = ["5:16"]\ntotal_batch_size = 64', ["--block_size", "8"]),
    ("n_embd = 100", ["--n_head", "5", "--data_root", "a", "--out_dir", "o"]),
    ('architecture = "mlp"\nzero_init = true', ["--architecture", "modern"]),
]


@pytest.mark.parametrize(("file", "flags"), FITTING)
def test_values_of_a_file_must_fit_once_all_options_are_known(tmp_path: Path, file, flags):
    path = tmp_path / "a.toml"
    path.write_text(file)
    command = ["--config", str(path), *flags]
    run = parse_train(command).run
    assert run == parse_before_resume(TrainCommand, command).run
    assert options.overlay(run, {}) == run  # it was checked
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        parse_train(command[:2])
    with pytest.raises(ConfigError, match=r"^n_layer=-1"):
        parse_train([*command, "--n_layer", "-1"])


MUON_ALONE = (
    r"^--(cautious_decay|momentum_warmup) has no effect on optimizer=adamw; omit it, or use"
)


@pytest.mark.parametrize("flags", [["--cautious_decay", "true"], ["--momentum-warmup=9"]])
def test_an_option_of_muon_alone_is_refused_beside_adamw(flags: list[str]):
    def parsed(*more: str):
        return parse_before_resume(TrainCommand, [*more, *flags]).run

    with pytest.raises(ConfigError, match=MUON_ALONE):
        parsed()
    with pytest.raises(ConfigError, match=MUON_ALONE):
        parsed("--preset", "fast-124m", "--optimizer", "adamw")
    assert parsed("--optimizer", "muon").optim.optimizer == "muon"
    resumed = parsed("--resume", "latest")  # the checkpoint may be Muon's
    with pytest.raises(ConfigError, match=MUON_ALONE):
        require_effect(flags, resumed)
    off = ["--no_cautious_decay", "--momentum_warmup", "0"]
    parse_before_resume(TrainCommand, off)
    recipe = ["--preset", "fast-124m", "--optimizer", "adamw"]  # which replaces a part of it
    assert parse_before_resume(TrainCommand, recipe).run.optim.momentum_warmup
