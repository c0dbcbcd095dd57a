"""`baton top` as a command: text and JSON for pipes, keys, certificates, and routers that do not answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.service.keys import TenantLimits, add_key, new_key
from router.status.snapshot import SNAPSHOT
from tests.certificates import Authority
from tests.served import baton
from tests.watched import loaded, until_busy, watched_fleet, watched_router

pytestmark = [pytest.mark.e2e]


def test_once_tells_a_loaded_fleet_as_text_and_as_json() -> None:
    """Promise: --once --json is the snapshot, one object on one line; text has no escapes and a line for each worker."""
    with watched_fleet(1, 2) as watched, loaded(watched.router.address, width=4, sessions=1):
        until_busy(watched, 2)
        told = baton("top", "--url", watched.url, "--once", "--json")
        assert (told.returncode, told.stderr, told.stdout.count("\n")) == (0, "", 1)
        status = SNAPSHOT.validate_python(json.loads(told.stdout), strict=False)
        assert status.requests.running >= 2
        assert status.fleet is not None
        assert {worker.worker_id for worker in status.fleet} == {
            "prefill-0",
            "decode-0",
            "decode-1",
        }
        plain = baton("top", "--url", watched.url)
        assert (plain.returncode, plain.stderr) == (0, "")
        assert "\x1b" not in plain.stdout
        for word in ("decode-1", "TTFT", "p99", "handoff", "Requests: ", "Sessions", "█"):
            assert word in plain.stdout


def test_a_router_that_is_not_there_is_told_in_one_line() -> None:
    """Promise: exit code 1 and no traceback; a wrong URL is a usage error."""
    told = baton("top", "--url", "http://127.0.0.1:9", "--once", "--json")
    assert (told.returncode, told.stdout) == (1, "")
    assert "no router can be reached at http://127.0.0.1:9/" in told.stderr
    assert "Traceback" not in told.stderr
    assert baton("top", "--url", "gopher://x", "--once").returncode == 2
    assert baton("top", "--json").returncode == 2


def test_keys_and_certificates_are_taken_from_options_and_the_environment(tmp_path: Path) -> None:
    """Promise: --key-file or BATON_API_KEY, --ca-file or BATON_CLIENT_CA_FILE; without them, what lacks is told."""
    authority = Authority.make(tmp_path / "ca")
    files = authority.issue("router")
    keys = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(keys, entry)
    (tmp_path / "key").write_text(f"{key}\n")
    environ = {
        "BATON_API_KEYS_FILE": keys,
        "BATON_FLEET_LISTEN": "127.0.0.1:0",
        "BATON_TLS_CERT_FILE": files.cert,
        "BATON_TLS_KEY_FILE": files.key,
    }
    with watched_router("https", **environ) as watched:
        command = ("top", "--url", watched.url, "--once")
        trusting = (*command, "--ca-file", str(authority.ca_file))
        told = baton(*trusting, "--key-file", str(tmp_path / "key"))
        assert told.returncode == 0, told.stderr
        assert "tenant acme" in told.stdout
        for args, problem in ((command, "CERTIFICATE_VERIFY_FAILED"), (trusting, "BATON_API_KEY")):
            told = baton(*args)
            assert told.returncode == 1
            assert problem in told.stderr
            assert "Traceback" not in told.stderr
        by_environment = subprocess.run(
            [sys.executable, "-m", "baton", *command],
            env=os.environ | {"BATON_API_KEY": key, "BATON_CLIENT_CA_FILE": str(authority.ca_file)},
            capture_output=True,
            check=False,
            timeout=50,
        )
        assert by_environment.returncode == 0
