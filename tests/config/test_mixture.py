"""What is typed of a mixture: --data_root and --mixture."""

from fractions import Fraction

import pytest

from gpt2.base.errors import ConfigError
from gpt2.cli import train
from gpt2.config import mixture, options
from gpt2.config.run import RunConfig

WRONG = {
    "two corpora with the name web": {"data_root": ["web=a", "b/web"]},
    "but not for code=b": {"data_root": ["web=a:1", "code=b"]},
    "has no weight above 0": {"data_root": ["web=a:0", "code=b:0"]},
    "expected 0, or at least 1e-06": {"data_root": ["web=a:1e-9", "code=b:1"]},
    "as NAME=FOLDER:WEIGHT, .* got '\\*'": {"data_root": ["*", "b"]},
    "has no value": {"data_root": []},
    "is no corpus of --data_root; did you mean web": {"mixture": ["wep=1"]},
    "both have weights": {"data_root": ["web=a:1", "code=b:1"], "mixture": ["web=1"]},
    "expected none: the last one": {"mixture": ["until=0.5 web=1"]},
    "more than 0.5 and less than 1": {"mixture": ["until=0.5 web=1", "until=0.4 web=1", "web=1"]},
    "expected NAME=WEIGHT or until=SHARE, got -1": {"mixture": ["-1"]},
    "two weights for web": {"mixture": ["web=1 web=2"]},
    "two values of until": {"mixture": ["until=0.5 until=0.6 web=1", "web=1"]},
    r"not for web=a:-1; expected .* 0 or more": {"data_root": ["web=a:-1", "code=b:1"]},
    r"not for web=a:1e400; expected .* 0 or more": {"data_root": ["web=a:1e400", "code=b:1"]},
    "as NAME=FOLDER:WEIGHT, .* got 'a-b=a'": {"data_root": ["a-b=a", "code=b"]},
    "or of one with NAME=FOLDER:1": {"data_root": "web=a", "mixture": ["web=1"]},
    "expected str, got": {"data_root": [{"name": "web", "root": "a"}]},
    r"other than until": {"data_root": ["until=a", "code=b"]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_typed_wrongly_is_one_line_with_the_way_out(message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        options.overlay(RunConfig(), {"data_root": ["web=a", "code=b"], **WRONG[message]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "root",
    ["data/web", "web=data", "http://localhost:8000", "s3://bucket/a:b", "data/a:0.5", "d/x=1:2"],
)
def test_one_folder_is_taken_as_it_is_typed(root: str):
    run = options.overlay(RunConfig(), {"data_root": root})
    assert run.data.data_root == (root,)
    assert run.to_dict()["data"]["data_root"] == root
    assert mixture.corpora(run.data.data_root)[0].root == root


def test_a_port_is_no_weight():
    roots = ["a=http://host:80", "b=http://host:80/x:0.5", "c=s3://bucket:0.3", "d=e:2"]
    found = [
        mixture.corpora([root, "z=z"]) if number == 0 else mixture.corpora([root, "z=z:1"])
        for number, root in enumerate(roots)
    ]
    shown = [(one.root, one.weight) for one, _ in found]
    assert shown == [
        ("http://host:80", None),
        ("http://host:80/x", Fraction(1, 2)),
        ("s3://bucket", Fraction(3, 10)),
        ("e", 2),
    ]


def test_toml_has_the_same_options():
    file = """
    data_root = ["web=a", "code=b"]
    [[mixture]]
    until = 0.8
    web = 0.7
    code = 0.3
    [[mixture]]
    code = 1
    """
    run = options.from_toml(RunConfig(), file, "a.toml")
    typed = {"data_root": ["web=a", "code=b"], "mixture": ["until=0.8 web=0.7 code=0.3", "code=1"]}
    assert run == options.overlay(RunConfig(), typed)
    assert options.of_stored(run.to_dict()) == run


def test_weights_of_one_option_replace_those_of_the_other():
    """Where one is typed and the other is a file's or the checkpoint's."""
    stored = options.overlay(RunConfig(), {"data_root": ["web=a:1", "code=b:3"]}).to_dict()
    flags = ["--mixture", "until=0.5 web=1", "code=1", "--resume", "latest", "--seed", "3"]
    run = train.parse_run(train.TrainCommand, flags, stored=stored).run
    assert run.data.data_root == ("web=a", "code=b")
    assert (run.data.mixture, run.machine.seed) == (("until=0.5 web=1", "code=1"), 3)
    again = ["--data_root", "web=a:1", "code=b:2", "--max_steps", "7"]
    run = train.parse_run(train.TrainCommand, again, stored=run.to_dict()).run
    assert (run.data.data_root, run.data.mixture) == (("web=a:1", "code=b:2"), ())
    file = "data_root = ['web=a:1', 'code=b:2']\n[[mixture]]\nweb = 1"
    with pytest.raises(ConfigError, match="both have weights"):
        options.from_toml(RunConfig(), file, "a.toml")
    with pytest.raises(ConfigError, match="given more than once; put all its values behind one"):
        train.parse_train(["--data_root", "web=a", "--data_root", "code=b"])
    with pytest.raises(ConfigError, match=r"use \[\[mixture\]\]"):
        options.from_toml(RunConfig(), "[mixture]\nweb = 1", "a.toml")


def test_the_other_flags_stay_when_values_do_not_fit_the_preset():
    flags = ["--resume", "latest", "--mixture", "web=1", "code=1", "--max_steps", "40", "--seed=3"]
    command = train.parse_before_resume(train.TrainCommand, flags)
    assert (command.run.data.max_steps, command.run.machine.seed) == (40, 3)
    assert command.run.data.mixture == ()


def test_an_address_with_a_password_is_typed_again_with_its_weights():
    roots = ["web=ftp://me:secret@host/a", "code=b"]
    run = options.overlay(RunConfig(), {"data_root": roots, "mixture": ["web=1 code=1"]})
    kept = options.on_stored(RunConfig(), run.to_dict())
    assert kept.data == RunConfig().data
    assert "secret" not in str(options.changed(run.to_dict(), kept, ("data.data_root",)))


@pytest.mark.parametrize("root", ["a\n", "a\nb:1", "web=a:1\n"])
def test_any_text_can_be_typed(root: str):
    assert mixture.corpora([root])[0].root in root
    with pytest.raises(ConfigError):
        mixture.corpora([root, ""])
