"""`make constraints`: the versions that the images hold, which are those that the tests ran with.

Writes `constraints.txt`: everything that the router and the workers need, and what that needs in turn, as this environment has it. Torch
itself is left out, with the libraries of a GPU: `pyproject.toml` pins it, and which build of it an image gets is the builder's choice.
"""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.k8s.manifests import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
HEAD = "# Written by `make constraints`; what Dockerfile installs.\n"
EXTRAS = ("worker", "otel")
BUILDERS_CHOICE = ("torch", "triton", "nvidia-", "cuda-")


def requirements() -> list[Requirement]:
    """What the images ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def is_pinned_here(name: str) -> bool:
    """Whether `constraints.txt` is to name it."""
    return not canonicalize_name(name).startswith(BUILDERS_CHOICE)


def _needs(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed distribution needs here, with the extras that were asked of it."""
    for line in distribution(requirement.name).requires or ():
        needed = Requirement(line)
        extras = ["", *requirement.extras]
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
            yield needed


def closure() -> dict[str, str]:
    """Version by canonical name."""
    versions: dict[str, str] = {}
    seen: set[str] = set()
    left = requirements()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            if is_pinned_here(name):
                versions[name] = distribution(name).version
            left += _needs(requirement)
        except PackageNotFoundError:
            continue  # for another platform
    return versions


def main() -> None:
    """Writes the file."""
    lines = [f"{name}=={version}\n" for name, version in sorted(closure().items())]
    CONSTRAINTS.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
