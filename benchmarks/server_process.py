"""A server of its own for a benchmark: started, waited for, killed or ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import requests

START_SECONDS = 900
STOP_SECONDS = 60
TAIL_CHARACTERS = 4000


class ServerProcess:
    """``python -m sglang.launch_server`` on loopback, ready to serve.

    Args:
        arguments: command-line arguments besides the address.
        log: where its output goes; a log that exists is continued.
        environment: variables besides this process's.

    Raises:
        RuntimeError: it ended or was not ready in time; shows the end of its log.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        address = ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang.launch_server", *address, *arguments],
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End all of its processes at once, as the kernel does when memory runs out."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """End it as a user would. Returns its exit code; -9 where it had to be killed."""
        # The main process alone: it ends the others.
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()
        return self._process.returncode

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:]

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while True:
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=10).ok:
                    return
            if not self.alive():
                raise RuntimeError(
                    f"the server ended with {self._process.returncode}: {self.tail()}"
                )
            if time.monotonic() > limit:
                raise RuntimeError(f"the server is not ready in {START_SECONDS} s: {self.tail()}")
            time.sleep(0.5)
