import pytest

from gpt2.base.errors import ConfigError
from gpt2.config import experiment_name
from gpt2.config.experiment_name import ExperimentConfig


@pytest.mark.parametrize("name", ["exp_lr1e3", "1e-3", "v1.2", "_"])
def test_safe_names(name: str):
    assert ExperimentConfig(experiment_name=name).name == name


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a b", "a\n", "ä", "a" * 101])
def test_unsafe_names_are_refused(name: str):
    with pytest.raises(ConfigError, match=r"experiment_name=.* is part of file names"):
        ExperimentConfig(experiment_name=name)
    with pytest.raises(ConfigError, match=r"wandb_run_name=.*; or give --experiment_name"):
        ExperimentConfig(wandb_run_name=name)
    assert ExperimentConfig("safe", wandb_run_name=name).name == "safe"


@pytest.mark.parametrize("gpu_id", ["", "2/1", "0,1", "a_b", "-1", "."])
def test_unsafe_ids_are_refused(gpu_id: str):
    with pytest.raises(ConfigError, match=r"gpu_id=.* is part of file names"):
        ExperimentConfig("a", gpu_id=gpu_id)


def test_the_name_in_weights_and_biases_is_the_default():
    assert ExperimentConfig().name is None
    assert ExperimentConfig(wandb_run_name="seen").name == "seen"


@pytest.mark.parametrize("name", ["a", "a_gpu_1", "a_gpu_", "_gpu_"])
@pytest.mark.parametrize("gpu_id", ["2", "cpu", "GPU-8932f937-d72c", "MIG-1.0"])
def test_labels_are_read_back(name: str, gpu_id: str):
    assert experiment_name.read_label(experiment_name.label(name, gpu_id)) == (name, gpu_id)


def test_other_folders_are_not_labels():
    assert [
        experiment_name.read_label(text) for text in ("demo", "a_gpu_", "_gpu_2", "a_gpu_1_2")
    ] == [None] * 4


@pytest.mark.parametrize(
    ("visible", "gpu_id"),
    [
        ("2", "2"),
        ("3,2", "3"),
        (" 1 , 2", "1"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("GPU-8932f937,0", "GPU-8932f937"),
        ("MIG-GPU-89/1/0", "MIG-GPU-89-1-0"),
    ],
)
def test_the_first_visible_gpu(visible: str, gpu_id: str):
    assert experiment_name.first_visible(visible) == gpu_id


@pytest.mark.parametrize(
    ("gpu_id", "visible", "count", "index"),
    [
        ("0", None, 1, 0),
        ("2", None, 4, 2),
        ("2", "2", 1, 0),
        ("3", "2,3", 2, 1),
        ("GPU-b", "GPU-a,GPU-b", 2, 1),
        ("2", "GPU-a", 1, 0),  # the ids cannot be compared, and there is only one GPU
        ("GPU-a", None, 1, 0),
    ],
)
def test_the_gpu_of_an_id(gpu_id: str, visible: str | None, count: int, index: int):
    assert experiment_name.gpu_index(gpu_id, visible, count) == index


@pytest.mark.parametrize(
    ("gpu_id", "visible", "count", "message"),
    [
        (
            "7",
            None,
            2,
            r"gpu_id=7 is invalid: this machine has 0, 1; leave --gpu_id out, or start with",
        ),
        ("0", "2", 1, "gpu_id=0 is invalid: CUDA_VISIBLE_DEVICES=2 has 2;"),
        ("GPU-a", None, 2, "start with CUDA_VISIBLE_DEVICES=GPU-a"),
        ("a", "2,3", 2, "has 2, 3"),
    ],
)
def test_contradictions_are_refused(gpu_id: str, visible: str | None, count: int, message: str):
    with pytest.raises(ConfigError, match=message):
        experiment_name.gpu_index(gpu_id, visible, count)
