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


@pytest.mark.parametrize("gpu_id", ["0x1", "all", "none", "0-1", "gpu2", "GPU-xyz", "01", "1.0"])
def test_what_is_not_one_gpu_is_refused(gpu_id: str):
    with pytest.raises(ConfigError, match=f"gpu_id={gpu_id} is not a GPU; expected one such as 2"):
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
    ("shown", "gpu_id"),
    [
        (["3", "2"], "3"),
        ([], "cpu"),
        (["GPU-8932"], "GPU-8932"),
        (["MIG-GPU-89/1/0"], "MIG-GPU-89-1-0"),
    ],
)
def test_the_first_gpu(shown: list[str], gpu_id: str):
    assert experiment_name.first_gpu(shown) == gpu_id
    assert ExperimentConfig("a", gpu_id=gpu_id).gpu_id == gpu_id


@pytest.mark.parametrize(
    ("gpu_id", "shown", "index"),
    [
        ("2", ["0", "1", "2", "3"], 2),
        ("2", ["2"], 0),
        ("3", ["2", "3"], 1),
        ("GPU-b", ["GPU-a", "GPU-b"], 1),
        ("GPU-bc", ["GPU-a", "GPU-bcde"], 1),  # the beginning of a UUID is enough
        ("MIG-GPU-89-1-0", ["MIG-GPU-89/2/0", "MIG-GPU-89/1/0"], 1),
        ("2", ["GPU-a"], 0),  # the ids cannot be compared, and there is only one GPU
        ("GPU-a", ["0"], 0),
    ],
)
def test_the_gpu_of_an_id(gpu_id: str, shown: list[str], index: int):
    assert experiment_name.gpu_index(gpu_id, shown) == index


@pytest.mark.parametrize(
    ("gpu_id", "shown", "message"),
    [
        ("7", ["0", "1"], "gpu_id=7 is invalid: CUDA shows this process 0, 1; leave --gpu_id out"),
        ("0", ["2"], "shows this process 2;"),
        ("GPU-a", ["0", "1"], "start with CUDA_VISIBLE_DEVICES=GPU-a"),
        ("GPU-a", ["GPU-ab", "GPU-ac"], "shows this process GPU-ab, GPU-ac"),
    ],
)
def test_contradictions_are_refused(gpu_id: str, shown: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        experiment_name.gpu_index(gpu_id, shown)
