"""What an engine is started with, floor 6.

Owns: the settings that all engines of a server share, and the command line and environment made of
them. Promises: nothing secret is on a command line; everything that vLLM would leave about goes
into the engine's own folder; a user's environment variables win where they were set on purpose.
Called by Replica. It starts nothing.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import concordia
from concordia.device.policy import DEFAULT
from concordia.errors import UsageError
from concordia.serving.engine_flags import EngineFlags, connector_config
from concordia.serving.process_tree import MARKER_ENV
from concordia.serving.resources import Share

LOOPBACK: Final = "127.0.0.1"
_SOCKET_PATH_BYTES_MAX: Final = 107  # of a Unix socket's name
_SOCKET_NAME_BYTES: Final = 37  # what vLLM adds to TMPDIR
_SERVER: Final = "vllm.entrypoints.openai.api_server"


def check_socket_room(folder: pathlib.Path) -> None:
    """Raise UsageError when vLLM's sockets would not fit into the name of this folder."""
    if len(os.fsencode(folder / "t")) + _SOCKET_NAME_BYTES > _SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"{folder} is too long a name for vLLM's sockets; set a shorter --run-dir")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What all engines of a server have in common."""

    model: str
    flags: EngineFlags
    folder: pathlib.Path  # of this server's run; each engine gets a folder in it
    api_key: str
    journal: pathlib.Path | None = None  # None: unprotected
    device: str = "auto"
    residency: str = DEFAULT
    executor_ctas: int = 1
    served_names: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()
    log_folder: pathlib.Path | None = None  # logs are kept there; else they go with the engine
    stand_in: tuple[
        str, ...
    ] = ()  # a command instead of vLLM; it gets the port as its last argument
    environment: Mapping[str, str] = field(default_factory=dict)

    def make_folder(self, name: str) -> pathlib.Path:
        """The folder of one engine, with its TMPDIR in it; raises UsageError when sockets would not
        fit into its name.
        """
        folder = self.folder / name
        check_socket_room(folder)
        (folder / "t").mkdir(mode=0o700, parents=True)
        return folder

    def log_path(self, name: str, incarnation: int) -> pathlib.Path:
        """Where one engine's output goes."""
        if self.log_folder is None:
            return self.folder / name / "engine.log"
        self.log_folder.mkdir(parents=True, exist_ok=True)
        return self.log_folder / f"{name}-{incarnation}.log"

    def command(self, *, port: int, incarnation: int, share: Share) -> list[str]:
        """One engine's command line."""
        if self.stand_in:
            return [*self.stand_in, str(port)]
        connector = None
        if self.journal is not None:
            connector = connector_config(
                journal=str(self.journal),
                replica=incarnation,
                device=self.device,
                residency=self.residency,
                executor_ctas=self.executor_ctas,
            )
        names = ["--served-model-name", *self.served_names] if self.served_names else []
        return [
            *(sys.executable, "-m", _SERVER, "--model", self.model),
            *("--host", LOOPBACK, "--port", str(port), "--disable-uvicorn-access-log"),
            *names,
            *self.flags.command(connector=connector, processors=self.processors),
            *share.flags,
        ]

    def variables(self, name: str, *, incarnation: int, share: Share) -> dict[str, str]:
        """One engine's environment."""
        temporary = str(self.folder / name / "t")
        package = str(pathlib.Path(concordia.__file__).parents[1])
        paths = [package, os.environ.get("PYTHONPATH", "")]
        cache = f"/tmp/torchinductor_{os.environ.get('USER', os.getuid())}"
        offline = {"HF_HUB_OFFLINE": "1"} if pathlib.Path(self.model).is_dir() else {}
        return {
            # The first variable stays where it is: setproctitle finds the title of a process by its
            # place.
            MARKER_ENV: str(incarnation),
            "TORCHINDUCTOR_CACHE_DIR": cache,  # would follow TMPDIR and be lost with it
            "VLLM_NO_USAGE_STATS": "1",
            **offline,
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TMPDIR": temporary,
            "VLLM_RPC_BASE_PATH": temporary,
            "VLLM_HOST_IP": LOOPBACK,
            "VLLM_API_KEY": self.api_key,
            **share.environment,
            **self.environment,
        }
