"""How commands reach a router and its workers: the API key and the certificates come from the environment, so that none stands in a
command line, which other users of the machine can read.
"""

import os

import grpc

from baton.client import Client, ConnectionOptions
from baton.service.channel import channel_options, fleet_files
from baton.service.settings import ClientSettings, ServerSettings
from baton.service.tls import channel_credentials


def connected(address: str) -> Client:
    """A client with `BATON_API_KEY` and the `BATON_CLIENT_*` variables. Raises `InvalidRequestError` naming what is unusable."""
    api_key, connection = client_settings()
    return Client(address, api_key=api_key, connection=connection)


def client_settings() -> tuple[str, ConnectionOptions]:
    """`BATON_API_KEY`, and the `BATON_CLIENT_*` variables. Raises `InvalidRequestError` naming what is unusable."""
    settings = ClientSettings.from_env(os.environ)
    connection = ConnectionOptions(
        tls=settings.client_tls,
        tls_ca_file=settings.client_ca_file,
        tls_cert_file=settings.client_cert_file,
        tls_key_file=settings.client_key_file,
    )
    return settings.api_key, connection


def worker_channel(address: str) -> grpc.Channel:
    """To a worker, with the fleet's certificates where `BATON_FLEET_*` name them. Raises `InvalidRequestError` naming what is unusable."""
    settings = ServerSettings.from_env(os.environ)
    files, options = fleet_files(settings), channel_options(settings)
    if files is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, channel_credentials(files), options=options)
