"""A stock vLLM server with the connector of copy_connector.py, and nothing of Concordia in it.

Owns: its process, from start to end, and its two arms. Promises: whatever happens in the `with`
block, its whole session is gone after it. Called by engine.py --only peer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Final

from cost import Arm

from concordia.errors import ReplicaError
from concordia.testing.served import free_port

SERVER: Final = "vllm.entrypoints.openai.api_server"
CONNECTOR: Final = {
    "kv_connector": "CopyConnector",
    "kv_connector_module_path": "copy_connector",
    "kv_role": "kv_both",
}
STOP_S: Final = 20.0


class CopyEngine:
    """One running engine."""

    def __init__(self, model: pathlib.Path, flags: Sequence[str], *, log: pathlib.Path) -> None:
        self._url, self._log = f"http://127.0.0.1:{free_port()}", log
        log.parent.mkdir(parents=True, exist_ok=True)
        port = self._url.rpartition(":")[2]
        paths = [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "VLLM_API_KEY": "bench",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            *(sys.executable, "-m", SERVER, "--model", str(model)),
            *("--host", "127.0.0.1", "--port", port, "--disable-uvicorn-access-log"),
            *("--kv-transfer-config", json.dumps(CONNECTOR), *flags),
        ]
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def arms(self) -> tuple[Arm, Arm]:
        """With the copies and without."""
        without = {"kv_transfer_params": {"copy": False}}
        return Arm(f"{self._url}/v1"), Arm(f"{self._url}/v1", extra=without)

    def wait_ready(self, timeout_s: float) -> None:
        """Raises ReplicaError at the bound, or when the engine ends."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if urllib.request.urlopen(f"{self._url}/health", timeout=2).status == 200:
                    return
            time.sleep(0.5)
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise ReplicaError(f"the copying engine is not ready; last lines:\n{last}")

    def __enter__(self) -> CopyEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # its session has its engine core, too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
