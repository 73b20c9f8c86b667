"""The page in a real browser (headless Chromium), opened as the file it is."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from tests.serve.random_model import CONFIG, save_random_model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]

ATTACK = "</script><img src=x onerror=\"document.title='owned'\"><!-- <script>"
CODE = f"def f(x):\n    return x['a']  # {ATTACK}\n" * 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    model = save_random_model(folder / "model")
    text = folder / f"{ATTACK.replace('/', '')}.py"
    text.write_text(CODE)
    main(["inspect", str(model), "--file", str(text), "--window", "150", "--shown", "300",
          "--out", str(folder / "page.html"), "--json", str(folder / "facts.json")])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def facts(made: Path) -> Any:
    return json.loads((made / "facts.json").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, made: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end there may be no script error and no network request."""
    complaints: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def open_one(width: int = 1200, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((made / "page.html").as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(asked) == {(made / "page.html").as_uri()}


def shown_experts(page: Any) -> list[list[str]]:
    return [row.locator(".pair").all_text_contents() for row in page.locator(".routes tr").all()]


def test_a_token_shows_its_experts_and_its_heads(open_page: Callable[..., Any], facts: Any) -> None:
    page = open_page()
    for number, place in ((0, 1), (0, 40), (1, 77)):
        page.locator(f"#t{number}-{place}").click()
        token = facts["excerpts"][number]["tokens"][place]
        expected = [
            [f"{expert} {weight:.2f}" for expert, weight in zip(*pair, strict=True)]
            for pair in zip(token["experts"], token["weights"], strict=True)
        ]
        assert shown_experts(page) == expected
        assert f"{token['bits']:.1f} bits" in page.locator("#panel").text_content()
        assert facts["classes"][token["kind"]]["name"] in page.locator("#panel-token").text_content()
        rows = page.locator(".heads tr").all()
        assert len(rows) == 1 + CONFIG.num_attention_heads
        strongest = token["attention"][CONFIG.num_hidden_layers - 1][2][1] / 10
        assert f"{strongest:.1f}%" in rows[3].text_content() or f"{round(strongest)}%" in rows[3].text_content()
    page.locator("#panel select").select_option("layer 0")
    page.locator("#head-1").click()
    tinted = page.locator("#excerpts .excerpt >> nth=1").locator(".token").evaluate_all(
        "spans => spans.map((s, i) => [i, Number(s.style.getPropertyValue('--amount'))]).filter(([, a]) => a > 0)"
    )  # fmt: skip
    kept = token["attention"][0][0]
    expected_tints = {key: (weight / 1000) ** 0.5 for key, weight in zip(kept[::2], kept[1::2], strict=True)}
    assert dict(map(tuple, tinted)) == pytest.approx(expected_tints, abs=0.002)


def test_by_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = open_page()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('excerpt')"):
            break
    chosen = lambda: page.locator(".token[aria-selected=true]").get_attribute("id")  # noqa: E731
    page.keyboard.press("Home")
    assert chosen() == "t0-0"
    assert "Itself only" not in page.locator("#panel .routes").text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chosen() == "t0-2"
    page.keyboard.press("ArrowDown")
    assert int(chosen().split("-")[1]) > 2
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("End")
    assert chosen() == f"t0-{page.locator('.excerpt >> nth=0').locator('.token').count() - 1}"
    assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == chosen()
    page.locator("#together-map canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#together-map output").text_content().startswith("Experts 0 and 1: ")


def test_tables_show_the_figures(open_page: Callable[..., Any], facts: Any) -> None:
    page = open_page()
    router = facts["routers"][1]
    page.locator("#expert-table select").select_option("layer 2")
    rows = page.locator(".expert-rows tbody tr").all()
    assert len(rows) == CONFIG.n_routed_experts
    mean = sum(router["load"]) / len(router["load"])
    for expert, row in enumerate(rows):
        assert row.locator(".number").first.text_content() == f"{router['load'][expert] / mean:.2f}"
        lifts = [f"{lift:.1f}" if lift is not None else "–" for lift in router["class_lift"][expert]]
        assert [float(cell) for cell in row.locator(".lift").all_text_contents() if cell != "–"] == pytest.approx(
            [float(lift) for lift in lifts if lift != "–"], abs=0.11
        )
        assert row.locator(".telling > span").count() == len(router["telling"][expert])
    rows[3].locator("button").click()
    marked = page.locator(".token").evaluate_all("spans => spans.map(s => s.style.getPropertyValue('--amount'))")
    tokens = [token for excerpt in facts["excerpts"] for token in excerpt["tokens"]]
    assert [float(one) for one in marked] == [float(3 in token["experts"][1]) for token in tokens]

    page.locator("#together-map select").select_option("layer 2")
    page.locator("#together-map canvas").hover(position={"x": 1, "y": 1})
    assert page.locator("#together-map output").text_content() == "Experts 0 and 0: the same expert"
    best = max(ratio for row in router["co_firing"] for ratio in row if ratio is not None)
    assert f"{best:.2f}" in page.locator("#together-map li").first.text_content()
    assert page.locator("#load figure").count() == len(facts["routers"])
    assert f"MaxVio {router['max_violation']:.2f}" in page.locator("#load figcaption").nth(1).text_content()
    assert page.locator(".latents tbody tr").count() == CONFIG.num_hidden_layers
    assert page.locator(".failed tbody tr").count() == len(facts["drafts"][0]["failed"])


def test_markup_is_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    shown = page.locator(".excerpt").first.evaluate(
        "box => [...box.children].slice(1).map(s => s.textContent.replace('↵', '')).join('')"
    )
    assert CODE.startswith(shown) and "onerror" in shown
    assert page.locator("img").count() == 0
    assert "owned" not in page.title() and ATTACK.replace("/", "") in page.locator("h1 + p").text_content()


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_over_the_edge(open_page: Callable[..., Any], width: int, scheme: str) -> None:
    page = open_page(width, color_scheme=scheme)
    page.locator("#t0-30").click()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    sheet, token = page.locator("#panel").bounding_box(), page.locator("#t0-30").bounding_box()
    assert sheet["x"] >= 0 and sheet["x"] + sheet["width"] <= width
    assert token["y"] + token["height"] <= sheet["y"] or token["x"] < sheet["x"], "the panel hides the token"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")


def test_controls_are_labelled(open_page: Callable[..., Any]) -> None:
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
            "button, select, canvas, summary, svg[role], [tabindex]")].filter((one) => {
            const labels = [...(one.labels ?? [])].map((label) => label.textContent).join("");
            return !(one.getAttribute("aria-label") || labels || one.textContent).trim();
        }).map((one) => one.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
