"""The page in a real browser: Debian's Chromium, driven by Playwright.

Two servers: `motley serve` with a small model trained here to think before it answers, and a scripted one
that says what no model can be made to say on demand (attacks, refusals, a broken connection).
"""

import gzip
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Dialog, Locator, Page, expect, sync_playwright
from scripted_server import PAGES, Script, ScriptedServer
from thinking_model import ANSWER, ENDLESS, QUESTION, THINKING

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ATTACKS = json.loads((Path(__file__).parent / "xss_corpus.json").read_text(encoding="utf-8"))

ABOUT = {
    "model": "scripted",
    "parameters": 3_000_000,
    "active_parameters": 1_000_000,
    "context_length": 1024,
    "about": ["It only says what a script tells it."],
    "prompts": [
        {"family": "chain_sum", "text": "What is 2 + 3?"},
        {"family": "number_sorting", "text": "Sort 3, 1, 2."},
    ],
    "accuracy": {
        "accuracy": 0.784,
        "standard_error": 0.018,
        "count": 512,
        "families": {"chain_sum": {"accuracy": 0.9, "standard_error": 0.02, "count": 256}},
    },
    "defaults": {"temperature": 0.0, "max_tokens": 200},
}
SCRIPTS = {
    "What is 2 + 3?": Script(["Two and ", "three: ", "2 + 3 = 5."], ["The answer is ", "**5**.\n\n", "- sure\n"], 0.05),
    "Talk for ever": Script(["Hm. "], [f"word{n} " for n in range(2000)], 0.02),
    "Think for ever": Script([f"thought{n} " for n in range(2000)], ["never"], 0.02),
    "Think long": Script([f"step{n} " for n in range(300)], ["At last."]),
    "Stop in the middle": Script([], ["This is only half of"], breaks=True),
    "Too long": Script(refuses=(400, "This is longer than the model can read; start a new chat.")),
    "Cut short": Script([], ["one two"], finish="length"),
    "Attack": Script(["<img src=x onerror=alert(1)> ", *ATTACKS], [f"{attack}\n\n" for attack in ATTACKS]),
}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scripted(chromium: str) -> Iterator[ScriptedServer]:
    assert (PAGES / "index.html").is_file(), "the pages are not built: run `python hatch_build.py`"
    with ScriptedServer(ABOUT, SCRIPTS).running() as server:
        yield server


@pytest.fixture(scope="module")
def real(chromium: str, thinking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `motley serve` with a model that was trained a moment ago."""
    folder = thinking_model
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "motley", "serve", str(folder), "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 120
        while not answers_at(address):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers_at(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "api/about", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def opened(browser: Browser, address: str, expected_errors: str = "$.", **options: object) -> Iterator[Page]:
    """The page at `address`; at the end, no other origin was asked and the console holds no error."""
    with browser.new_context(**options) as context:  # type: ignore[arg-type]
        page = context.new_page()
        asked: list[str] = []
        said: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            said.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda line: said.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", dismiss)
        page.set_default_timeout(15_000)
        page.goto(address)
        yield page
        origin = urlsplit(address).netloc
        assert [url for url in asked if urlsplit(url).netloc != origin] == []
        assert [text for text in said if not re.search(expected_errors, text)] == []


def ask(page: Page, question: str) -> None:
    field = page.get_by_role("textbox", name="Your message")
    field.fill(question)
    field.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.answer")


def test_a_question_typed_into_motley_serve_is_answered_with_visible_thinking(browser: Browser, real: str) -> None:
    with opened(browser, real) as page:
        expect(page.get_by_text("It learned two questions by heart")).to_be_visible()
        ask(page, QUESTION)
        expect(answers(page).locator("footer")).to_contain_text("tokens/s")
        expect(answers(page).locator(".markdown")).to_have_text(ANSWER.replace("*", ""))
        expect(answers(page).locator("strong")).to_have_text("5")
        expect(page.get_by_role("button", name="Thought for")).to_be_visible()
        expect(page.get_by_text(THINKING)).to_be_visible()
        page.get_by_role("button", name="Think", exact=True).click()
        ask(page, QUESTION)
        second = answers(page).nth(1)
        expect(second.locator(".markdown")).to_have_text(ANSWER.replace("*", ""))
        expect(second.get_by_role("button", name="Thought")).to_have_count(0)


def test_stopping_motley_serve_makes_room_for_the_next_question(browser: Browser, real: str) -> None:
    with opened(browser, real) as page:
        ask(page, ENDLESS)
        expect(page.get_by_text("on and on and on")).to_be_visible()
        page.get_by_role("button", name="Stop").click()
        expect(answers(page).get_by_text("Stopped.")).to_be_visible()
        ask(page, QUESTION)
        expect(answers(page).nth(1).locator(".markdown")).to_have_text(ANSWER.replace("*", ""))


def test_motley_serve_sends_the_page_with_a_strict_policy(real: str) -> None:
    with urllib.request.urlopen(real) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy


def test_short_thinking_stays_in_sight_and_folds_away_when_asked(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        ask(page, "What is 2 + 3?")
        thinking = page.get_by_role("button", name="Thinking…")
        expect(thinking).to_have_attribute("aria-expanded", "true")  # open while it streams
        expect(page.get_by_text("Two and three: 2 + 3 = 5.")).to_be_visible()
        expect(answers(page).get_by_text("The answer is 5.")).to_be_visible()
        thought = page.get_by_role("button", name=re.compile(r"Thought for \d+\.\d+\ss"))
        expect(thought).to_have_attribute("aria-expanded", "true")
        expect(answers(page).locator("strong")).to_have_text("5")
        expect(answers(page).locator("footer")).to_contain_text(re.compile(r"6\stokens · \d+(\.\d)?\stokens/s"))
        thought.click()
        expect(page.get_by_text("Two and three: 2 + 3 = 5.")).to_be_hidden()
        sent = scripted.requests[-1]
        assert (sent["temperature"], sent["max_tokens"], sent["thinking"]) == (0, 200, {"type": "enabled"})


def test_long_thinking_folds_away_when_done(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        ask(page, "Think long")
        expect(answers(page).get_by_text("At last.")).to_be_visible()
        thought = page.get_by_role("button", name="Thought for")
        expect(thought).to_have_attribute("aria-expanded", "false")
        thought.click()
        expect(page.get_by_text("step299")).to_be_visible()


def test_the_first_sight_says_what_the_model_can_do_and_offers_prompts(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with opened(browser, scripted.address) as page:
        expect(page).to_have_title("scripted · motley")
        expect(page.get_by_text("It only says what a script tells it.")).to_be_visible()
        expect(page.get_by_text(re.compile(r"78\.4 ± 1\.8\s%"))).to_be_visible()
        expect(page.get_by_text("of 512 fresh problems")).to_be_visible()
        expect(page.get_by_role("region", name="Number sorting")).to_be_visible()
        page.get_by_role("region", name="Chain sum").get_by_role("button", name="What is 2 + 3?").click()
        expect(answers(page).get_by_text("The answer is 5.")).to_be_visible()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_frees_the_server_and_keeps_what_was_said(
    browser: Browser, scripted: ScriptedServer, how: str
) -> None:
    scripted.hung_up.clear()
    with opened(browser, scripted.address) as page:
        ask(page, "Talk for ever")
        expect(answers(page).get_by_text("word9")).to_be_visible()
        page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
        expect(answers(page).get_by_text("Stopped.")).to_be_visible()
        assert scripted.hung_up.wait(timeout=10), "the server still streams to nobody"
        expect(answers(page).get_by_text("word9")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_stopped_thinking_stays_in_sight_and_one_can_ask_again(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        ask(page, "Think for ever")
        expect(page.get_by_text("thought5")).to_be_visible()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Thinking was stopped")).to_be_visible()
        expect(page.get_by_text("thought5")).to_be_visible()
        asked = len(scripted.requests)
        page.get_by_role("button", name="Answer again").click()
        expect(page.get_by_role("button", name="Thinking…")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Thinking was stopped")).to_be_visible()
        assert len(scripted.requests) == asked + 1
        assert scripted.requests[-1]["messages"] == [{"role": "user", "content": "Think for ever"}]


def test_earlier_answers_are_sent_along_without_their_thinking(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        ask(page, "What is 2 + 3?")
        expect(answers(page).locator("footer")).to_be_visible()
        page.get_by_role("button", name="Think", exact=True).click()
        ask(page, "Cut short")
        expect(answers(page).get_by_text("Cut at the limit of 200 tokens")).to_be_visible()
        sent = scripted.requests[-1]
        assert sent["thinking"] == {"type": "disabled"}
        assert [message["content"] for message in sent["messages"]] == [
            "What is 2 + 3?",
            "The answer is **5**.\n\n- sure\n",
            "Cut short",
        ]
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Send earlier messages along").uncheck()
        page.get_by_label("Longest answer, in tokens").fill("77")
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Answer again").click()
        expect(answers(page).get_by_text("Cut at the limit of 77 tokens")).to_be_visible()
        assert scripted.requests[-1]["messages"] == [{"role": "user", "content": "Cut short"}]
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_text("It only says what a script tells it.")).to_be_visible()
        expect(answers(page)).to_have_count(0)


def test_failures_are_said_in_one_sentence(browser: Browser, scripted: ScriptedServer) -> None:
    # the browser itself notes the refused and the broken request in its console
    with opened(browser, scripted.address, expected_errors="status of 400|ERR_INCOMPLETE_CHUNKED") as page:
        ask(page, "Too long")
        expect(answers(page).get_by_text("longer than the model can read; start a new chat.")).to_be_visible()
        ask(page, "Stop in the middle")
        expect(answers(page).get_by_text("This is only half of")).to_be_visible()
        expect(answers(page).get_by_text("The connection broke before the answer was complete")).to_be_visible()


def test_a_server_that_is_gone_is_named(browser: Browser) -> None:
    with ScriptedServer(ABOUT, SCRIPTS).running() as server, browser.new_page() as page:
        page.goto(server.address)
        expect(page.get_by_text("It only says")).to_be_visible()
        page.context.set_offline(True)
        ask(page, "What is 2 + 3?")
        expect(answers(page).get_by_text("The server cannot be reached")).to_be_visible()


def test_attacks_in_an_answer_are_inert(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        ask(page, "Attack")
        expect(answers(page).locator("footer")).to_be_visible()
        page.get_by_role("button", name="Thought for").click()
        expect(page.locator(".thoughts")).to_contain_text("<img src=x onerror=alert(1)>")
        made = page.locator(".markdown *")
        assert made.count() > len(ATTACKS)
        tags = set(made.evaluate_all("nodes => nodes.map(node => node.tagName)"))
        assert not tags & {
            "SCRIPT",
            "IMG",
            "SVG",
            "IFRAME",
            "STYLE",
            "FORM",
            "INPUT",
            "OBJECT",
            "EMBED",
            "BASE",
            "META",
        }
        names = set(made.evaluate_all("nodes => nodes.flatMap(node => node.getAttributeNames())"))
        assert names <= {"class", "href", "target", "rel", "start", "align"}
        links = answers(page).locator(".markdown a[href]")
        assert links.count() > 3
        for link in links.all():
            assert re.match(r"https?://|mailto:", link.get_attribute("href") or "")
            assert link.get_attribute("rel") == "noopener noreferrer"
        expect(links.filter(has_text="Image, not loaded").first).to_be_visible()
        # pointing at a link must wake nothing either: `opened` sees every dialog and request
        for link in links.all():
            link.hover(force=True)


def test_everything_one_can_operate_has_a_name_and_works_by_keyboard(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with opened(browser, scripted.address) as page:
        field = page.get_by_role("textbox", name="Your message")
        expect(field).to_be_focused()
        field.press_sequentially("What is")
        field.press("Shift+Enter")
        expect(field).to_have_value("What is\n")
        field.press("Control+a")
        field.press_sequentially("What is 2 + 3?")
        field.press("Enter")
        expect(answers(page).locator("footer")).to_be_visible()
        expect(field).to_be_focused()
        expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")
        spoken = page.get_by_role("log", name="Answering")
        expect(spoken).to_have_attribute("aria-live", "polite")
        expect(spoken.locator("p").first).to_have_text("The answer is 5.")
        page.get_by_role("button", name="Settings").press("Enter")
        for view in (page.get_by_role("dialog", name="Settings"), page.locator(".page")):
            snapshot = view.aria_snapshot()
            operable = re.findall(r"- (button|textbox|slider|checkbox|spinbutton|link)\b(.*)", snapshot)
            assert operable
            for role, rest in operable:
                assert re.match(r' "[^"]+"', rest), f"a {role} without a name: {snapshot}"
            if page.get_by_role("dialog").count():
                page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_colour_schemes(browser: Browser, scripted: ScriptedServer, scheme: str) -> None:
    options = {
        "viewport": {"width": 360, "height": 640},
        "color_scheme": scheme,
        "is_mobile": True,
        "has_touch": True,
    }
    with opened(browser, scripted.address, **options) as page:
        for _ in range(2):
            width = page.locator("html").evaluate("node => [node.scrollWidth, node.clientWidth]")
            assert width[0] <= width[1]
            main = page.locator("main").evaluate("node => [node.scrollWidth, node.clientWidth]")
            assert main[0] <= main[1]
            background = page.locator("html").evaluate("node => getComputedStyle(node).backgroundColor")
            brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3]) / 3
            assert (brightness > 128) == (scheme == "light")
            ask(page, "What is 2 + 3?")
            expect(answers(page).locator("footer")).to_be_visible()


def test_the_first_load_is_under_200_kilobytes_compressed(browser: Browser, scripted: ScriptedServer) -> None:
    with opened(browser, scripted.address) as page:
        expect(page.get_by_text("It only says")).to_be_visible()
    files = [file for file in PAGES.rglob("*") if file.is_file()]  # all of them: nothing is loaded later
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) < 200_000
