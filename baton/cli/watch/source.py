"""Asks a router's HTTP port for its state. Used on one event loop."""

import ssl
from types import TracebackType
from typing import Self

import httpx
from pydantic import ValidationError

from baton.errors import (
    BatonError,
    FieldViolation,
    InvalidRequestError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from baton.service.settings import ClientSettings
from router.status.snapshot import SNAPSHOT, StatusSnapshot

TIMEOUT_S = 5.0


class StatusSource:
    """One router, over one connection that is opened again where it broke. A context manager."""

    def __init__(self, url: str, settings: ClientSettings) -> None:
        """Raises `InvalidRequestError` for what is no URL, and for certificates that are unusable."""
        self.url = _parsed(url)
        headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=TIMEOUT_S,
            verify=_trust(settings) if self.url.scheme == "https" else False,
            # Which router is asked is for the command line to say, not for a proxy in the environment.
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def fetch(self) -> StatusSnapshot:
        """Raises `UnavailableError` where nobody answers, `UnauthenticatedError` where a key is needed, `PreconditionError` where what
        answers is no router that this version understands.
        """
        return _read(await self.fetch_json())

    async def fetch_json(self) -> bytes:
        """As the router wrote it, and known to be readable. Raises as `fetch`."""
        try:
            answer = await self._client.get(self.url.join("status"))
        except httpx.TimeoutException:
            raise UnavailableError(f"the router at {self.url} does not answer") from None
        except httpx.HTTPError as error:
            raise UnavailableError(f"no router can be reached at {self.url}: {error}") from None
        if answer.status_code != httpx.codes.OK:
            raise _refusal(answer, self.url)
        _read(answer.content)
        return answer.content


def _read(content: bytes) -> StatusSnapshot:
    try:
        return SNAPSHOT.validate_json(content)
    except ValidationError:
        problem = "what answers there is no router whose state this version can read"
        raise PreconditionError(problem) from None


def _refusal(answer: httpx.Response, url: httpx.URL) -> BatonError:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return UnauthenticatedError("the router needs an API key that it knows")
    if answer.status_code == httpx.codes.NOT_FOUND:
        return PreconditionError(f"{url} has no status: is that a router's HTTP port?")
    return UnavailableError(f"the router at {url} answers with HTTP {answer.status_code}")


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise InvalidRequestError(FieldViolation("--url", str(error))) from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise InvalidRequestError(
            FieldViolation("--url", "must be http://HOST:PORT or https://HOST:PORT")
        )
    return parsed.copy_with(path=parsed.path.rstrip("/") + "/")


def _trust(settings: ClientSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.client_ca_file or None)
        if settings.client_cert_file:
            context.load_cert_chain(settings.client_cert_file, settings.client_key_file or None)
    except (OSError, ssl.SSLError) as error:
        problem = f"unusable: {error}"
        raise InvalidRequestError(FieldViolation("client_ca_file", problem)) from None
    return context
