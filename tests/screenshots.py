"""Draws the pictures of docs/images that show a router being watched: the status page, and `baton top`, of a fleet under load.

    python -m tests.screenshots [--out docs/images]

The router, its simulated workers and the browser are real; one decode worker is killed on the way, so that a recovery is to be seen.
"""

import argparse
import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from baton.cli.watch.screen import Top
from baton.cli.watch.source import StatusSource
from baton.service.settings import ClientSettings
from tests.watched import Watched, loaded, until_busy, watched_fleet

CHROMIUM = "/usr/bin/chromium"
WARM_S = 75.0
"""Sparklines of two minutes are to have something to show."""
RECOVERED_MS = 600
TERMINAL = (150, 46)


@contextmanager
def browser() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    with sync_playwright() as playwright:
        # As root, in a container, it has no sandbox.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(page: Page, watched: Watched) -> Page:
    """Shows the status page, with requests on it."""
    page.goto(watched.url)
    page.wait_for_selector("#board:not([hidden]) .row")
    return page


def draw(out: Path) -> None:
    """Writes the pictures into a directory."""
    with watched_fleet() as watched, loaded(watched.router.address, width=9):
        until_busy(watched, 4)
        time.sleep(WARM_S)
        svg = asyncio.run(_top_as_svg(watched))
        with browser() as chromium:
            _draw_page(chromium, watched, out)
            _draw_svg(chromium, svg, out / "top.png")
    for drawn in ("status-light", "status-dark", "status-phone", "top"):
        _shrink(out / f"{drawn}.png")


def _draw_page(chromium: Browser, watched: Watched, out: Path) -> None:
    for scheme in ("dark", "light"):
        context = chromium.new_context(
            viewport={"width": 1240, "height": 1100},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page = open_page(context.new_page(), watched)
        if scheme == "dark":
            watched.stop_busiest()
            failed = page.locator(".row", has=page.locator(".stage-failure")).first
            failed.wait_for()
            page.wait_for_timeout(RECOVERED_MS)
            failed.focus()
        page.wait_for_timeout(1200)
        page.screenshot(path=out / f"status-{scheme}.png")
    context = chromium.new_context(
        viewport={"width": 390, "height": 1180}, is_mobile=True, has_touch=True
    )
    page = open_page(context.new_page(), watched)
    page.screenshot(path=out / "status-phone.png")


async def _top_as_svg(watched: Watched) -> str:
    async with StatusSource(watched.url, ClientSettings()) as source:
        top = Top(source, interval_s=0.5)
        async with top.run_test(size=TERMINAL) as pilot:
            async with asyncio.timeout(10):
                while top.snapshot is None:
                    await pilot.pause(0.1)
            await pilot.pause()
            return top.export_screenshot(title="baton top")


def _draw_svg(chromium: Browser, svg: str, out: Path) -> None:
    """With the fonts that are here."""
    page = chromium.new_page(viewport={"width": 1500, "height": 1000})
    page.set_content(re.sub(r"@font-face\s*{[^}]*}", "", svg))
    page.add_style_tag(content="body { margin: 0 } svg { width: 1400px; display: block }")
    page.locator("svg").first.screenshot(path=out, omit_background=True)


def _shrink(picture: Path) -> None:
    """To as many colours as it needs to look the same, in a third of the bytes."""
    with Image.open(picture) as drawn:
        drawn.convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    draw(parser.parse_args().out)
