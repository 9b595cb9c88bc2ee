"""cli.py, serving/start.py: a mistake is one line that says what to do, exit code 2, and nothing is left.

Invariants: every refusal comes before anything is started; what is printed is one line on stderr; no journal, run folder or process stays.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil
import pytest

from concordia.cli_commands import cli
from concordia.serving.start import api_keys

WITHOUT_VLLM = """
import importlib.util as util
real = util.find_spec
util.find_spec = lambda name, *rest: None if name == "vllm" else real(name, *rest)
"""
SMALL_SHARED_MEMORY = """
import os, shutil
from collections import namedtuple
shutil.disk_usage = lambda _: namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
real = os.statvfs
def statvfs(path):
    found = real(path)
    if str(path).startswith("/dev/shm"):
        values = list(found)
        values[1], values[4] = 4096, (64 << 20) // 4096
        return os.statvfs_result(values)
    return found
os.statvfs = statvfs
"""


class Ground:
    """A place to run the command line in, and what must not be there afterwards."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.children = set(psutil.Process().children(recursive=True))
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.journal = pathlib.Path(f"/dev/shm/concordia-cli-{os.getpid()}-{time.monotonic_ns()}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def run(
        self, *arguments: str, before: str = "", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        code = f"{before}\nfrom concordia.cli import main\nimport sys\nmain(sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                **os.environ,
                "CONCORDIA_RUN_DIR": str(self.folder / "run"),
                **(environment or {}),
            },
        )

    def serve(self, *arguments: str, **rest: object) -> subprocess.CompletedProcess[str]:
        own = (
            "--port",
            str(self.port),
            "--journal-dir",
            str(self.journal),
            "--journal-size",
            "128MiB",
        )
        return self.run("serve", *own, *arguments, **rest)  # type: ignore[arg-type]

    def leftovers(self) -> list[str]:
        left = [str(p) for p in (self.journal, *(self.folder / "run").glob("*")) if p.exists()]
        now = set(psutil.Process().children(recursive=True))
        return left + [str(p) for p in now - self.children]


@pytest.fixture
def ground() -> Iterator[Ground]:
    # Not pytest's own folder: its name is too long for sockets.
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as folder:
        yield Ground(pathlib.Path(folder))


def refused(done: subprocess.CompletedProcess[str], words: str, ground: Ground) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("concordia: ")
    assert words in done.stderr
    assert done.stdout == ""
    assert ground.leftovers() == []


@pytest.mark.parametrize(
    ("command", "hint"),
    [("run", " The program and its flags go after --."), ("serve", " Flags of vLLM itself go after --."), ("doctor", "")],
)
def test_where_a_flag_belongs_is_said_when_the_command_does_not_have_it(ground: Ground, command: str, hint: str) -> None:
    done = ground.run(command, "--frob", "x")
    refused(done, f"No such option '--frob'.{hint}\n", ground)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--wrong"], "vLLM itself go after --"),
        (["MODEL", "--replicas", "0"], "--replicas"),
        (["MODEL", "--port", "high"], "--port"),
        (["MODEL", "--commit", "never"], "--commit"),
        (["MODEL", "--residency", "staying"], "--residency"),
        (["MODEL", "--executor-ctas", "9"], "--executor-ctas"),
        (["MODEL", "--residency", "resident"], "wants a GPU"),
        ([], "MODEL"),
        (["MODEL", "--", "--data-parallel-size", "2"], "use --replicas"),
        (["MODEL", "--", "--api-server-count", "4"], "one API process"),
        (["MODEL", "--", "--headless"], "HTTP server"),
        (["MODEL", "--", "--port", "1"], "before --"),
        (["MODEL", "--kv-transfer-config", "{"], "no JSON"),
        (["MODEL", "--max-model-len", "4096", "--", "stray"], "'stray'"),
        (["MODEL", "--tensor-parallel-size", "two"], "whole number"),
        (["/no/such/model"], "no model folder /no/such/model"),
        (["no-such-model"], "no model folder 'no-such-model'"),
        (["."], "no config.json"),
        (["MODEL", "--host", "no.such.host.invalid"], "--host"),
        (["MODEL", "--journal-size", "big"], "no size"),
        (["MODEL", "--journal-size", "1MiB"], "needs at least 8 MiB"),
        (["MODEL", "--journal-pool", "/dev/null"], "no devdax device"),
        (["MODEL", "--journal-pool", "/no/such/folder/pool"], "no folder /no/such/folder"),
        (["MODEL", "--journal-pool", "."], "is there already"),
        (["MODEL", "--journal-dir", "/proc/journal"], "name another --journal-dir"),
        (["MODEL", "--replicas", "64", "--standby", "64"], "fewer --replicas"),
        (["MODEL", "--run-dir", "/tmp/" + "long" * 20], "shorter --run-dir"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_serve_says_what_to_do_when_it_cannot_start(
    ground: Ground, arguments: list[str], words: str
) -> None:
    done = ground.serve(*(str(ground.model) if a == "MODEL" else a for a in arguments))
    refused(done, words, ground)


@pytest.mark.parametrize(
    ("before", "environment", "words"),
    [
        (WITHOUT_VLLM, {}, "pip install"),
        (SMALL_SHARED_MEMORY, {}, "--shm-size"),
        ("", {"PATH": "/nonexistent", "CXX": ""}, "install g++"),
        ("", {"CONCORDIA_REPLICAS": "none"}, "CONCORDIA_REPLICAS"),
    ],
    ids=["no vLLM", "small /dev/shm", "no compiler", "wrong variable"],
)
def test_serve_says_what_to_do_when_the_machine_lacks_something(
    ground: Ground, before: str, environment: dict[str, str], words: str
) -> None:
    done = ground.serve(str(ground.model), before=before, environment=environment)
    refused(done, words, ground)


def test_serve_names_the_port_when_it_is_in_use(ground: Ground) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", ground.port))
        other.listen()
        refused(ground.serve(str(ground.model)), f"port {ground.port}", ground)


def test_serve_refuses_a_journal_when_others_may_read_it(ground: Ground) -> None:
    ground.journal.mkdir(mode=0o755)
    try:
        done = ground.serve(str(ground.model))
        assert done.returncode == 2
        assert "make it private" in done.stderr
    finally:
        ground.journal.rmdir()


@pytest.mark.parametrize(
    "command", [["status"], ["drain"], ["status", "--port", "4"]], ids=" ".join
)
def test_status_and_drain_say_so_when_no_server_runs(ground: Ground, command: list[str]) -> None:
    refused(ground.run(*command), "no Concordia server", ground)


def test_journal_says_so_when_there_is_none(ground: Ground) -> None:
    refused(ground.run("journal", "inspect", "/no/journal"), "/no/journal", ground)


def test_doctor_tells_people_and_machines_the_same_when_asked(ground: Ground) -> None:
    told = ground.run("doctor")
    found = json.loads(ground.run("doctor", "--json").stdout)
    assert told.returncode == (0 if found["can_serve"] else 1)
    names = {f["name"] for f in found["findings"]}
    assert names >= {"device", "compiler", "/dev/shm", "vLLM", "memory", "journal"}
    assert all(name in told.stdout for name in names)
    assert found["protection"] in told.stdout
    assert all(f["advice"] for f in found["findings"] if f["grade"] != "ok")


@pytest.mark.parametrize(
    ("before", "environment", "name"),
    [
        (WITHOUT_VLLM, {}, "vLLM"),
        (SMALL_SHARED_MEMORY, {}, "/dev/shm"),
        ("", {"PATH": "/nonexistent", "CXX": ""}, "compiler"),
    ],
)
def test_doctor_names_what_is_missing_when_serving_is_impossible(
    ground: Ground, before: str, environment: dict[str, str], name: str
) -> None:
    done = ground.run("doctor", "--json", before=before, environment=environment)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert not found["can_serve"]
    missing = {f["name"]: f["advice"] for f in found["findings"] if f["grade"] == "missing"}
    assert missing[name]
    assert name in found["protection"]


def test_every_flag_has_a_variable_when_listed() -> None:
    for parameter in cli.commands["serve"].params:
        if parameter.param_type_name == "option":
            long = next(o for o in parameter.opts if o.startswith("--"))
            assert parameter.envvar == "CONCORDIA_" + long[2:].upper().replace("-", "_")


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        ((), None, ()),
        ((), "", ()),
        ((), "theirs", ("theirs",)),
        (("a", "b"), "theirs", ("a", "b")),
    ],
)
def test_key_of_vllms_variable_is_asked_for_when_none_is_given(
    given: tuple[str, ...], variable: str | None, expected: tuple[str, ...]
) -> None:
    environment = {} if variable is None else {"VLLM_API_KEY": variable}
    assert api_keys(given, environment) == expected
