"""A server process for tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx


class Server:
    """`pyruntime serve` as a process on a free port."""

    def __init__(self, *options, model=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "pyruntime", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *map(str, options), *([str(model)] if model else [])],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYRUNTIME_API_KEYS": ""},
        )
        self.log = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        for _ in range(300):
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                assert self.process.poll() is None, self.log
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)

    def stop(self, sig=signal.SIGTERM, timeout=30):
        self.process.send_signal(sig)
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def requests(self):
        """Log lines of finished requests."""
        lines = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in lines if line["event"] == "request"]

    def status(self):
        return httpx.get(f"{self.url}/status").json()

    def idle(self):
        """Wait until nothing runs, then check that no KV block leaked."""
        for _ in range(200):
            status = self.status()
            if status["running"] == status["waiting"] == 0:
                assert status["kv_free_blocks"] == status["kv_blocks"]
                return status
            time.sleep(0.05)
        raise AssertionError(f"not idle: {status}")
