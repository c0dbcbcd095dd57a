"""Every example of README.md, docs/clients.md and docs/sessions.md does what the page says.

A fence tagged `run` (```python run, ```sh run) is an example; the fence tagged `output` that follows it is what it prints, where `…`
stands for anything within a line. Addresses are those of `baton serve`'s defaults, and of workers as in `addresses`; the test puts the
served ones in their place.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.types import Role
from tests.ports import free_port
from tests.served import Served, served

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    ROOT / page for page in ("README.md", "docs/clients.md", "docs/openai.md", "docs/sessions.md")
)
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}
BOUND_S = 45


@dataclass(frozen=True, slots=True)
class Example:
    """Code, and what it prints."""

    place: str
    language: str
    code: str
    output: str


def examples() -> list[Example]:
    """Fails where code of a language that could be run is no example, or an example has no output."""
    return [example for page in PAGES for example in examples_of(page.name, page.read_text())]


def examples_of(name: str, page: str) -> list[Example]:
    """See `examples`."""
    found, fences = [], [*FENCE.finditer(page)]
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        language, *tags = fence["info"].split() or [""]
        place = f"{name}:{page.count(chr(10), 0, fence.start()) + 1}"
        assert tags == ["run"] or language not in COMMANDS, f"{place} is never run"
        if tags == ["run"]:
            assert after is not None, f"{place} has no output"
            assert after["info"] == "text output", f"{place} has no output"
            found.append(Example(place, language, fence["text"], after["text"]))
    return found


def as_pattern(output: str) -> str:
    """A regular expression for what an example prints."""
    return "[^\n]*".join(re.escape(part) for part in output.rstrip("\n").split("…"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shipped model, and all of `baton serve`'s ports."""
    flags = ("--transport", "memory", "--http", "127.0.0.1:0")
    with served(tmp_path_factory.mktemp("page"), *flags) as running:
        yield running


def addresses(server: Served) -> dict[str, str]:
    """By those on the page: the router's gRPC and HTTP ports, a prefill and a decode worker's, and a free one."""
    http = re.search(r"http://(\S+)/v1", server.output())
    assert http is not None, server.output()
    ((prefill,), (decode,)) = (server.workers(role) for role in (Role.PREFILL, Role.DECODE))
    return {
        "127.0.0.1:50051": server.address,
        "127.0.0.1:8000": http[1],
        "127.0.0.1:50061": prefill.address,
        "127.0.0.1:50062": decode.address,
        "30000": str(free_port()),
    }


@pytest.mark.e2e
@pytest.mark.timeout(180)
@pytest.mark.parametrize("example", examples(), ids=lambda each: each.place)
def test_an_example_prints_what_the_page_says(
    server: Served, example: Example, tmp_path: Path
) -> None:
    code = example.code
    for written, served_at in addresses(server).items():
        code = code.replace(written, served_at)
    tools = str(Path(sys.executable).parent)
    done = subprocess.run(
        [*COMMANDS[example.language], code],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}",
            "PYTHONWARNINGS": "error",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.rstrip("\n")
    assert re.fullmatch(as_pattern(example.output), printed), printed
