"""The page in a real browser (headless Chromium) on a real server, with a model that repeats one known sentence."""

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page_model import CONFIG, SENTENCE, save_talking_model
from tests.serve.running import running

pytest.importorskip("starlette", reason="the server needs starlette")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]

KEY = "correct-horse"
LONG = "3900"
"""Tokens: some seconds of generation, enough to be stopped in the middle."""


def spoken(tokens: int) -> str:
    """The model's output, at least that many characters of it."""
    return SENTENCE * tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_talking_model(directory)
    return directory


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # What pays depends on the machine; the page shows drafts in any case.
    with running(model, tmp_path_factory.mktemp("log") / "server.txt", "--drafts", "2") as server:
        yield server.address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a window of its own; at the end no page may have logged an error."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def note(message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def open_one(url: str = address, mode: str = "chat", ready: bool = True, **options: Any) -> Any:
        contexts.append(
            browser.new_context(viewport=options.pop("viewport", {"width": 1200, "height": 800}), **options)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(15000)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        if ready:
            page.wait_for_selector("#health.ready")
            page.check(f"#modes input[value={mode}]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


def setting(page: Any, **values: object) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))
    page.evaluate("document.getElementById('settings').open = false")


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def finished(page: Any) -> Any:
    """The last exchange, once it is over."""
    page.wait_for_selector(".exchange:last-child .retry")
    return page.locator(".exchange:last-child")


def answer_text(page: Any) -> str:
    return page.locator(".exchange:last-child .token").evaluate_all("spans => spans.map(s => s.textContent).join('')")


def status(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/fathom/status", timeout=10) as reply:
        return json.load(reply)


def complete(address: str, **body: object) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)["choices"][0]


def wait_until(page: Any, condition: str) -> None:
    """Until a JavaScript expression holds; playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        time.sleep(0.02)


def overflow(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_a_conversation_streams(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.is_visible("#empty")
    setting(page, max_tokens=400)
    say(page, "Hello?")
    lengths = set()
    while page.locator(".retry").count() == 0:
        lengths.add(len(answer_text(page)))
    assert len(lengths) > 3, "the answer was not streamed"
    assert not page.is_visible("#empty")
    assert page.locator(".said").text_content() == "Hello?"
    text = answer_text(page)
    assert text and spoken(400).startswith(text)
    assert page.locator(".token").count() == 400
    assert page.locator(".token.drafted").count() > 50
    footer = finished(page).locator("footer").text_content()
    assert "400 tokens" in footer and "tokens per forward pass" in footer and "max tokens" in footer

    setting(page, max_tokens=5)
    say(page, "And again?")
    finished(page)
    assert page.locator(".exchange").count() == 2
    assert page.locator(".retry").count() == 1


def test_an_answer_is_announced_once_in_sentences(open_page: Callable[..., Any]) -> None:
    page = open_page()
    setting(page, max_tokens=90)
    say(page, "Hello?")
    finished(page)
    lines = page.locator("#spoken p").all_text_contents()
    assert "".join(lines[:-1]) == answer_text(page)
    assert lines[-1] == "End of the answer, 90 tokens."
    assert len(lines) < 20
    assert page.locator("#turns [aria-live], #turns[aria-live]").count() == 0


def test_stop_and_retry(open_page: Callable[..., Any], address: str) -> None:
    page = open_page()
    setting(page, max_tokens=LONG)
    say(page, "Go on")
    wait_until(page, "document.querySelectorAll('.token').length > 20")
    assert page.is_visible("#stop") and not page.is_visible("#send")
    page.click("#stop")
    assert "stopped" in finished(page).locator("footer").text_content()
    count = page.locator(".token").count()
    assert 20 < count < int(LONG)
    deadline = time.monotonic() + 5
    while status(address)["now"]["running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status(address)["now"]["running"] == 0, "the server kept generating"
    setting(page, max_tokens=7)
    page.click(".retry")
    wait_until(page, "document.querySelectorAll('.token').length === 7")
    finished(page)
    assert page.locator(".exchange").count() == 1
    assert page.locator(".said").text_content() == "Go on"


def shown_experts(page: Any) -> list[list[tuple[int, str]]]:
    """What the table says: per layer the experts, each with its weight."""
    rows = page.locator("#token-experts tbody tr").all()
    return [[tuple(pair.split()) for pair in row.locator(".pair").all_text_contents()] for row in rows]


# The browser's own record of a body is not always there once a script has read it as a stream.
LISTEN = """() => {
    const ask = window.fetch
    window.fetch = async (...what) => {
        const reply = await ask(...what)
        if (String(what[0]).endsWith("v1/completions")) window.heard = reply.clone().text()
        return reply
    }
}"""


def test_a_token_shows_what_the_api_says(open_page: Callable[..., Any], address: str) -> None:
    page = open_page(mode="completion")
    setting(page, max_tokens=40, temperature=0)
    page.evaluate(LISTEN)
    say(page, "def f(")
    finished(page)
    lines = page.evaluate("async () => (await window.heard).split('\\n')")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = [token for chunk in chunks for choice in chunk["choices"] for token in choice["fathom"]["tokens"]]
    marked = page.locator(".token").evaluate_all("spans => spans.map(s => s.classList.contains('drafted'))")
    assert marked == [token["drafted"] for token in streamed]
    assert any(marked) and not all(marked)

    facts = {"routing": True, "drafts": True}
    whole = complete(address, prompt="def f(", max_tokens=40, temperature=0, logprobs=5, fathom=facts)
    assert answer_text(page) == whole["text"]
    routing = {entry["index"]: entry for entry in whole["fathom"]["routing"]}
    assert sorted(routing) == list(range(39))
    different = set()
    for place in (0, 3, 11, 38):
        page.locator(".token").nth(place).click()
        ranked = [
            sorted(zip(weights, experts, strict=True), reverse=True)
            for experts, weights in zip(routing[place]["experts"], routing[place]["weights"], strict=True)
        ]
        expected = [[(str(expert), f"{weight:.2f}") for weight, expert in layer] for layer in ranked]
        assert shown_experts(page) == expected
        assert len(expected) == CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace
        different.add(str(expected))
        assert page.locator("#token-place").text_content().startswith(f"{place + 1} of 40")
        assert f"id {whole['fathom']['tokens'][place]['id']}," in page.locator(".token-heading").text_content()
        tops = whole["logprobs"]["top_logprobs"][place]
        assert page.locator(".alternatives li").count() == len(tops)
        assert page.locator(".alternatives .share").first.text_content() == "100%"
        assert page.locator(".alternatives .taken").count() == 1
    assert len(different) == 4, "every token took the same experts"

    page.locator(".token").nth(39).click()
    assert "not been through the model" in page.locator("#token-body").text_content()


def test_experts_under_the_cursor(open_page: Callable[..., Any]) -> None:
    page = open_page(mode="completion")
    setting(page, max_tokens=3)
    say(page, "a")
    finished(page)
    page.locator(".token").first.click()
    weights = {int(expert): weight for expert, weight in shown_experts(page)[1]}
    page.focus("#token canvas")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    for expert in range(CONFIG.n_routed_experts):
        words = page.locator("#token .readout").text_content()
        assert words.startswith(f"Layer 2, expert {expert}: ")
        assert words.endswith("not chosen") == (expert not in weights)
        page.keyboard.press("ArrowRight")


def test_expert_load(open_page: Callable[..., Any], address: str) -> None:
    page = open_page(mode="completion")
    before = status(address)["now"]["load"]
    setting(page, max_tokens=50)
    say(page, "abc")
    finished(page)
    after = status(address)["now"]["load"]
    gained = [[new - old for new, old in zip(*rows, strict=True)] for rows in zip(after, before, strict=True)]
    busiest = [f"expert {row.index(max(row))}: {max(row)}" for row in gained]
    page.locator("#load details").evaluate("details => details.open = true")
    shown = page.locator("#load-table tbody tr td:nth-child(2)")
    cells = (
        "[...document.querySelectorAll('#load-table tbody tr td:nth-child(2)')].map(cell => cell.textContent).join()"
    )
    wait_until(page, f"{cells} === {json.dumps(','.join(busiest))}")
    page.check("input[name=load-since][value=start]")
    assert shown.all_text_contents() == [f"expert {row.index(max(row))}: {max(row):,}" for row in after]
    page.click("#load-reset")
    assert page.locator("#load-note").text_content().startswith("No tokens yet")


def test_cache_is_compared_with_plain_attention(open_page: Callable[..., Any], address: str) -> None:
    page = open_page(mode="completion")
    facts = status(address)["model"]
    layers, heads = CONFIG.num_hidden_layers, CONFIG.num_attention_heads
    per_head = CONFIG.qk_nope_head_dim + CONFIG.qk_rope_head_dim + CONFIG.v_head_dim
    latent = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim
    assert facts["plain_cache_bytes_per_token"] / facts["cache_bytes_per_token"] == heads * per_head / latent
    assert facts["cache_bytes_per_token"] == (layers + 1) * latent * 2  # the drafting module caches too; bfloat16
    assert page.locator("#cache").text_content().count("2 times as much") == 1
    setting(page, max_tokens=LONG)
    say(page, "abc")
    deadline = time.monotonic() + 15
    while not page.evaluate("/^[1-9].* tokens held/.test(document.querySelector('#cache p.quiet').textContent)"):
        assert time.monotonic() < deadline, "no poll of the status saw a running request"
        if page.locator(".exchange:last-child .retry").count():  # it ended between two polls
            say(page, "abc")
        time.sleep(0.02)
    held = int(re.match(r"[\d,]+", page.locator("#cache p.quiet").first.text_content())[0].replace(",", ""))
    assert 0 < held < 4096
    page.keyboard.press("Escape")
    finished(page)


def test_an_error_is_a_sentence_with_a_retry(open_page: Callable[..., Any]) -> None:
    page = open_page(mode="completion")
    setting(page, temperature=-1, max_tokens=6)
    say(page, "abc")
    sentence = finished(page).locator(".error").text_content()
    assert (
        sentence.startswith("The server refused the request: ") and "temperature" in sentence and sentence.endswith(".")
    )
    setting(page, temperature=0)
    page.click(".retry")
    wait_until(page, "document.querySelectorAll('.token').length === 6")
    assert page.locator(".error").count() == 0

    finished(page)
    page.route("**/v1/completions", lambda route: route.abort())
    say(page, "abc")
    assert finished(page).locator(".error").text_content().startswith("The server cannot be reached.")
    page.unroute("**/v1/completions")
    broken = 'data: {"choices": [{"index": 0, "text": "a", "fathom": {"tokens": []}}]}\n\n'
    page.route("**/v1/completions", lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
    page.click(".retry")
    page.wait_for_selector("text=The connection ended before the answer was complete.")


def test_an_unreachable_server_is_reported(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.route("**/fathom/status", lambda route: route.abort())
    page.wait_for_selector("#trouble:not([hidden])")
    assert page.locator("#trouble-words").text_content().startswith("The server cannot be reached.")
    page.unroute("**/fathom/status")
    page.click("#trouble-retry")
    page.wait_for_selector("#trouble", state="hidden")


def test_a_reload_keeps_the_conversation(open_page: Callable[..., Any]) -> None:
    page = open_page(mode="completion")
    setting(page, max_tokens=30, top_k=7)
    say(page, "x = ")
    finished(page)
    page.locator(".token:not(.break):not(:empty)").nth(2).click()
    text, experts = answer_text(page), shown_experts(page)
    page.reload()
    page.wait_for_selector(".exchange")
    assert page.locator(".given").text_content() == "x = "
    assert answer_text(page) == text
    page.locator(".token:not(.break):not(:empty)").nth(2).click()
    assert shown_experts(page) == experts
    assert page.input_value("#set-top_k") == "7"
    page.check("#modes input[value=chat]")
    assert page.locator(".exchange").count() == 0
    page.check("#modes input[value=completion]")
    page.click("#new")
    page.reload()
    page.wait_for_selector("#health.ready")
    assert page.locator(".exchange").count() == 0


def test_an_answer_that_a_reload_cuts_off_counts_as_stopped(open_page: Callable[..., Any]) -> None:
    page = open_page()
    setting(page, max_tokens=LONG)
    say(page, "abc")
    wait_until(page, "document.querySelectorAll('.token').length > 20")
    page.reload()
    assert "stopped" in finished(page).locator("footer").text_content()
    assert page.locator(".token").count() > 20


def test_stored_conversations_are_bounded(open_page: Callable[..., Any]) -> None:
    page = open_page()
    kept = page.evaluate(
        """async () => {
            const { saveExchanges, loadExchanges } = await import("/page/storage.js");
            const took = { experts: [[1, 2]], weights: [[0.1, 0.9]] };
            const token = { id: 1, text: "word", drafted: true, logprob: -1, top: [], ...took };
            const said = { text: "word".repeat(2000), tokens: Array(2000).fill(token), ended: "stop" };
            const exchange = (n) => ({ prompt: `${n}`, ...said });
            saveExchanges("chat", Array.from({ length: 300 }, (_, n) => exchange(n)));
            const kept = loadExchanges("chat");
            return {
                size: localStorage.getItem("fathom.conversation.chat").length,
                prompts: kept.map(({ prompt }) => prompt),
                newest: kept.at(-1).tokens[0].experts,
                oldest: kept[0].tokens.length,
            };
        }"""
    )
    assert kept["size"] < 2_100_000
    assert kept["prompts"][-1] == "299" and kept["prompts"] == sorted(kept["prompts"], key=int)
    assert 10 < len(kept["prompts"]) < 300
    assert kept["newest"] == [[1, 2]]
    assert kept["oldest"] == 0


def test_by_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = open_page(mode="completion")
    setting(page, max_tokens=60)
    page.focus("#prompt")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator(".exchange").count() == 0
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator(".given").text_content() == "one\ntwo"
    assert page.input_value("#prompt") == ""

    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('answer')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    place = lambda: page.locator(".token").evaluate_all("spans => spans.findIndex(s => s.matches('.selected'))")  # noqa: E731
    page.keyboard.press("ArrowRight")
    assert place() == 0
    page.keyboard.press("ArrowRight")
    assert place() == 1
    assert page.locator("#token-place").text_content().startswith("2 of 60")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert place() == 0
    page.keyboard.press("End")
    assert place() == 59
    page.keyboard.press("ArrowUp")
    boxes = page.locator(".token").evaluate_all("spans => spans.map(s => s.getClientRects()[0]?.top ?? null)")
    assert boxes[place()] < boxes[59]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert boxes[place()] > boxes[0]
    page.keyboard.press("Escape")
    assert place() == -1

    setting(page, max_tokens=LONG)
    page.focus("#prompt")
    page.keyboard.type("more")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelectorAll('.exchange:last-child .token').length > 20")
    page.keyboard.press("Escape")
    assert "stopped" in finished(page).locator("footer").text_content()


def test_controls_are_labelled(open_page: Callable[..., Any]) -> None:
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas, summary")].filter((control) => {
            const labels = [...(control.labels ?? [])].map((label) => label.textContent).join("");
            return !(control.getAttribute("aria-label") || labels || control.textContent).trim();
        }).map((control) => control.outerHTML)"""
    )
    assert nameless == []


def luminance(rgb: str) -> float:
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", rgb)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def color(page: Any, name: str) -> str:
    """What a variable of the theme stands for."""
    return page.evaluate(
        """name => {
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.color = `var(${name})`;
            const { color } = getComputedStyle(probe);
            probe.remove();
            return color;
        }""",
        name,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.1) == (scheme == "dark")
    for text in ("--ink", "--quiet", "--one", "--two"):
        for ground in ("--page", "--panel", "--raised"):
            assert contrast(color(page, text), color(page, ground)) >= 4.5, (text, ground)
    assert contrast(color(page, "--on-one"), color(page, "--one")) >= 4.5
    for ink in ("--ink", "--quiet"):
        assert contrast(color(page, ink), color(page, "--one-soft")) >= 4.5, ink
    # Shades go one way in lightness, so that they can be told apart without colour.
    shades = [luminance(color(page, name)) for name in ("--heat-none", "--heat-mean", "--heat-most")]
    assert shades == sorted(shades, reverse=scheme == "light")
    assert contrast(color(page, "--heat-none"), color(page, "--heat-most")) > 7


def test_the_theme_button_overrules_the_system(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark")
    pixels = lambda: page.locator("#load canvas").evaluate("canvas => canvas.toDataURL()")  # noqa: E731
    dark, dark_pixels = color(page, "--page"), pixels()
    page.click("#theme")
    assert luminance(color(page, "--page")) > 0.9
    assert pixels() != dark_pixels, "the heat map kept the old theme's colours"
    page.reload()
    page.wait_for_selector("#health.ready")
    assert luminance(color(page, "--page")) > 0.9
    page.click("#theme")
    assert color(page, "--page") == dark


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_no_horizontal_overflow(open_page: Callable[..., Any], width: int) -> None:
    page = open_page(viewport={"width": width, "height": 740})
    assert overflow(page) == 0
    setting(page, max_tokens=120)
    say(page, "averyveryverylongwordwithoutanyblank" * 9)
    finished(page)
    page.locator("#settings summary").click()
    assert overflow(page) == 0
    assert page.locator("#scroll").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator("#settings summary").click()
    page.locator(".token").nth(5).click()
    assert overflow(page) == 0
    sheet = page.locator("#token").bounding_box()
    token = page.locator(".token.selected").bounding_box()
    assert sheet["x"] >= 0 and sheet["x"] + sheet["width"] <= width
    assert token["y"] + token["height"] <= sheet["y"] or token["x"] < sheet["x"], "the sheet hides the token"
    if width <= 800:
        page.click("#token-close")
        page.click("#show-engine")
        assert overflow(page) == 0
        assert page.is_visible("#load canvas")
        assert page.evaluate("document.activeElement.id") == "hide-engine"
        page.keyboard.press("Escape")
        assert not page.is_visible("#load canvas")


def test_markup_is_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>hi</b>"
    elements = page.locator("body *").count()
    setting(page, max_tokens=40)
    say(page, attack)
    finished(page)
    assert page.locator(".said").text_content() == attack
    assert "<img src=x onerror=\"document.title='owned'\">" in answer_text(page)
    page.reload()
    finished(page)
    page.locator(".token").nth(2).click()
    assert page.locator("img, script:not([src]), #turns b").count() == 0
    assert "owned" not in page.title()
    assert page.locator("body *").count() > elements
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


def test_the_key_dialog(
    open_page: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, tmp_path / "server.txt", "--api-key", KEY) as server:
        page = open_page(server.address, ready=False)
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key[open] >> text=does not accept")
        page.keyboard.press("Escape")
        page.wait_for_selector("#key:not([open])", state="attached")
        page.click("#trouble-retry")
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#health.ready")
        setting(page, max_tokens=5)
        say(page, "abc")
        finished(page)
        assert page.locator(".token").count() == 5
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        page.evaluate("sessionStorage.clear()")
        say(page, "more")
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".exchange:last-child .token >> nth=4")
        assert page.locator(".error").count() == 0
