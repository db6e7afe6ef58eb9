"""TensorBoard in a real browser, over a real run: `make browser`."""

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2.train import trainer
from support import ROOT, small_config, write_tasks

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
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
    """The address of a TensorBoard over a run of 60 steps."""
    out = tmp_path_factory.mktemp("run")
    flags = {"max_steps": 60, "eval_interval": 5, "hellaswag_interval": 10, "sample_interval": 20}
    tasks = write_tasks(out / "tasks.jsonl")
    trainer.run(small_config(data_root, out, **flags, hellaswag_path=tasks, use_tensorboard=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [ROOT / "start_tensorboard.sh", "--port", str(port), "--logdir", out / "runs"]
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


def wait_for_text(browser: Any, *words: str) -> None:
    """Until the page holds all of `words`."""
    text = ""
    deadline = time.monotonic() + WAIT_S
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, f"not all of {words} in:\n{text}"
        time.sleep(0.2)
        text = browser.execute_script(WHOLE_TEXT).replace(" /", "/")  # as cards write a name


def test_curves(page: str, browser: Any, tmp_path: Path):
    browser.get(f"{page}/?darkMode=false#timeseries")
    wait_for_text(browser, "loss/train", "loss/val", "hellaswag/acc_norm", "hellaswag/gpt2_124m")
    wait_for(lambda: len(browser.find_elements("css selector", "line-chart svg path")) > 4)
    browser.execute_script(CLOSE_SETTINGS)
    time.sleep(2)  # until the curves are drawn
    picture = Path(os.environ.get("SCREENSHOT", tmp_path / "tensorboard.png"))
    assert browser.save_screenshot(str(picture.resolve()))
    assert picture.stat().st_size > 20_000


def test_samples(page: str, browser: Any):
    browser.get(f"{page}/#text")
    wait_for_text(browser, "samples/text_summary", "step", "60", "def")


def test_charts_of_several_curves(page: str, browser: Any):
    browser.get(f"{page}/#custom_scalars")
    wait_for_text(browser, "HellaSwag", "hellaswag/acc_norm", "hellaswag/gpt2_124m")


def test_configuration(page: str, browser: Any):
    browser.get(f"{page}/#hparams")
    wait_for_text(browser, "learning_rate", "n_embd")
