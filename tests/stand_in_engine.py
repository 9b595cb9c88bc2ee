"""A process tree that looks like vLLM from outside, for tests of replicas: `stand_in_engine.py FOLDER PORT`.

An HTTP server with a core, and a worker under it that started a session of its own; the worker holds shared memory, and writes it into a file
in FOLDER so that a test knows its name. Files in FOLDER change what the next engines do: `refuse` (end at start with an error), `exit2` (end
like argparse), `unhealthy` (answer 503), `mute` (never answer).
"""

from __future__ import annotations

import http.server
import os
import pathlib
import socketserver
import subprocess
import sys
import time
from multiprocessing import shared_memory


def title(name: str) -> None:
    pathlib.Path("/proc/self/comm").write_text(name)


def child(folder: str, role: str, **options: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, folder, role], **options)


def wait_for_ever() -> None:
    while True:
        time.sleep(3600)


def main(folder: str, role: str) -> None:
    place = pathlib.Path(folder)
    if role == "worker":
        title("VLLM::Worker")
        block = shared_memory.SharedMemory(create=True, size=1 << 16)
        (place / f"shared-{os.environ['LEADER']}").write_text(block.name)
        wait_for_ever()
    if role == "core":
        title("VLLM::EngineCor")
        child(folder, "worker", start_new_session=True)
        wait_for_ever()
    if (place / "refuse").exists():
        print(
            "(EngineCore) ValueError: no such weights\nRuntimeError: Engine core initialization failed."
        )
        sys.exit(1)
    if (place / "exit2").exists():
        print("usage: api_server.py\napi_server.py: error: unrecognized arguments: --wrong")
        sys.exit(2)
    os.environ["LEADER"] = str(os.getpid())
    child(folder, "core")
    while not (place / f"shared-{os.getpid()}").exists():
        time.sleep(0.005)
    serve(place, int(role))


def serve(place: pathlib.Path, port: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            while (place / "mute").exists():
                time.sleep(0.01)
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            self.send_response(503 if (place / "unhealthy").exists() else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = answer  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            return

    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
