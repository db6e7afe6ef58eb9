"""TensorBoard in a real browser, over a real run: `make browser`."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import forked_ranks
from gpt2.metrics.tensorboard import TensorBoard
from gpt2.train import trainer
from metrics import former_run
from metrics.example_record import RECORD
from support import ROOT, small_config, write_tasks

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
UNFOLDED = (
    "loss/train",
    "loss/val",
    "loss/val_bits_per_byte",
    "main/hellaswag",
    "main/hellaswag_acc",
    "main/learning_rate",
    "main/tokens_per_s",
)
FOLDED = (" rank_gpu ", " reference ", " speed ", " train ")
"""groups of which only the name is seen"""
SCRIPT = "run_with_fake_gpus.py"
WIDTH, HEIGHT, WAIT_S = 1800, 1250, 60
# The page is made of elements with shadow trees, which `textContent` does not look into.
WHOLE_TEXT = """
const texts = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) texts.push(node.data);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return texts.join(" ");
"""
CLOSE_SETTINGS = """
const heading = [...document.querySelectorAll("*")].find(
  node => node.children.length === 0 && node.textContent.trim() === "Settings"
    && node.tagName.startsWith("H"));
heading?.parentElement.querySelector("button")?.click();
"""


@pytest.fixture(scope="module")
def page(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard over a run of 60 steps on four ranks, each with a GPU that is
    made up."""
    out = tmp_path_factory.mktemp("run")
    options = {"max_steps": 60, "eval_interval": 5, "hellaswag_interval": 10, "sample_interval": 20}
    options |= {"hellaswag_path": write_tasks(out / "tasks.jsonl")}
    values = [f"{name}={value}" for name, value in options.items()]
    forked_ranks.run([str(data_root), str(out), *values], 4, out, ROOT / "tests" / SCRIPT)
    with tensorboard(out / "runs") as address:
        yield address


@pytest.fixture(scope="module")
def page_of_many(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard over several runs: one that was resumed with another learning
    rate, one that goes on from its checkpoint in another folder, one with its weights, and one of
    an earlier version, which was resumed."""
    out = tmp_path_factory.mktemp("runs")
    flags: dict[str, Any] = {"use_tensorboard": True, "runs_dir": out / "runs", "max_steps": 20}
    first = out / "first" / "checkpoints" / "step_000010.pt"

    def train(folder: str, name: str | None = None, **more: Any) -> None:
        run_config = small_config(data_root, out / folder, **flags | more)
        trainer.run(run_config, run_name=name)

    train("first", "first", learning_rate=1e-3)
    train("first", learning_rate=2e-3, resume="latest", max_steps=30)
    train("forked", learning_rate=3e-3, resume=first)
    train("weights", "weights", learning_rate=4e-3, init_from=str(first))
    former_run.write(out / "runs" / "former", last=20)
    board = TensorBoard(out / "runs" / "former", {"learning_rate": 5e-3}, step=15, references={})
    for step in range(16, 31):
        board.write(replace(RECORD, step=step, rank_gpu=[{"memory_gb": 30}, {"memory_gb": 31}]))
    board.close()
    with tensorboard(out / "runs") as address:
        yield address


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """The address of a TensorBoard over `logdir` while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [ROOT / "start_tensorboard.sh", "--port", str(port), "--logdir", logdir]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://localhost:{port}"
        wait_for(lambda: "loss/train" in fetch(f"{address}/data/plugin/scalars/tags"))
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are needed: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", f"window-size={WIDTH},{HEIGHT}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def fetch(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def shown(browser: Any) -> str:
    """The text of the page."""
    text = " ".join(browser.execute_script(WHOLE_TEXT).split())
    return text.replace(" /", "/")  # as cards write a name


def wait_for_text(browser: Any, *words: str) -> None:
    """Until the page holds all of `words`."""
    text = ""
    deadline = time.monotonic() + WAIT_S
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, f"not all of {words} in:\n{text}"
        time.sleep(0.2)
        text = shown(browser)


def photograph(browser: Any, picture: Path) -> None:
    time.sleep(2)  # until everything is drawn
    assert browser.save_screenshot(str(picture.resolve()))
    assert picture.stat().st_size > 20_000


def test_what_matters_is_unfolded_and_the_rest_comes_after(page: str, browser: Any, tmp_path: Path):
    browser.get(f"{page}/?darkMode=false#timeseries")
    wait_for_text(browser, *UNFOLDED, *FOLDED)
    wait_for(lambda: len(browser.find_elements("css selector", "line-chart svg path")) > 6)
    text = shown(browser)
    places = [text.index(name) for name in (*UNFOLDED, *FOLDED)]
    assert places == sorted(places)
    assert "speed/" not in text and "rank_gpu/" not in text
    browser.execute_script(CLOSE_SETTINGS)
    photograph(browser, Path(os.environ.get("SCREENSHOT", tmp_path / "tensorboard.png")))


def test_the_gpu_of_every_rank(page: str, browser: Any, tmp_path: Path):
    browser.get(f"{page}/?darkMode=false&tagFilter=rank_gpu/utilisation#timeseries")
    wait_for_text(browser, *(f"rank_gpu/utilisation_percent/{rank}" for rank in range(3)))
    browser.get(f"{page}/?darkMode=false&tagFilter=rank_gpu/memory#timeseries")
    wait_for_text(browser, *(f"rank_gpu/memory_gb/{rank}" for rank in range(4)))
    assert "peak" not in shown(browser)
    browser.execute_script(CLOSE_SETTINGS)
    photograph(browser, tmp_path / "gpus.png")


def test_samples(page: str, browser: Any):
    browser.get(f"{page}/#text")
    wait_for_text(browser, "samples/text_summary", "step", "60", "def")


def test_charts_of_several_curves(page: str, browser: Any, tmp_path: Path):
    browser.get(f"{page}/#custom_scalars")
    wait_for_text(browser, "HellaSwag", "main/hellaswag", "reference/hellaswag")
    wait_for_text(browser, "GPU utilisation (%)", "rank_gpu/memory_gb/3", "speed/rank_3_ms")
    photograph(browser, tmp_path / "charts.png")


def test_the_table_of_runs_begins_with_what_is_compared(
    page_of_many: str, browser: Any, tmp_path: Path
):
    browser.get(f"{page_of_many}/#hparams")
    wait_for_text(browser, "learning_rate", "n_embd", "first", "weights", "former", "demo_2")
    photograph(browser, tmp_path / "hparams.png")


def test_runs_of_all_versions_side_by_side(page_of_many: str, browser: Any, tmp_path: Path):
    browser.get(f"{page_of_many}/?darkMode=false#timeseries")
    wait_for_text(browser, "gpu/memory_gb", "hellaswag/acc_norm", "main", "rank_gpu")
    browser.execute_script(CLOSE_SETTINGS)
    photograph(browser, tmp_path / "versions.png")
    browser.get(f"{page_of_many}/#custom_scalars")
    wait_for_text(browser, "GPU memory (GB)", "gpu/memory_gb")
    photograph(browser, tmp_path / "charts.png")
