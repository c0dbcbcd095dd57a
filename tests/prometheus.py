"""A Prometheus and an Alertmanager of the tests' own, as processes on free ports, gone at the end; and Debian's `promtool`."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import httpx
import yaml

from tests.served import until

START_S = 30.0
INTERVAL = "500ms"
"""Between two scrapes, and two evaluations of rules."""


def program(name: str, package: str) -> str:
    """Where it is. Fails with how to install it."""
    path = shutil.which(name)
    assert path, f"{name} is missing; install it: apt-get install {package}"
    return path


def promtool(*args: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [program("promtool", "prometheus"), *args]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, timeout=50
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    http: httpx.Client

    def query(self, expr: str) -> list[Sample]:
        """What an expression gives now. Fails where Prometheus does not understand it."""
        answer = self.http.get("/api/v1/query", params={"query": expr})
        told = answer.json()
        assert told["status"] == "success", told
        return [Sample(each["metric"], float(each["value"][1])) for each in told["data"]["result"]]

    def pages(self) -> dict[str, str]:
        """What each process that is there to be scraped says of itself, by the address."""
        told = self.http.get("/api/v1/targets", params={"state": "active"}).json()
        active = [each for each in told["data"]["activeTargets"] if each["health"] == "up"]
        urls = [each["scrapeUrl"] for each in active]
        return {url: httpx.get(url, timeout=20).text for url in urls}

    def label_values(self, selector: str, label: str) -> set[str]:
        """Of the series that a selector finds, as Grafana asks for a variable's values."""
        answer = self.http.get("/api/v1/series", params={"match[]": selector})
        told = answer.json()
        assert told["status"] == "success", told
        return {series[label] for series in told["data"]}


@contextmanager
def prometheus(
    directory: Path,
    jobs: Mapping[str, Sequence[str]],
    *,
    rules: Sequence[Path] = (),
    alertmanager: str = "",
) -> Iterator[Prometheus]:
    """Scrapes each job's addresses, evaluates the rules, and tells the Alertmanager at that address.

    Series have the labels that they have on Kubernetes; a pod is called by its address.
    """
    config: dict[str, Any] = {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [
                    {"targets": [each], "labels": {"namespace": "baton", "pod": each}}
                    for each in addresses
                ],
            }
            for job, addresses in jobs.items()
        ],
    }
    if alertmanager:
        targets = [{"static_configs": [{"targets": [alertmanager]}]}]
        config["alerting"] = {"alertmanagers": targets}
    path = directory / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [
        program("prometheus", "prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
    ]
    with (
        _running(command, directory / "prometheus.log") as address,
        httpx.Client(base_url=f"http://{address}", timeout=20) as http,
    ):
        yield Prometheus(http)


@contextmanager
def alertmanager(directory: Path, webhook: str) -> Iterator[str]:
    """Yields its address; it passes every alert on to the webhook at once."""
    config = {
        "route": {"receiver": "test", "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "test", "webhook_configs": [{"url": webhook}]}],
    }
    path = directory / "alertmanager.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [
        program("prometheus-alertmanager", "prometheus-alertmanager"),
        f"--config.file={path}",
        f"--storage.path={directory / 'alertmanager'}",
        "--cluster.listen-address=",
    ]
    with _running(command, directory / "alertmanager.log") as address:
        yield address


@contextmanager
def webhook() -> Iterator[tuple[str, "SimpleQueue[dict[str, Any]]"]]:
    """Yields a URL and what is posted to it."""
    posted: SimpleQueue[dict[str, Any]] = SimpleQueue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", posted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[str]:
    """Yields its address, at a port that it takes itself, once it is ready."""
    with log.open("wb") as out:
        listen = "--web.listen-address=127.0.0.1:0"
        process = subprocess.Popen([*command, listen], stdout=out, stderr=out)

    def address() -> str:
        told = re.search(r'Listening on".* address=(\S+)', log.read_text())
        return told[1] if told else ""

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            return bool(address()) and httpx.get(f"http://{address()}/-/ready").is_success
        return False

    try:
        until(is_ready, START_S, f"{command[0]} is ready", log.read_text)
        yield address()
    finally:
        process.kill()
        process.wait(10)
