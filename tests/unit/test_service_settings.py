"""Settings from the environment and from the command line."""

import pytest

from baton.errors import InvalidRequestError
from baton.service.settings import LogFormat, LogLevel, RouterSettings, WorkerSettings


def test_defaults_listen_on_the_loopback_only() -> None:
    assert WorkerSettings().host == RouterSettings().host == "127.0.0.1"


def test_every_kind_of_field_is_read_from_its_variable() -> None:
    settings = WorkerSettings.from_env(
        {
            "BATON_ROUTERS": "a:1, b:2",
            "BATON_PORT": "7",
            "BATON_KEEPALIVE_S": "2.5",
            "BATON_REFLECTION": "false",
            "BATON_LOG_FORMAT": "json",
            "BATON_LOG_LEVEL": "WARNING",
            "BATON_WORKER_ID": "w",
            "UNRELATED": "x",
        }
    )
    assert settings == WorkerSettings(
        routers=("a:1", "b:2"),
        port=7,
        keepalive_s=2.5,
        reflection=False,
        log_format=LogFormat.JSON,
        log_level=LogLevel.WARNING,
        worker_id="w",
    )


def test_a_given_value_wins_over_the_environment_and_none_does_not() -> None:
    environ = {"BATON_PORT": "7", "BATON_HOST": "0.0.0.0"}  # noqa: S104
    settings = RouterSettings.from_env(environ, port=9, host=None)
    assert (settings.port, settings.host) == (9, environ["BATON_HOST"])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BATON_PORT", "seven"),
        ("BATON_KEEPALIVE_S", ""),
        ("BATON_REFLECTION", "maybe"),
        ("BATON_LOG_FORMAT", "xml"),
        ("BATON_LOG_LEVEL", "loud"),
    ],
)
def test_a_bad_value_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidRequestError) as failed:
        WorkerSettings.from_env({variable: value})
    assert failed.value.violations[0].field == variable


def test_an_override_that_is_no_setting_is_a_bug() -> None:
    with pytest.raises(TypeError, match="prot"):
        WorkerSettings.from_env({}, prot=1)
