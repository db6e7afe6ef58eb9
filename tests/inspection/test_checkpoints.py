from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gpt2.checkpoint import metadata, store
from gpt2.inspection import checkpoints
from inspection.written_runs import text_of


def save(folder: Path, step: int, val_loss: float | None, bits: float | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = metadata.TrainingMetadata(step, 0, step * 10, 2.5, val_loss, 1, "run", "0")
    facts = replace(facts, bits_per_byte=bits)
    store.save(folder, {"filler": list(range(1000))}, facts, keep_last=10)


def test_no_checkpoints(tmp_path: Path, out: Console):
    checkpoints.print_checkpoints(tmp_path / "none", out)
    assert text_of(out) == f"No checkpoints in {tmp_path / 'none'}\n"


def test_table_is_the_folder_newest_last_with_the_best_marked(tmp_path: Path, out: Console):
    for step, val_loss in [(10, 3.25), (20, 3.125), (30, None)]:
        save(tmp_path, step, val_loss)
    (tmp_path / "step_000040.pt").touch()  # incomplete: no metadata
    checkpoints.print_checkpoints(tmp_path, out)
    rows = [line.split() for line in text_of(out).splitlines() if "step_0" in line]
    assert [row[0] for row in rows] == ["10", "20", "30"]
    assert [row[2:5] for row in rows] == [
        ["2.5000", "3.2500", "0.0"],
        ["2.5000", "3.1250", "*"],
        ["2.5000", "-", "0.0"],
    ]
    assert rows[0][-1] == str(tmp_path / "step_000010.pt")


def test_bits_per_byte_stand_beside_the_validation_loss_where_they_are_known(
    tmp_path: Path, out: Console
):
    save(tmp_path / "former", 10, 3.25)
    save(tmp_path / "now", 10, 3.25)
    save(tmp_path / "now", 20, 3.125, bits=1.0625)
    checkpoints.print_checkpoints(tmp_path, out)
    former, now = text_of(out).split("Checkpoints in ")[1:]
    assert "bits/byte" not in former
    rows = [line.split() for line in now.splitlines() if "step_0" in line]
    assert [row[3:5] for row in rows] == [["3.2500", "0.0"], ["3.1250", "1.0625"]]


def test_listing_reads_the_metadata_alone_in_all_folders(tmp_path: Path, out: Console):
    for name in ("demo", "other"):
        save(tmp_path / name, 5, 1.0)
        (tmp_path / name / "step_000005.pt").write_bytes(b"")
    checkpoints.print_checkpoints(tmp_path, out)
    assert text_of(out).count("Checkpoints in") == 2
