"""`baton top` on a terminal that is not there: textual's pilot presses the keys, and a router as it is shipped answers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

from baton.cli.watch.screen import Top
from baton.cli.watch.source import StatusSource
from baton.errors import InvalidRequestError, PreconditionError
from baton.service.settings import ClientSettings
from tests.integration.http_house import HttpHouse, http_house
from tests.integration.router_fakes import request
from tests.integration.sim_house import prompt_of

SIZE = (150, 46)
MANY = 4


@asynccontextmanager
async def watching(here: HttpHouse) -> AsyncIterator[tuple[Top, Pilot[None]]]:
    """The screen, once it has drawn the router's state."""
    url = f"http://127.0.0.1:{here.port}"
    async with StatusSource(url, ClientSettings()) as source:
        top = Top(source, interval_s=0.2)
        async with top.run_test(size=SIZE) as pilot:
            await until(pilot, lambda: top.snapshot is not None)
            yield top, pilot


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await pilot.pause(0.02)


def shown(top: Top, name: str) -> list[list[str]]:
    table = top.query_one(f"#{name}", DataTable)
    return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)]


def text(top: Top, name: str) -> str:
    return str(top.query_one(name, Static).render())


async def test_it_shows_workers_requests_and_latencies() -> None:
    """Promise: a row for each worker and request, KV bars, and sparklines once a second is over."""
    async with http_house(2, 1) as here:
        await here.house.generate(1, request_id="seen")
        async with watching(here) as (top, pilot):
            await until(pilot, lambda: text(top, "#itl .figure").find("p99") > 0)
            roles = [row[0] for row in shown(top, "fleet")]
            assert roles == ["prefill", "prefill", "decode"]
            # On a busy machine a heartbeat may come late.
            await until(pilot, lambda: {row[2] for row in shown(top, "fleet")} == {"● ready"})
            (told,) = shown(top, "requests")
            assert told[:2] == ["seen", "✓ finished"]
            assert told[6] == "12"
            assert sum(top.query_one("#output Sparkline", Sparkline).data or []) == 12
            assert "live" in text(top, "#about")
            assert set(shown(top, "fleet")[2][6]) <= set("█▪·")


async def test_keys_sort_the_table_that_has_the_focus_and_the_cursor_stays_on_its_row() -> None:
    async with http_house(0, 1) as here:
        for number, length in enumerate((90, 30, 60)):
            asked = request(prompt=prompt_of(number, length), request_id=f"r{number}")
            async for _ in here.house.inference.Generate(asked, timeout=20):
                pass
        async with watching(here) as (top, pilot):
            await until(pilot, lambda: len(shown(top, "requests")) == 3)

            def order() -> list[str]:
                return [row[0] for row in shown(top, "requests")]

            assert order() == ["r2", "r1", "r0"]
            await pilot.press("down")
            for _ in range(6):
                await pilot.press("s")
            assert order() == ["r1", "r2", "r0"], "by the length of the prompt"
            await pilot.press("r")
            assert order() == ["r0", "r2", "r1"]
            table = top.query_one("#requests", DataTable)
            assert table.cursor_row == 2, "r1, on which it was"
            await pilot.press("1", "s")
            assert order() == ["r0", "r2", "r1"], "another table's key"
            await pilot.click("#requests", offset=(3, 1))
            assert order() == ["r0", "r1", "r2"], "by the heading that was clicked"


async def test_requests_without_an_id_have_rows_of_their_own() -> None:
    """Promise: also those that were received, and refused, at one moment."""
    async with http_house(0, 1) as here:
        refused = [here.house.generate(1, min_p=7.0) for _ in range(MANY)]
        await asyncio.gather(*refused, return_exceptions=True)
        async with watching(here) as (top, pilot):
            await until(pilot, lambda: len(shown(top, "requests")) == MANY)
            assert {row[0] for row in shown(top, "requests")} == {"-"}
            before = top.snapshot
            await until(pilot, lambda: top.snapshot is not before)
            assert len(shown(top, "requests")) == MANY


async def test_a_pause_stands_still_and_colours_turn() -> None:
    async with http_house(0, 1) as here, watching(here) as (top, pilot):
        await pilot.press("p", "d")
        assert "paused" in text(top, "#about")
        assert top.theme == "textual-light"
        before = top.snapshot
        await here.house.generate(1)
        await pilot.pause(0.5)
        assert top.snapshot is before
        await pilot.press("p")
        await until(pilot, lambda: bool(shown(top, "requests")))


async def test_a_router_that_goes_away_is_told_of_and_found_again() -> None:
    """Promise: no traceback and no end; what was seen last stays, with the reason above it."""
    async with http_house(0, 1) as here, watching(here) as (top, pilot):
        port = here.port
        await until(pilot, lambda: len(shown(top, "fleet")) == 1)
        await here.front.stop()
        await until(pilot, lambda: bool(top.query_one("#problem").display))
        assert "no router can be reached" in text(top, "#problem")
        assert "not connected" in text(top, "#about")
        assert len(shown(top, "fleet")) == 1
        here.front._port = port
        await here.front.start()
        await until(pilot, lambda: not top.query_one("#problem").display)
        assert "live" in text(top, "#about")


async def test_what_is_no_router_and_what_is_no_url_are_told_apart() -> None:
    async with http_house(0, 0) as here:
        url = f"http://127.0.0.1:{here.port}/health/"
        async with StatusSource(url, ClientSettings()) as source:
            with pytest.raises(PreconditionError, match="has no status"):
                await source.fetch()
    for wrong in ("ftp://somewhere", "http://", "http://[::1"):
        with pytest.raises(InvalidRequestError, match="--url"):
            StatusSource(wrong, ClientSettings())
