"""What happened to each request, as raw as it was seen."""

import time
from dataclasses import dataclass, field

from baton.client.types import Timings

OK = "OK"
UNFINISHED = "UNFINISHED"
"""Cut off by the end of the run, or by Ctrl-C: neither answered nor failed."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request. Its target writes it while the request runs, on the run's event loop; then it does not change. Instants are seconds on
    `time.perf_counter`, as is the run's beginning.
    """

    index: int
    scheduled_s: float
    """When it was due. Closed-loop, when a place was free."""
    sent_s: float = 0.0
    """When the call began."""
    was_sent: bool = False
    chunk_s: list[float] = field(default_factory=list)
    """When each part of the answer arrived that held any of it."""
    chunk_tokens: list[int] = field(default_factory=list)
    """Tokens in each of those; empty where the protocol does not tell."""
    ended_s: float = 0.0
    planned_input_tokens: int | None = None
    planned_output_tokens: int | None = None
    prompt_tokens: int | None = None
    """As the server counted them; as the next two."""
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str = ""
    status: str = UNFINISHED
    """OK, UNFINISHED, a gRPC status, an HTTP status, or what happened to the connection."""
    message: str = ""
    """Of a failure."""
    lost: bool = False
    """It failed for want of a server."""
    request_id: str = ""
    timings: Timings | None = None
    """The server's own; None where the protocol does not tell."""
    workers: list[str] = field(default_factory=list)
    """Of each attempt, as PREFILL>DECODE."""

    def begin(self) -> None:
        """The call begins now."""
        self.sent_s, self.was_sent = time.perf_counter(), True

    def arrived(self, at_s: float, tokens: int | None = None) -> None:
        """A part of the answer is here."""
        self.chunk_s.append(at_s)
        if tokens is not None:
            self.chunk_tokens.append(tokens)

    def failed(self, status: str, message: str, *, lost: bool = False) -> None:
        """The request's end, where it has no good one."""
        self.status, self.message, self.lost = status, message, lost

    @property
    def input_tokens(self) -> int:
        """The server's count, else the planned one."""
        counted = self.planned_input_tokens if self.prompt_tokens is None else self.prompt_tokens
        return counted or 0

    @property
    def output_tokens(self) -> int:
        """The server's count, else what arrived, a part without a number being one token."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return sum(self.chunk_tokens) if self.chunk_tokens else len(self.chunk_s)
