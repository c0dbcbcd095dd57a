"""Where a load is sent: the seam between the runner and the protocols. Everything runs on the run's event loop."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from baton.bench.prompts import Planned
from baton.bench.records import Record

Payload = Any
"""A request as its target has prepared it; opaque to everybody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every request has, whatever the protocol."""

    model: str = ""
    """Empty: the one served."""
    ignore_eos: bool = True
    """Answers are as long as was asked."""
    temperature: float | None = None
    """None leaves it to the server."""
    timeout_s: float = 600.0
    """For each request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """The server, as far as it tells."""

    name: str
    """Address and protocol, for people."""
    model: str
    vocab_size: int | None = None
    max_context_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class Target(Protocol):
    """A server, connected."""

    @property
    def described(self) -> Described:
        """As it was when the connection was made."""

    def prepare(self, planned: Planned) -> Payload:
        """All of a request's cost that can be paid before it is timed. Raises `InvalidRequestError` for what no message can carry."""

    async def send(self, payload: Payload, record: Record) -> None:
        """Sends it and writes what happens into the record, failures too: raises nothing but `asyncio.CancelledError`, which ends the
        request on the server.
        """

    async def __aenter__(self) -> Self:
        """Finds the server. Raises the `BatonError` that says why it cannot be used."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cancels what runs."""
