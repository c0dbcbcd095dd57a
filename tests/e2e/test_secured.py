"""`baton serve` with keys and certificates from the environment, asked by the command line."""

import json
import re
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.served import Serve, baton

pytestmark = [pytest.mark.e2e]


@pytest.mark.parametrize(
    "transport",
    ["memory", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(120)])],
)
def test_a_deployment_with_keys_and_certificates_is_ready_and_answers_who_has_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, transport: str
) -> None:
    """Promise: one environment for all of it; the key stands in no command line. The banner's addresses are those that work."""
    public, fleet = Authority.make(tmp_path / "public"), Authority.make(tmp_path / "fleet")
    shown, within = public.issue("router"), fleet.issue("all")
    keys = tmp_path / "keys.json"
    created = baton("keys", "create", "acme", "--file", str(keys))
    assert created.returncode == 0, created.stderr
    admin = baton("keys", "create", "ops", "--admin", "--file", str(keys))
    assert admin.returncode == 0, admin.stderr
    members = {
        "BATON_FLEET_CERT_FILE": within.cert,
        "BATON_FLEET_KEY_FILE": within.key,
        "BATON_FLEET_CA_FILE": within.ca,
    }
    with monkeypatch.context() as served_with:
        for name, value in {
            "BATON_API_KEYS_FILE": str(keys),
            "BATON_TLS_CERT_FILE": shown.cert,
            "BATON_TLS_KEY_FILE": shown.key,
            **members,
        }.items():
            served_with.setenv(name, value)
        served = serve("--engine", "sim", "--transport", transport, "--http", "127.0.0.1:0")
    assert re.search(r"OpenAI API +https://127\.0\.0\.1:\d+/v1", served.output())
    ask = ("generate", "-a", served.address, "Once", "-n", "4", "--ignore-eos", "--json")
    monkeypatch.setenv("BATON_CLIENT_CA_FILE", str(public.ca_file))
    without = baton(*ask)
    assert without.returncode == 1
    assert "BATON_API_KEY" in without.stderr
    monkeypatch.setenv("BATON_API_KEY", created.stdout.strip())
    answered = baton(*ask)
    assert answered.returncode == 0, answered.stderr
    assert len(json.loads(answered.stdout)["token_ids"]) == 4
    assert "administrator" in baton("fleet", "-a", served.address).stderr
    monkeypatch.setenv("BATON_API_KEY", admin.stdout.strip())
    with monkeypatch.context() as administering:
        for name, value in members.items():
            administering.setenv(name, value)
        listed = baton("fleet", "-a", served.address)
    assert listed.stdout.count("ready") == 2, listed.stdout + listed.stderr
    monkeypatch.delenv("BATON_CLIENT_CA_FILE")
    assert baton(*ask).returncode == 1
