"""The status page in a real browser: a loaded fleet in real processes, by keyboard, on a phone, in the dark, and in trouble."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from baton.client import AsyncClient
from baton.errors import BatonError
from baton.service.keys import TenantLimits, add_key, new_key
from tests.screenshots import browser, open_page
from tests.watched import Watched, loaded, until_busy, watched_fleet, watched_router

pytestmark = [pytest.mark.e2e]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def busy() -> Iterator[Watched]:
    """A fleet with live requests and sessions."""
    with watched_fleet() as watched, loaded(watched.router.address):
        until_busy(watched, 4)
        yield watched


OpenPage = Callable[..., Page]


@pytest.fixture
def fresh(chromium: Browser) -> Iterator[OpenPage]:
    """Makes pages that nothing is kept in, and fails for what they complain of or load from elsewhere."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def make(url: str, *, tolerated: str = "^$", **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()

        def on_console(message: Any) -> None:
            is_bad = message.type in {"error", "warning"}
            if is_bad and not re.search(tolerated, message.text):
                problems.append(f"{message.type}: {message.text}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda sent: None if sent.url.startswith(url) else problems.append(sent.url),
        )
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def bars(page: Page, stage: str) -> int:
    return page.locator(f".gantt .stage-{stage}").count()


def test_it_shows_the_fleet_the_requests_and_the_sessions_that_there_are(
    busy: Watched, fresh: OpenPage
) -> None:
    """Promise: every worker, every live request with its stages, every session; nothing logged, nothing from elsewhere."""
    page = open_page(fresh(busy.url), busy)
    status = busy.status()
    assert status.fleet is not None
    shown = page.locator("#fleet tbody th .id").all_inner_texts()
    assert sorted(shown) == sorted(worker.worker_id for worker in status.fleet)
    oldest = status.requests.live[0].request_id
    expect(page.locator(f".row .id:text-matches('^{oldest[:8]}')").first).to_be_visible()
    expect(page.locator("#requests-summary")).to_contain_text("running")
    page.get_by_role("radio", name="2 min").click()
    for stage in ("queue", "prefill", "handoff", "decode"):
        expect(page.locator(f".gantt .stage-{stage}").first).to_be_attached()
    assert page.locator("#sessions tbody tr").count() == len(status.sessions.recent)
    assert page.locator("#fleet .kv").first.get_attribute("aria-label") is not None
    expect(page.locator(".tile .value").first).to_have_text(re.compile(r"\d"))
    expect(page.locator("#connection-text")).to_have_text("Live")


def test_a_workers_death_shows_in_the_requests_that_it_hit(busy: Watched, fresh: OpenPage) -> None:
    """Promise: the failed attempt with its reason, in the row's details; the worker is gone from the fleet."""
    page = open_page(fresh(busy.url), busy)
    killed = busy.stop_busiest()
    hit = page.locator(".row", has=page.locator(".stage-failure")).first
    hit.wait_for(state="attached")
    hit.focus()
    expect(page.locator("#details")).to_contain_text(f"→ {killed}")
    expect(page.locator("#details .problem").first).to_contain_text("UNAVAILABLE")
    names = page.locator("#fleet tbody th .id")
    expect(names.filter(has_text=re.compile(f"^{killed}$"))).to_have_count(0)


def test_everything_is_within_reach_of_the_keyboard(busy: Watched, fresh: OpenPage) -> None:
    """Promise: Tab goes skip link, colours, time shown, requests; arrows go on within; focus is visible and survives new data."""
    page = open_page(fresh(busy.url, color_scheme="light"), busy)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#theme")).to_be_focused()
    outline = page.locator("#theme").evaluate("each => getComputedStyle(each).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Space")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="2 min")).to_have_attribute("aria-checked", "true")
    page.keyboard.press("Tab")
    focused = page.locator(".row:focus")
    expect(focused).to_have_count(1)
    page.keyboard.press("ArrowDown")
    expect(page.locator("#details")).to_be_visible()
    name = focused.get_attribute("data-key")
    with page.expect_response("**/status"):
        pass
    assert page.locator(".row:focus").get_attribute("data-key") == name
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()


def test_the_focus_goes_with_the_row_that_has_it(busy: Watched, fresh: OpenPage) -> None:
    """Promise: wherever new data puts a row, the keyboard stays on it."""
    page = open_page(fresh(busy.url), busy)
    focused = page.evaluate(
        """async (url) => {
          const { reconcile } = await import(url);
          const parent = document.body.appendChild(document.createElement("div"));
          const make = () => document.createElement("button");
          const draw = (names) => reconcile(parent, names, { key: (name) => name, make, update: () => {} });
          draw(["a", "b", "c"]);
          parent.children[1].focus();
          return [["b", "a", "c"], ["a", "c", "b"], ["d", "b"], ["c"]].map((names) => {
            draw(names);
            return document.activeElement.dataset.key ?? "";
          });
        }""",
        f"{busy.url}/page/dom.js",
    )
    assert focused == ["b", "b", "b", ""]


def test_requests_without_an_id_have_one_row_each(fresh: OpenPage) -> None:
    """Promise: also those that were received, and refused, at one moment; new data adds none."""
    many = 4
    with watched_router(BATON_WORKER_WAIT_S="0.2") as watched:
        # Playwright's loop runs in this thread.
        asking = threading.Thread(
            target=lambda: asyncio.run(_ask_in_vain(watched.router.address, many))
        )
        asking.start()
        asking.join(20)
        page = open_page(fresh(watched.url), watched)
        ids = page.locator(".row .id")
        expect(ids).to_have_text(["not read yet"] * many)
        for _ in range(2):
            with page.expect_response("**/status"):
                pass
        page.wait_for_timeout(100)
        expect(ids).to_have_count(many)
        # The router's end would cut the next answer off.
        page.close()


async def _ask_in_vain(address: str, times: int) -> None:
    async with AsyncClient(address) as client:
        # No worker has joined, so that nobody has read them when they are refused.
        asked = [client.complete([1]) for _ in range(times)]
        failures = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(failure, BatonError) for failure in failures)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_need_no_scrolling_sideways(
    busy: Watched, fresh: OpenPage, width: int
) -> None:
    page = open_page(fresh(busy.url, viewport={"width": width, "height": 800}), busy)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#fleet tbody tr", ".row", "#sessions tbody tr", ".tile"):
        box = page.locator(selector).first.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= width


def test_the_systems_dark_colours_are_followed(busy: Watched, fresh: OpenPage) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(fresh(busy.url, color_scheme=scheme), busy)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in re.findall(r"\d+", ground)[:3]))
    assert grounds[0] > 600
    assert grounds[1] < 150


def test_an_idle_router_is_told_in_words_and_a_dead_one_too(fresh: OpenPage) -> None:
    """Promise: empty states say what to do; a router that dies is told of, asked less often, and found again by itself."""
    with watched_router() as watched:
        page = fresh(watched.url, tolerated="Failed to load resource")
        page.goto(watched.url)
        for text in (
            "No worker has joined yet.",
            "No request has come yet.",
            "No session had a turn",
        ):
            expect(page.get_by_text(text)).to_be_visible()
        watched.router.end()
        expect(page.locator("#banner")).to_contain_text("Next try in", timeout=10_000)
        expect(page.locator("#connection-text")).to_have_text("Not connected")
        expect(page.locator("#board")).to_have_class(re.compile("stale"))
        watched.router.start()
        page.get_by_role("button", name="Try now").click()
        expect(page.locator("#connection-text")).to_have_text("Live", timeout=20_000)
        expect(page.locator("#banner")).to_be_hidden()


def test_it_asks_only_while_somebody_looks(fresh: OpenPage) -> None:
    """Promise: a hidden page sends nothing; once it is looked at, it asks at once."""
    with watched_router() as watched:
        page = fresh(watched.url)
        asked: list[str] = []
        page.on("request", lambda sent: asked.append(sent.url))
        page.add_init_script(
            "Object.defineProperty(document, 'hidden', { get: () => window.isAway === true })"
        )
        page.goto(watched.url)
        expect(page.locator("#connection-text")).to_have_text("Live")
        turn = "away => { window.isAway = away; document.dispatchEvent(new Event('visibilitychange')) }"
        page.evaluate(turn, arg=True)
        page.wait_for_timeout(300)
        before = len(asked)
        page.wait_for_timeout(1500)
        assert len(asked) == before
        with page.expect_response("**/status", timeout=700):
            page.evaluate(turn, arg=False)
        # The router's end would cut the next answer off.
        page.close()


def test_a_key_is_asked_for_and_stays_in_the_tab(tmp_path: Path, fresh: OpenPage) -> None:
    """Promise: a wrong key is told; a tenant's shows no fleet; it is in sessionStorage only, and can be forgotten."""
    file = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(file, entry)
    with watched_router(BATON_API_KEYS_FILE=file, BATON_FLEET_LISTEN="127.0.0.1:0") as watched:
        page = fresh(watched.url, tolerated="401")
        page.goto(watched.url)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator("#board")).to_be_hidden()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_contain_text("does not know this key")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text("tenant acme")
        expect(page.locator("#fleet")).to_be_hidden()
        stored = page.evaluate("[{ ...sessionStorage }, { ...localStorage }, document.cookie]")
        assert stored == [{"baton-key": key}, {}, ""]
        page.get_by_role("button", name="Forget key").click()
        expect(page.get_by_label("API key")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
