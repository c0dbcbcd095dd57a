"""The doors of the repository: what the Makefile, CI and the command line promise to a newcomer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton import __version__
from baton.cli.app import app

ROOT = Path(__file__).parents[2]
COMMANDS = ("serve", "generate", "chat", "demo", "fleet", "bench", "top")
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}


def make(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *args], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )


def invoke(*args: str) -> str:
    result = CliRunner().invoke(app, args, env=PLAIN)
    assert result.exit_code == 0, result.output
    return result.output


def test_make_without_a_target_teaches() -> None:
    done = make()
    assert done.returncode == 0
    for target in ("demo", "serve", "test", "presubmit", "bench", "protos", "fmt"):
        assert f"make {target} " in done.stdout


def test_the_demo_needs_no_development_tools(tmp_path: Path) -> None:
    plan = make("--dry-run", f"VENV={tmp_path / 'env'}", "demo").stdout
    assert "[worker]" in plan
    assert "torch==" in plan
    assert "--group dev" not in plan


def test_installing_is_done_once(tmp_path: Path) -> None:
    env = tmp_path / "env"
    env.mkdir()
    for stamp in (".pip", ".worker", ".dev", ".checkov"):
        (env / stamp).touch()
    assert "pip install" not in make("--dry-run", f"VENV={env}", "test").stdout


def test_make_test_runs_every_check_and_pytest_last(tmp_path: Path) -> None:
    plan = make("--dry-run", f"VENV={tmp_path}", "test").stdout
    steps = ("ruff check", "mypy", "lint-imports", "codespell", "buf lint", "diff -r", "pytest")
    places = [plan.rindex(step) for step in steps]
    assert places == sorted(places)


def test_ci_runs_make_test_and_stops_at_the_first_error() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_told() -> None:
    assert invoke("--version").strip() == f"baton {__version__}"


def test_help_names_every_command() -> None:
    text = invoke("--help")
    for command in COMMANDS:
        assert f" {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    text = invoke(command, "--help")
    assert "Examples" in text
    assert re.search(rf"baton {command}", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    """An option whose help is empty ends its line after its type."""
    for line in invoke(command, "--help").splitlines():
        body = line.strip(" │")
        if body.startswith("--") or re.match(r"-\w ", body):
            assert re.search(r"(  |\] )\S+( \S+)+", body), line


def test_the_command_line_starts_without_torch_and_ray() -> None:
    """Promise: `baton generate` answers at once, from the base install."""
    code = "import sys, baton.cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


def test_the_readme_shows_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^\s*\$? ?baton (\w+)", text, re.MULTILINE))
    assert shown
    assert shown <= set(COMMANDS)
    targets = set(re.findall(r"^\s*\$? ?make (\w+)", text, re.MULTILINE))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets <= known


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert len(documents) >= 8
    for document in documents:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
