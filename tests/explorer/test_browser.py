"""Every page in a real Chromium: typed into, clicked through, and come back to by its address.

MLSAE_CHROMIUM names the browser, if it is not on the path; without one these tests are skipped.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from explorer.conftest import N_LATENTS, N_LAYERS
from explorer.payloads import PAYLOADS, replaced
from mlsae.explorer import Running, open_explorer

CHROMIUM = os.environ.get("MLSAE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; install one or set MLSAE_CHROMIUM")
ANSWERS = {"/prompt": "Tokens", "/logits": "By position", "/steer": "Continuation"}
"""What is on a page once it has been answered."""
TEXT = "the cat sat on a mat"
PAGES = (
    "/overview",
    f"/prompt?text={TEXT}",
    "/latents/3",
    "/search",
    f"/steer?text={TEXT}&edit=3:all:add:2",
    f"/logits?text={TEXT}",
)


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which notes may be made."""
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("browsed") / "run"))


@pytest.fixture(scope="module")
def site(run: Path) -> Iterator[Running]:
    with open_explorer(run) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Running) -> Iterator[Page]:
    """A signed-in tab, in which nothing may be said on the console and nothing may go elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=site.url)
    port = site.url.rpartition(":")[2]
    context.add_cookies([{"name": f"mlsae-{port}", "value": site.token, "url": site.url}])
    page, said, elsewhere = context.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((site.url, "data:", "blob:")) else elsewhere.append(request.url),
    )
    yield page
    context.close()
    assert (said, elsewhere) == ([], [])


def settled(page: Page, path: str) -> None:
    """Go there, and wait until it has drawn."""
    page.goto(path)
    expect(page.locator("html[data-ready]")).to_be_visible()
    page.wait_for_load_state("networkidle")
    expect(page.locator("main > *").first).to_be_visible()
    for name, heading in ANSWERS.items():
        if f"{name}?text=" in path:
            expect(page.get_by_role("heading", name=heading).first).to_be_visible()


# ---- signing in ------------------------------------------------------------------------------------------------------


def test_the_printed_address_signs_in_and_the_token_leaves_the_address(browser: Browser, run: Path):
    with open_explorer(run) as running:
        page = browser.new_page()
        page.goto(running.url)
        expect(page.get_by_role("heading")).to_have_text("Sign in")
        page.goto(f"{running.url}/?token={running.token}")
        assert page.url == f"{running.url}/overview"
        page.close()


# ---- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_draws_without_a_word_on_the_console_and_fits_the_window(page: Page, path: str, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    settled(page, path)
    expect(page.locator("body")).not_to_contain_text("undefined")
    expect(page.locator("body")).not_to_contain_text("NaN")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("path", PAGES)
def test_its_address_shows_a_page_again(page: Page, path: str):
    settled(page, path)
    shown = page.locator("main").inner_text()
    settled(page, page.url)
    again = page.locator("main").inner_text()
    seconds = re.compile(r"[0-9.]+ s\b")
    assert seconds.sub("", again) == seconds.sub("", shown)


def test_a_prompt_is_typed_a_latent_chosen_opened_and_come_back_to(page: Page):
    settled(page, "/prompt")
    page.get_by_role("textbox").first.fill(TEXT)
    page.get_by_role("button", name="Read").click()
    expect(page.get_by_role("heading", name="Tokens")).to_be_visible()
    page.get_by_role("button", name="map").first.click()
    expect(page).to_have_url(re.compile(r"latent=\d+"))
    there = page.url
    latent = int(re.findall(r"latent=(\d+)", there)[0])
    expect(page.get_by_text(f"shaded by latent {latent} ")).to_be_visible()
    shown = page.locator("main").inner_text()
    page.get_by_role("link", name=f"page of latent {latent}").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(f"Latent {latent}")
    page.go_back()
    expect(page).to_have_url(there)
    expect(page.get_by_text(f"shaded by latent {latent} ")).to_be_visible()
    assert page.locator("main").inner_text() == shown


def test_a_latent_is_steered_with_and_the_answer_changes(page: Page):
    settled(page, "/steer")
    page.get_by_role("textbox").first.fill(TEXT)
    page.get_by_role("button", name="Edit a latent").click()
    page.get_by_label("Latent", exact=True).fill("3")
    page.get_by_label("Dose as a number").fill("9")
    with page.expect_response("**/steer.json") as answer:
        page.get_by_role("button", name="Steer", exact=True).click()
    found = answer.value.json()
    assert (found["edits"][0]["latent"], found["edits"][0]["dose"]) == (3, 9)
    assert found["next"]["kl"] > 0
    expect(page.get_by_role("heading", name="Continuation")).to_be_visible()
    assert "edit=3" in page.url


def test_a_search_is_narrowed_sorted_and_opened(page: Page):
    settled(page, "/search")
    row = page.get_by_role("row")
    expect(row.nth(1)).to_be_visible()
    page.get_by_role("columnheader", name=re.compile("events")).get_by_role("button").click()
    expect(page).to_have_url(re.compile("sort=n_events"))
    page.get_by_role("row").nth(1).get_by_role("link").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Latent")


def test_the_heatmap_opens_the_latent_under_the_mouse(page: Page):
    settled(page, "/overview")
    canvas = page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    canvas.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    expect(page).to_have_url(re.compile(r"/latents/\d+"))


def test_the_other_buttons_of_a_mouse_open_nothing(page: Page):
    settled(page, "/overview")
    canvas = page.locator("canvas").first
    for button in ("right", "middle"):
        canvas.click(button=button)
    page.wait_for_timeout(200)
    assert page.url.endswith("/overview")


def test_a_heatmap_that_could_not_be_read_is_asked_for_again(page: Page):
    page.route("**/heatmap.bin*", lambda route: route.fulfill(body=b""))
    page.goto("/overview")
    expect(page.get_by_role("alert")).to_be_visible()
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.locator("canvas").first.hover()
    expect(page.locator(".readout b").first).to_contain_text("latent")


def test_a_note_is_saved_and_is_there_again(page: Page, run: Path):
    settled(page, "/latents/7")
    page.get_by_placeholder(re.compile("What you think")).fill("begins <b>sentences</b>")
    with page.expect_response("**/latents/7/note"):
        page.get_by_role("button", name="Save note").click()
    settled(page, "/latents/7")
    expect(page.get_by_placeholder(re.compile("What you think"))).to_have_value("begins <b>sentences</b>")
    assert json.loads((run / "notes.json").read_text())["notes"]["7"] == "begins <b>sentences</b>"


def test_keys_lead_from_page_to_page(page: Page):
    settled(page, "/overview")
    page.keyboard.press("g")
    page.keyboard.press("s")
    expect(page).to_have_url(re.compile("/search$"))
    settled(page, "/latents/3")
    page.keyboard.press("]")
    expect(page).to_have_url(re.compile("/latents/4$"))
    expect(page.locator("html[data-ready]")).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#go input")).to_be_focused()


def test_a_latent_that_is_not_there_is_refused_in_words(page: Page):
    settled(page, "/overview")
    page.locator("#go input").fill(str(N_LATENTS))
    page.keyboard.press("Enter")
    message = page.locator("#go input").evaluate("(box) => box.validationMessage")
    assert message == f"There is no latent {N_LATENTS}: ids go from 0 to {N_LATENTS - 1}."
    assert page.url.endswith("/overview")


def test_figures_are_saved_as_pictures_and_numbers(page: Page):
    settled(page, "/latents/3")
    for kind, first in (("PNG", b"\x89PNG"), ("CSV", b"layer")):
        with page.expect_download() as saved:
            page.get_by_role("button", name=re.compile(kind)).first.click()
        assert Path(saved.value.path()).read_bytes().startswith(first)


def test_every_layer_is_named_on_the_overview(page: Page):
    settled(page, "/overview")
    rows = page.get_by_role("row").all_inner_texts()
    assert all(any(row.startswith(str(layer)) for row in rows) for layer in range(N_LAYERS))


# ---- no text becomes markup ------------------------------------------------------------------------------------------


ELEMENTS = "[...document.querySelectorAll('*')].map((e) => [e.tagName, ...e.getAttributeNames()].sort().join()).sort()"


@pytest.mark.parametrize("path", PAGES)
def test_no_text_of_any_answer_becomes_an_element(page: Page, path: str):
    dealt = 0

    def elements(payloads: Iterator[str]) -> list[str]:
        def counted() -> Iterator[str]:
            nonlocal dealt
            for payload in payloads:
                dealt += 1
                yield payload

        def hostile(data: str) -> str:
            return json.dumps(replaced(json.loads(data), counted())).replace("<", "\\u003c")

        def answer(route: Any) -> None:
            kept = route.fetch()
            route.fulfill(response=kept, body=hostile(kept.text()))

        def answer_page(route: Any) -> None:
            kept = route.fetch()
            before, data, after = re.split(r'(?<=id="data">)(.*)(?=</script>)', kept.text(), maxsplit=1)
            route.fulfill(response=kept, body=before + hostile(data) + after)

        page.unroute_all()
        page.route(re.compile(r"/(?!progress|training)[^?]*\.json(\?|$)"), answer)
        page.route(re.compile(re.escape(path.partition("?")[0]) + r"(\?|$)"), answer_page)
        settled(page, path)
        return page.evaluate(ELEMENTS)

    benign, dealt, payloads = elements(repeat("benign")), 0, cycle(PAYLOADS)
    while (before := dealt) < len(PAYLOADS):
        assert elements(payloads) == benign
        assert dealt > before
    page.unroute_all()
