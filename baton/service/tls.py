"""Certificates: what a port shows, what it asks of its callers, and what this process shows to those it calls. Files may be replaced
while the process runs; new handshakes use the new ones.

Every pair is tried by Python's own TLS first, so that an unusable file is an error with a name at the start, and later one line in
the log while the old pair stays in force.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc

from baton.errors import FieldViolation, InvalidRequestError
from baton.service.reload import Reloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files; empty is none. A key without a certificate, or the other way round, is refused."""

    cert: str = ""
    """Of this process, with what chains it to its root."""
    key: str = ""
    ca: str = ""
    """Whom this process trusts. On a port: whose certificates callers must show; empty: they need not show any."""


@dataclass(frozen=True, slots=True)
class _Pem:
    """The files' contents; None for those that are none."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For a port. Raises `InvalidRequestError` naming what is unusable. gRPC asks for the files' state at each handshake, on threads
    of its own.
    """
    source = _reloaded(files)
    mutual = bool(files.ca)

    def configuration() -> grpc.ServerCertificateConfiguration:
        pem = source.value
        assert pem.key is not None
        assert pem.cert is not None
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=mutual
    )


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For a port that is not gRPC's. Raises `InvalidRequestError` naming what is unusable. New handshakes use the files as they are."""
    source = Reloaded(_paths(files), lambda: _server_context(files))

    def use_latest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _: object) -> None:
        connection.context = source.value

    # Called for every handshake, also where the client names nobody.
    context = _server_context(files)
    context.sni_callback = use_latest
    return context


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """With the files as they are now; without a CA, the system's are trusted. Raises `InvalidRequestError`."""
    return _credentials(_load(files))


class ChannelCertificates:
    """Credentials for channels, by the files as they are when a channel is opened."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises `InvalidRequestError`."""
        self._source = _reloaded(files)

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """As of now."""
        return _credentials(self._source.value)

    @property
    def version(self) -> int:
        """Another number after every change of the files."""
        return self._source.versioned[1]


def _credentials(pem: _Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


def _reloaded(files: TlsFiles) -> Reloaded[_Pem]:
    return Reloaded(_paths(files), lambda: _load(files))


def _paths(files: TlsFiles) -> list[str]:
    return [path for path in (files.cert, files.key, files.ca) if path]


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    _load(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key, password=_no_password)
    if files.ca:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["http/1.1"])
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For HTTPS clients, with the files as they are now; without a CA, the system's are trusted. Raises `InvalidRequestError`."""
    context = _loaded(files)
    if not files.ca:
        context.load_default_certs()
    return context


def _load(files: TlsFiles) -> _Pem:
    _loaded(files)
    return _Pem(_read(files.cert), _read(files.key), _read(files.ca))


def _loaded(files: TlsFiles) -> ssl.SSLContext:
    if bool(files.cert) != bool(files.key):
        raise _invalid(files.cert or files.key, "a certificate and its key go together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if files.cert:
        _try(
            lambda: context.load_cert_chain(files.cert, files.key, password=_no_password),
            f"{files.cert}, {files.key}",
        )
    if files.ca:
        _try(lambda: context.load_verify_locations(files.ca), files.ca)
    return context


def _read(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _invalid(path, f"cannot be read: {error.strerror}") from None


def _try(load: Callable[[], None], names: str) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise _invalid(names, f"cannot be used for TLS: {error}") from None


def _no_password() -> NoReturn:
    raise ValueError("keys with a passphrase are not supported")


def _invalid(path: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(path, description))
