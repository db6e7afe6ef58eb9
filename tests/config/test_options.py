import json
from dataclasses import FrozenInstanceError

import pytest

from gpt2.base.errors import ConfigError
from gpt2.config import options, presets
from gpt2.config.model import ModelConfig
from gpt2.config.options import overlay
from gpt2.config.run import DataConfig, RunConfig


def test_default_is_gpt2_124m():
    run = RunConfig()
    assert run == presets.preset("gpt2-124m")
    assert (run.model.n_layer, run.model.n_head, run.model.n_embd) == (12, 12, 768)
    assert (run.model.embedding_rows, run.model.block_size) == (50304, 1024)
    assert run.data.total_batch_size == 524288
    assert run.rows_per_step == 512


@pytest.mark.parametrize(("ranks", "steps"), [(1, 8), (2, 4), (3, 3), (8, 1)])
def test_gradient_accumulation_follows_from_the_world(ranks: int, steps: int):
    assert RunConfig().grad_accum_steps(ranks, 64) == steps


def test_total_steps_read_every_row():
    run = overlay(RunConfig(), {"epochs": 2})
    assert run.total_steps(rows_per_epoch=512) == 2
    assert run.total_steps(rows_per_epoch=513) == 3
    assert overlay(run, {"max_steps": 7}).total_steps(rows_per_epoch=513) == 7


def test_total_steps_follow_the_ramp():
    ramp = {"epochs": 2, "batch_ramp": ["10:65536", "20:131072"]}  # 64 rows and 128, then 512
    run = overlay(RunConfig(), ramp)
    assert run.total_steps(rows_per_epoch=32) == 1
    assert run.total_steps(rows_per_epoch=10 * 64) == 15
    assert run.total_steps(rows_per_epoch=5 * 64 + 5 * 128 + 256) == 21
    assert run.total_steps(rows_per_epoch=5 * 64 + 5 * 128 + 257) == 22
    assert [run.tokens_before(step) for step in (10, 20, 21)] == [655360, 1966080, 2490368]


def test_a_ramp_is_a_list_in_a_file_and_stays_as_it_is_in_a_checkpoint():
    for texts in (["10:65536"], ["10:65536", "20:131072"]):
        run = options.from_toml(RunConfig(), f"batch_ramp = {texts}", "a.toml")
        assert run.data.batch_ramp == tuple(texts)
        assert options.of_stored(json.loads(json.dumps(run.to_dict()))) == run


def test_overlay_takes_flat_and_qualified_names():
    run = overlay(RunConfig(), {"optim.learning_rate": 3e-4, "n-layer": 6, "data": {"epochs": 1}})
    assert (run.optim.learning_rate, run.model.n_layer, run.data.epochs) == (3e-4, 6, 1)
    assert RunConfig().model.n_layer == 12


def test_overlay_converts_values_to_the_types_of_their_fields():
    run = overlay(
        RunConfig(), {"learning_rate": 1, "data_root": "elsewhere", "eval_interval": "None"}
    )
    assert run.optim.learning_rate == 1.0
    assert run.data.data_root == ("elsewhere",)
    assert run.evaluation.eval_interval is None


def test_options_of_earlier_versions_are_ignored():
    file = "seed = 3\nfast = false\n[machine]\nfast = true"
    assert options.from_toml(RunConfig(), file, "a.toml") == overlay(RunConfig(), {"seed": 3})
    stored = RunConfig().to_dict()
    stored["machine"]["fast"] = False
    assert options.of_stored(stored) == RunConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1.0}, "unknown option lerning_rate; did you mean learning_rate"),
        ({"model.learning_rate": 1.0}, "unknown option model.learning_rate"),
        ({"n_layer": "six"}, "n_layer: expected int, got 'six'"),
        ({"n_layer": True}, "n_layer: expected int, got True"),
        (
            {"dtype": "float8"},
            "dtype: expected 'auto' or 'bfloat16' or 'float16' or 'float32', got 'float8'",
        ),
        ({"n_layer": 0}, "n_layer=0 is too small"),
        ({"n_head": 5}, "n_embd=768 is not a multiple of n_head=5; nearest: 765 or 770"),
        ({"architecture": "gpt3"}, "did you mean gpt2.*; expected one of gpt2, modern, mlp"),
        ({"vocab_size": 0}, "vocab_size=0 is too small; expected 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"grad_clip": 0.0}, "None for no clipping"),
        ({"device": "gpu"}, "expected auto, cpu or cuda"),
        ({"batch_ramp": "10:1000"}, "1000 tokens are not a multiple of block_size=1024"),
        ({"batch_ramp": "10:524288"}, "less than total_batch_size=524288"),
        ({"resume": "latest", "init_from": "x.pt"}, "use one of them"),
    ],
)
def test_invalid_values_are_refused_with_a_valid_one(values: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        overlay(RunConfig(), values)


def test_an_indivisible_batch_names_the_nearest_sizes():
    with pytest.raises(ConfigError) as caught:
        RunConfig(data=DataConfig(total_batch_size=500000))
    assert str(caught.value) == (
        "total_batch_size=500000 is not a multiple of block_size=1024; nearest: 499712 or 500736"
    )


def test_toml_overlays_the_preset_and_errors_name_the_file():
    run = options.from_toml(RunConfig(), "n_layer = 3\n[optim]\nlearning_rate = 1e-3\n", "a.toml")
    assert (run.model.n_layer, run.optim.learning_rate) == (3, 1e-3)
    with pytest.raises(ConfigError, match=r"a\.toml: unknown option n_layers"):
        options.from_toml(RunConfig(), "n_layers = 3", "a.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: preset is not valid in a file"):
        options.from_toml(RunConfig(), 'preset = "demo"', "a.toml")
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        options.from_toml(RunConfig(), "n_layer = ", "a.toml")


@pytest.mark.parametrize(
    "file",
    [
        "trust_checkpoint = true",
        "trust-checkpoint = true",
        "checkpoint.trust_checkpoint = true",
        '"checkpoint.trust-checkpoint" = true',
        "[checkpoint]\ntrust_checkpoint = true",
        "checkpoint = { trust_checkpoint = false, keep_last = 3 }",
    ],
)
def test_no_file_decides_whose_checkpoints_are_trusted(file: str):
    expected = r"a\.toml: trust_checkpoint is not valid in a file; use --trust_checkpoint on the"
    with pytest.raises(ConfigError, match=expected):
        options.from_toml(RunConfig(), file, "a.toml")


def test_unknown_preset_suggests():
    with pytest.raises(ConfigError, match="did you mean gpt2-124m"):
        presets.preset("gpt2-125m")


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        RunConfig().model.n_layer = 3  # type: ignore[misc]


def test_plain_form_survives_json():
    plain = RunConfig().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert ModelConfig(**plain["model"]) == ModelConfig()


def test_changed_lists_what_a_checkpoint_fixes():
    stored = RunConfig().to_dict()
    run = overlay(RunConfig(), {"n_layer": 6, "mini_batch_size": 1, "epochs": 9, "dropout": 0.1})
    assert options.changed(stored, run, options.FIXED_BY_CHECKPOINT) == [("n_layer", 12, 6)]
    assert options.changed(stored, run, options.NOTED_AT_RESUME) == [
        ("dropout", 0.0, 0.1),
        ("epochs", 5, 9),
    ]


def test_a_checkpoint_that_names_no_architecture_is_a_gpt2():
    stored = RunConfig().to_dict()
    del stored["model"]["architecture"], stored["model"]["window"]
    assert options.of_stored(stored).model.architecture == "gpt2"
    same, other = (overlay(RunConfig(), {"architecture": name}) for name in ("gpt2", "modern"))
    assert options.changed(stored, same, options.FIXED_BY_CHECKPOINT) == []
    assert options.changed(stored, other, options.FIXED_BY_CHECKPOINT) == [
        ("architecture", "gpt2", "modern")
    ]


def test_resume_from():
    assert RunConfig().checkpoint.resume_from is None
    assert overlay(RunConfig(), {"init_from": "resume"}).checkpoint.resume_from == "latest"
    assert overlay(RunConfig(), {"resume": "250"}).checkpoint.resume_from == "250"
