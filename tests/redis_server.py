"""A Redis server of the tests' own: a process on a Unix socket, without persistence, gone at the end."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 10.0


@contextmanager
def redis_server() -> Iterator[str]:
    """Yields its URL."""
    program = shutil.which("redis-server")
    assert program, "redis-server is missing; install it: apt-get install redis-server"
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="baton-redis-") as directory:
        path = Path(directory) / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir"]
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen([*command, directory], stdout=log, stderr=log)
        try:
            _until_listening(path, process)
            yield f"unix://{path}"
        finally:
            process.kill()
            process.wait(5)


def _until_listening(path: Path, process: "subprocess.Popen[bytes]") -> None:
    end_s = time.monotonic() + START_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                assert process.poll() is None, "redis-server ended"
                assert time.monotonic() < end_s, "redis-server does not listen"
                time.sleep(0.02)
            else:
                return
