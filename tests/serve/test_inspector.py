"""The server serves the inspector's page at /inspect, whose scripts can reach nothing of the server's."""

import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from tests.serve.random_model import save_random_model
from tests.serve.running import running

pytest.importorskip("starlette", reason="the server needs starlette")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]

SPY = """async () => {
  let found = "";
  try { found += sessionStorage.length + localStorage.length; } catch (error) { found += error.name; }
  try { await fetch("/health", { mode: "no-cors" }); found += ", reached the server"; } catch { found += ", alone"; }
  return found;
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def facts_of(page: Any) -> Any:
    page.wait_for_selector("#facts dt:text-is('Inspector')", state="attached")
    return page.locator("#facts div", has=page.locator("dt:text-is('Inspector')")).locator("dd")


def test_the_page_is_linked_works_and_is_sandboxed(model: Path, tmp_path: Path) -> None:
    made = tmp_path / "inspect.html"
    main(["inspect", str(model), "--text", "def f(x): return x", "--out", str(made)])
    flags = ["--inspector", str(made), "--api-key", "k"]
    with running(model, tmp_path / "log.txt", *flags) as server, playwright.sync_playwright() as chromium:
        browser = chromium.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        policy = page.goto(f"{server.address}/inspect").headers["content-security-policy"]
        assert "sandbox allow-scripts" in policy and "default-src 'none'" in policy
        page.locator("#t0-1").click()
        assert page.locator(".routes .pair").count() > 0
        assert errors == []
        assert page.evaluate(SPY) == "SecurityError, alone"
        page.goto(server.address)
        page.fill("#key-value", "k")
        page.keyboard.press("Enter")
        assert facts_of(page).locator("a").get_attribute("href") == "/inspect"
        browser.close()


def test_without_a_page_the_panel_says_how_to_make_one(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log.txt") as server, playwright.sync_playwright() as chromium:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.address}/inspect", timeout=10)
        browser = chromium.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.goto(server.address)
        assert facts_of(page).text_content().startswith("fathom inspect makes a page")
        browser.close()
