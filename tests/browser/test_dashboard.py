"""Optuna's dashboard in a real browser, over the study of a search: `make browser`."""

import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.search.played import Played
from gpt2.experiments.search import study

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SERVER = Path(sysconfig.get_path("scripts")) / "optuna-dashboard"
WAIT_S = 60


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard over a search with finished, pruned and running trials."""
    folder = tmp_path_factory.mktemp("search")
    played = Played(folder, n_trials=5, startup_trials=2)
    for number in range(3):
        played.finishes(played.next(), 9.5, 9.0 - 0.5 * number, 8.25 - 0.5 * number)
    worse = played.next()
    assert played.validates(worse, 10.5) == ["prune"]
    played.tell(worse, "pruned", result={})
    played.validates(played.next(), 9.0)
    if not SERVER.exists():
        pytest.skip("optuna-dashboard is needed: pip install optuna-dashboard")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(SERVER), study.url(folder), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://localhost:{port}"
        wait_for(lambda: "search" in fetch(f"{address}/api/studies"))
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
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1600,1100"):
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


def test_study_is_listed(page: str, browser: Any):
    browser.get(f"{page}/dashboard")
    wait_for(lambda: "search" in text_of(browser))


def test_trials_are_shown(page: str, browser: Any, tmp_path: Path):
    browser.get(f"{page}/dashboard/studies/1/trials")
    words = ("Trial 0", "Trial 4", "Complete", "Pruned", "Running")
    wait_for(lambda: all(word in text_of(browser) for word in words))
    browser.get(f"{page}/dashboard/studies/1")
    wait_for(lambda: "Hyperparameter Importance" in text_of(browser))
    wait_for(lambda: len(browser.find_elements("css selector", ".js-plotly-plot")) >= 2)
    time.sleep(2)  # until the curves are drawn
    picture = Path(os.environ.get("DASHBOARD_SCREENSHOT", tmp_path / "dashboard.png"))
    assert browser.save_screenshot(str(picture.resolve()))
    assert picture.stat().st_size > 20_000


def text_of(browser: Any) -> str:
    return str(browser.find_element("css selector", "body").text)
