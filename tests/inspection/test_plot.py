import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.base.errors import ConfigError, DataError
from gpt2.cli import main
from gpt2.inspection import figures, plot
from gpt2.inspection.figures import Curve
from gpt2.metrics.jsonl import JsonLines
from gpt2.metrics.log_file import LogFile
from gpt2.metrics.records import CorpusLoss, HellaSwagRecord, StepRecord, ValidationRecord
from gpt2.train import status
from gpt2.train.status import Plan
from inspection.written_runs import PLAN


def write_log(
    path: Path,
    name: str,
    losses: list[float],
    first: int = 0,
    hellaswag: bool = False,
    bits_per_byte: float | None = None,
):
    log = LogFile(path, name, first)
    for step, loss in enumerate(losses, start=first + 1):
        log.write(StepRecord(step, 0, loss, 1e-3, 1.0, 2.0, 500.0, 0.1, []))
        if step % 10 == 0:
            log.write(ValidationRecord(step, 0, loss, bits_per_byte))
            if hellaswag:
                log.write(HellaSwagRecord(step, 0, 0.26, 0.27, 9))
    log.close()


def curve(values: list[float]) -> Curve:
    return Curve("run", "red", np.arange(1.0, len(values) + 1), np.array(values))


def titles(runs: list) -> list[str]:
    return [axes.get_title(loc="left") for axes in plot.draw(runs).axes]


def test_a_log_a_folder_and_an_out_dir_are_read(tmp_path: Path):
    write_log(tmp_path / "logs" / "log.txt", "a", [3.0] * 20)
    for place in (tmp_path, tmp_path / "logs", tmp_path / "logs" / "log.txt"):
        (run,) = plot.read([place])
        assert run.name == "a"
        assert len(run.steps) == 20


def test_the_learning_rate_is_no_staircase(tmp_path: Path):
    """Records have all digits, a log of text two; a folder may have either file."""
    sink = JsonLines(tmp_path / "metrics.jsonl", "a", 0, {})
    rates = [1e-3 * (1 - step / 1000) for step in range(1, 101)]
    for step, rate in enumerate(rates, 1):
        sink.write(StepRecord(step, 0, 3.0, rate, 1.0, 2.0, 500.0, 0.1, []))
    sink.close()
    drawn = {axes.get_title(loc="left"): axes for axes in plot.draw(plot.read([tmp_path])).axes}
    assert drawn["learning rate"].lines[0].get_ydata() == pytest.approx(rates, rel=1e-12)


def test_runs_have_distinct_names(tmp_path: Path):
    """By name within one log; several logs add their paths."""
    one, several = tmp_path / "one.txt", tmp_path / "several.txt"
    write_log(one, "a", [3.0])
    for name in ("a", "b", "began and ended"):
        write_log(several, name, [3.0] if name in "ab" else [])
    assert [run.name for run in plot.read([several])] == ["a", "b"]
    both = [run.name for run in plot.read([one, several])]
    assert both == [str(one), f"{several} a", f"{several} b"]
    assert [run.name for run in plot.read([one, several], last=1)] == [str(one), str(several)]


def test_the_folder_of_an_experiment_stands_for_its_trainings(tmp_path: Path):
    for name in ("modern", "gpt2"):
        write_log(tmp_path / "models" / name / "log.txt", "demo_20261121_130000", [3.0])
    names = [run.name for run in plot.read([tmp_path / "models"])]
    assert names == [f"{tmp_path}/models/gpt2", f"{tmp_path}/models/modern"]


def test_a_run_is_found_by_its_name_and_by_its_checkpoint_folder(tmp_path: Path):
    """As by `gpt2 watch`: its log holds earlier runs, too, and may lie elsewhere."""
    root = tmp_path / "checkpoints"
    for gpu in "01":
        log = tmp_path / "logs" / f"lr1_gpu_{gpu}" / "log.txt"
        for name in (f"earlier on {gpu}", f"newest on {gpu}"):
            write_log(log, name, [3.0])
        folder = root / f"lr1_gpu_{gpu}"
        folder.mkdir(parents=True)
        plan = Plan(**PLAN.__dict__ | {"run_name": f"newest on {gpu}", "log_file": str(log)})
        status.write(folder, plan, "finished", 1)
    both = {run.name for run in plot.read([Path("lr1")], root=root)}
    assert both == {"newest on 0", "newest on 1"}
    (run,) = plot.read([root / "lr1_gpu_0"])
    assert run.name == "newest on 0"
    twice = {
        run.name for run in plot.read([Path("lr1"), Path("lr1"), root / "lr1_gpu_0"], root=root)
    }
    assert twice == both
    copied = shutil.copytree(root, tmp_path / "copy") / "lr1_gpu_0"
    names = [run.name for run in plot.read([Path("lr1"), copied], root=root)]
    assert sorted(names) == sorted(
        [f"{root}/lr1_gpu_0 newest on 0", f"{copied} newest on 0", "newest on 1"]
    )
    with pytest.raises(
        DataError, match=r"no log at lr2; .* an --experiment_name .* run in .*checkpoints"
    ):
        plot.read([Path("lr2")], root=root)


def test_a_log_without_a_step_is_named_in_the_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no log at .*nowhere; expected a log\.txt"):
        plot.read([tmp_path / "nowhere"])
    write_log(tmp_path / "log.txt", "a", [])
    with pytest.raises(DataError, match="has no logged step yet"):
        plot.read([tmp_path])


def test_panels_without_data_are_left_out(tmp_path: Path):
    write_log(tmp_path / "a.txt", "a", [3.0] * 5)
    write_log(tmp_path / "b.txt", "b", [3.0] * 20, hellaswag=True)
    assert titles(plot.read([tmp_path / "a.txt"])) == ["loss", "learning rate", "tokens/s"]
    both = plot.read([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert titles(both) == [panel.title for panel in plot.PANELS if panel.of]


def test_one_run_on_a_mixture_has_a_panel_with_a_curve_for_each_corpus(tmp_path: Path):
    def write(first: int, losses: dict[int, dict[str, float]], folder: str = "a") -> None:
        sink = JsonLines(tmp_path / folder / "metrics.jsonl", folder, first, {})
        for step, of_corpora in losses.items():
            corpora = {name: CorpusLoss(loss, None) for name, loss in of_corpora.items()}
            sink.write(ValidationRecord(step, 0, 3.0, None, corpora))
        sink.close()

    write(0, {10: {"web": 3.5, "_$x$": 2.5}, 20: {"web": 9.0, "_$x$": 9.0}})
    write(10, {20: {"web": 3.25, "_$x$": 2.25}})
    runs = plot.read([tmp_path / "a"])
    assert titles(runs) == ["validation loss", "validation loss of each corpus"]
    axes = plot.draw(runs).axes[1]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3.5, 3.25], [2.5, 2.25]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["web", "_$x$"]
    assert len({line.get_color() for line in axes.lines}) == 2
    write(0, {10: {"web": 3.5, "code": 2.5}}, "b")
    assert titles(plot.read([tmp_path / "a", tmp_path / "b"])) == ["validation loss"]
    write(0, {10: dict.fromkeys(map(str, range(figures.MANY + 1)), 3.0)}, "c")
    write(0, {10: {"web": 3.5}}, "d")
    assert [titles(plot.read([tmp_path / name])) for name in "cd"] == [["validation loss"]] * 2


def test_one_run_is_the_title_and_several_are_a_legend(tmp_path: Path):
    for name in ("_a $x$", "b"):
        write_log(tmp_path / "log.txt", name, [3.0] * 10)
    runs = plot.read([tmp_path])
    figure = plot.draw(runs[:1])
    assert figure.get_suptitle() == "_a $x$: step 10, loss 3.0000, val loss 3.0000"
    assert not figure.legends
    (legend,) = plot.draw(runs).legends
    assert [text.get_text() for text in legend.get_texts()] == ["_a $x$", "b"]


def test_bits_per_byte_stand_beside_the_validation_loss(tmp_path: Path):
    write_log(tmp_path / "log.txt", "a", [3.0] * 10, bits_per_byte=1.0625)
    (run,) = plot.read([tmp_path])
    assert plot.summary(run) == "a: step 10, loss 3.0000, val loss 3.0000, bits per byte 1.0625"


def test_every_curve_outside_of_a_band_has_its_color():
    assert len(set(figures.distinct_colors(figures.MANY))) == figures.MANY


@pytest.mark.parametrize(
    ("kind", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_the_suffix_sets_the_format(tmp_path: Path, kind: str, head: bytes):
    write_log(tmp_path / "log.txt", "a $1", [float("nan"), 1e9, float("inf"), 3.0] * 3)
    path = tmp_path / f"curves.{kind}"
    plot.save(plot.read([tmp_path]), path)
    assert path.read_bytes().startswith(head)


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path):
    write_log(tmp_path / "log.txt", "a", [3.0])
    runs = plot.read([tmp_path])
    with pytest.raises(ConfigError, match=r"expected a \.png, \.svg, \.pdf file, got .*x\.gif"):
        plot.save(runs, tmp_path / "x.gif")
    with pytest.raises(ConfigError, match="choose another file with -o"):
        plot.save(runs, tmp_path / "no folder" / "x.png")


def test_a_constant_stays_and_noise_shrinks():
    assert plot.smoothed(np.full(1000, 2.0)) == pytest.approx(2.0)
    noise = np.random.default_rng(0).normal(size=10_000)
    assert plot.smoothed(noise)[1000:].std() < 0.1
    assert plot.smoothed(np.array([5.0])) == pytest.approx(5.0)


def test_smoothing_begins_with_the_values_themselves():
    """A wide window there would hide how fast losses fall in the first steps."""
    steep = 10 / np.arange(1, 1000)
    assert plot.smoothed(steep)[:10] == pytest.approx(steep[:10])
    assert plot.smoothed(steep) == pytest.approx(steep, rel=0.05)


def test_nan_and_infinity_do_not_spread():
    values = np.full(1000, 2.0)
    values[500] = np.nan
    values[600] = np.inf
    assert plot.smoothed(values) == pytest.approx(2.0)
    assert np.isnan(plot.smoothed(np.full(3, np.nan))).all()


def test_the_steep_beginning_is_outside_of_the_picture():
    losses = [11.0 - 0.1 * step for step in range(40)] + [3.5 - 0.001 * i for i in range(960)]
    low, high = plot.loss_range([curve(losses)])
    assert (low, high) == pytest.approx((2.49, 3.54), abs=0.1)


def test_neither_divergence_nor_an_aborted_run_sets_the_range():
    good = curve([11.0, *[3.0] * 999])
    diverged = curve([11.0, *[3.0] * 500, *[1e4] * 499])
    assert plot.loss_range([good, diverged])[1] < 12
    aborted = curve([11.0] * 20)
    assert plot.loss_range([good, aborted])[1] < 3.5
    assert plot.loss_range([curve([float("nan")] * 5)]) is None


def test_a_run_that_is_somewhat_worse_from_its_first_measurement_on_is_seen():
    good = [curve([4.0, 3.5, 3.2, 3.1, 3.0]), curve([4.1, 3.6, 3.3, 3.2, 3.1])]
    pruned, hopeless = curve([5.2, 4.9]), curve([90.0, 80.0])
    assert 4.9 < plot.loss_range([*good, pruned])[1] < 5.2
    assert plot.loss_range([*good, pruned, hopeless])[1] < 5.2


def test_few_losses_are_shown_from_the_first_one_on():
    curves = [curve([8.3, 5.2, 5.1]), curve([8.4, 5.3, 5.2])]
    low, high = plot.loss_range(curves, steep=0)
    assert low < 5.1
    assert 8.4 < high < 9
    assert plot.loss_range([*curves, curve([8.3, 1e4, 1e4])], steep=0)[1] < 13


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write_log(tmp_path / "logs" / "log.txt", "a", [3.0] * 10)
    monkeypatch.chdir(tmp_path)
    for arguments, picture in ([], "curves.png"), ([".", "-o", "x.svg"], "x.svg"):
        monkeypatch.setattr(sys, "argv", ["gpt2", "plot", *arguments])
        assert main.main() == 0
        expected = f"a: step 10, loss 3.0000, val loss 3.0000\nDrawn: {picture}\n"
        assert capsys.readouterr().out == expected
        assert Path(picture).exists()
    Path("runs/lr1_gpu_cpu").mkdir(parents=True)
    plan = Plan(**PLAN.__dict__ | {"run_name": "a", "log_file": str(tmp_path / "logs/log.txt")})
    status.write(Path("runs/lr1_gpu_cpu"), plan, "finished", 10)
    monkeypatch.setattr(sys, "argv", ["gpt2", "plot", "lr1", "--checkpoint_dir", "runs"])
    assert main.main() == 0
    assert capsys.readouterr().out.startswith("a: step 10, loss 3.0000")
    monkeypatch.setattr(sys, "argv", ["gpt2", "plot", "nowhere"])
    assert main.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
