import re

import pytest

from gpt2.base.errors import ConfigError
from gpt2.config import gpu_list

MIG = "MIG-GPU-8f3a51c2-77aa/1/0"


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("0", ["0"]),
        ("3,1", ["3", "1"]),
        (" 2 , 0,", ["2", "0"]),
        ("0-3,5", ["0", "1", "2", "3", "5"]),
        ("7-7", ["7"]),
        ("GPU-8f3a51c2,GPU-77aa", ["GPU-8f3a51c2", "GPU-77aa"]),
        (f"{MIG},MIG-8f3a51c2-0d", [MIG, "MIG-8f3a51c2-0d"]),
        ("MIG-GPU-8f/1/1,MIG-GPU-8f/1/10", ["MIG-GPU-8f/1/1", "MIG-GPU-8f/1/10"]),
        ("2,GPU-8f", ["2", "GPU-8f"]),
        ("all", None),
        (" ALL ", None),
        *[(word, []) for word in ("", " ", "-1", "none", "None", "void", "NoDevFiles", "10000")],
    ],
)
def test_lists_of_gpus(text: str, gpus: list[str] | None):
    assert gpu_list.parse(text, "--gpus") == gpus
    assert gpu_list.shown_by(text) == gpus


@pytest.mark.parametrize(
    ("text", "item", "understood"),
    [
        ("0 1", "0 1", "nothing"),
        ("0;1", "0;1", "nothing"),
        ("2,0 1", "0 1", "2"),
        ("0,,1", "", "0"),
        (",0", "", "nothing"),
        ("0,1,gpu2", "gpu2", "0, 1"),
        ("0-2,x", "x", "0, 1, 2"),
        ("3-0", "3-0", "nothing"),
        ("1-", "1-", "nothing"),
        ("0,all", "all", "0"),
        ("none,0", "none", "nothing"),
        ("0,10000", "10000", "0"),
        ("0-99999999999", "0-99999999999", "nothing"),
        ("0-1000", "0-1000", "nothing"),  # a longer range than that would take long
        *[
            (text, text, "nothing")
            for text in ("\N{FULLWIDTH DIGIT TWO}", "+1", "0x1", "01", "1.0", "1e0", "cuda:0")
        ],
        *[
            (text, text, "nothing")
            for text in ("GPU-", "GPU-xyz", "MIG-8f/1", "gpu-8f", "GPU-8f/1/0")
        ],
    ],
)
def test_what_is_no_list_is_refused_with_what_was_understood(text, item, understood):
    expected = f"{text!r}: {item!r} is not a GPU (understood: {understood}); expected GPUs sep"
    with pytest.raises(ConfigError, match=re.escape(f"--gpus {expected}")):
        gpu_list.parse(text, "--gpus")
    with pytest.raises(ConfigError, match=re.escape(f"CUDA_VISIBLE_DEVICES {expected}")):
        gpu_list.shown_by(text)


@pytest.mark.parametrize(
    ("text", "duplicate"),
    [
        ("1,0,1", "1"),
        ("0-2,2-4", "2"),
        ("GPU-8f3a,GPU-8f3a51c2", "GPU-8f3a51c2"),
        (f"{MIG},{MIG}", MIG),
    ],
)
def test_duplicates_are_refused(text: str, duplicate: str):
    with pytest.raises(ConfigError, match=f"duplicate GPU {duplicate} "):
        gpu_list.parse(text, "--gpus")


@pytest.mark.parametrize(
    ("visible", "gpus"), [(" 3 ,-1,4", ["3"]), ("0,2,-2", ["0", "2"]), ("-1,0", []), ("-7", [])]
)
def test_cuda_shows_no_gpu_from_a_negative_index_on(visible: str, gpus: list[str]):
    assert gpu_list.shown_by(visible) == gpus
    with pytest.raises(ConfigError, match="is not a GPU"):
        gpu_list.parse(visible, "--gpus")


def test_the_beginning_of_a_uuid_names_a_gpu():
    among = ["0", "GPU-8f3a51c2", "GPU-8f77", MIG]
    assert gpu_list.find("GPU-8f3a", among) == "GPU-8f3a51c2"
    assert gpu_list.find("GPU-8f3a51c2-77aa", among) == "GPU-8f3a51c2"
    assert gpu_list.find("0", among) == "0"
    assert gpu_list.find(MIG, among) == MIG
    for unknown in ("GPU-8f", "1", "GPU-9"):
        assert gpu_list.find(unknown, among) is None
