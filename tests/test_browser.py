"""What a person sees, in a real browser: JupyterLab runs the notebooks, the panel moves, the report sorts."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that a notebook may take where nothing is computed yet
ERRORS = """
const found = [];
for (const cell of window.jupyterapp.shell.currentWidget.content.model.cells) {
  if (cell.type !== 'code' || !cell.sharedModel.getSource().trim()) continue;
  if (!cell.executionCount) found.push('never ran: ' + cell.sharedModel.getSource().slice(0, 60));
  for (const output of cell.outputs.toJSON())
    if (output.output_type === 'error') found.push(output.ename + ': ' + output.evalue);
}
return found;
"""
RUN_ALL = """
const done = arguments[0];
window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => done('ran'), error => done(String(error)));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.fail("chromium and chromedriver are not installed: `make test-browser` installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_script_timeout(PATIENCE)
    yield opened
    opened.quit()


def wait(what: str, found: Callable[[], Any], seconds: float = 60) -> Any:
    """What `found` returns once that is true; a stale or missing element counts as not yet."""
    from selenium.common.exceptions import WebDriverException

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if value := found():
                return value
        except WebDriverException:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


# --- JupyterLab -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose notebooks have the smoke study's parameters; results go there, not here."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "gcnet"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    for file in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in smoke.items())
        nbformat.write(notebook, file)
    return folder


@pytest.fixture(scope="module")
def lab(project: Path) -> Iterator[str]:
    """The address of a running JupyterLab."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = os.environ.get("GCNET_RUNS", str(ROOT / "runs"))
    environment = {**os.environ, "PYTHONPATH": str(project), "GCNET_RUNS": str(Path(runs).resolve())}
    environment.pop("GCNET_HEADLESS", None)
    log = (project / "lab.log").open("w")
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
            "--ServerApp.port_retries=0", "--IdentityProvider.token=open", "--LabApp.expose_app_in_browser=True",
            "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        cwd=project, env=environment, stdout=log, stderr=log,
    )  # fmt: skip

    def answers() -> bool:
        if server.poll() is not None:
            raise AssertionError((project / "lab.log").read_text())
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait("JupyterLab answers", answers)
    yield f"http://127.0.0.1:{port}/lab"
    server.terminate()
    server.wait(30)
    log.close()


def run_all(browser: Any, lab: str, name: str) -> list[str]:
    """Open a notebook, Run All; returns its errors and the cells that never ran."""
    browser.get(f"{lab}/tree/notebooks/{name}.ipynb?token=open&reset")
    ready = """
    const shown = window.jupyterapp?.shell.currentWidget;
    return shown?.context?.isReady && !!shown.sessionContext?.session?.kernel;
    """
    wait(f"{name} is open", lambda: browser.execute_script(ready))
    assert browser.execute_async_script(RUN_ALL) == "ran"
    return browser.execute_script(ERRORS)


def test_the_quick_start_runs_from_top_to_bottom(browser: Any, lab: str) -> None:
    started = time.monotonic()
    assert run_all(browser, lab, "00_quickstart") == []
    assert time.monotonic() - started < 180
    assert wait("a figure", lambda: browser.find_elements("css selector", ".jp-OutputArea-output img"))


def test_the_panel_moves_the_curve(browser: Any, lab: str) -> None:
    from selenium.webdriver.support.ui import Select

    assert run_all(browser, lab, "05_shift_evaluation") == []
    show = """
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const place = [...notebook.model.cells].findIndex(c => c.sharedModel.getSource().startsWith('shift_panel('));
    return notebook.scrollToItem(place, 'start').then(() => place);
    """
    assert browser.execute_script(show) > 0
    menus = wait(
        "the four menus", lambda: len(m := browser.find_elements("css selector", ".widget-dropdown select")) == 4 and m
    )
    picture = ".jupyter-widgets img[src^='data:image/svg']"
    before = wait("the curve", lambda: browser.find_element("css selector", picture).get_attribute("src"))
    menu = Select(menus[3])
    menu.select_by_index(len(menu.options) - 1)
    wait("another curve", lambda: browser.find_element("css selector", picture).get_attribute("src") != before)
    assert browser.find_element("css selector", picture).get_attribute("alt")


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the committed digits results."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("notebooks", "params", "results/digits"):
        shutil.copytree(ROOT / name, folder / name)
    command = [sys.executable, "-m", "gcnet", "report", "--study", "digits"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("GCNET_RESULTS", None)
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "results" / "digits" / "report.html"


def column(browser: Any, table: str, place: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => r.cells[arguments[1]].textContent)"
    )
    return browser.execute_script(script, table, place)


def test_the_report_opens_without_an_error_and_asks_nothing_of_the_network(browser: Any, page: Path) -> None:
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what came before, and what JupyterLab says when it is left
    browser.get(page.as_uri())
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    time.sleep(1)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"].split(":")[0] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked <= {"file", "data"}
    pictures = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert len(pictures) > 10
    assert all(alt for alt, _ in pictures)
    wide = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.execute_script(wide), "the page scrolls sideways"


def test_tables_sort_by_mouse_and_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(page.as_uri())
    region = "[aria-label='table accuracy']"
    heads = browser.find_elements("css selector", f"{region} th button")
    names = [head.get_attribute("textContent") for head in heads]
    place = next(i for i, name in enumerate(names) if name.startswith("direct"))
    numbers = [float(re.match(r"[\d.]+", text)[0]) for text in column(browser, region, place)]
    assert numbers != sorted(numbers)
    heads[place].click()
    assert [float(re.match(r"[\d.]+", t)[0]) for t in column(browser, region, place)] == sorted(numbers)
    heads[place].send_keys(Keys.ENTER)
    assert [float(re.match(r"[\d.]+", t)[0]) for t in column(browser, region, place)] == sorted(numbers, reverse=True)
    header = browser.find_elements("css selector", f"{region} th")[place]
    assert header.get_attribute("aria-sort") == "descending"
    heads[0].click()
    assert column(browser, region, 0) == sorted(column(browser, region, 0))
    assert header.get_attribute("aria-sort") is None


def test_the_report_prints(browser: Any, page: Path) -> None:
    import base64

    browser.get(page.as_uri())
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")


def test_an_executed_notebook_opens_from_the_report(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    browser.find_element("link text", "as a page").click()
    assert "notebooks/0" in wait("the notebook's page", lambda: browser.current_url)
    browser.get_log("browser")
    browser.refresh()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
