"""What `concordia status` shows, floor 6.

Owns: how a server describes its engines and journal, and how that is printed for people. Promises:
the description is plain JSON values. Called by the service (describe) and the command line
(render). It asks nobody anything that could block.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from concordia import __version__
from concordia.serving.machine import Engine
from concordia.serving.replica_set import ReplicaSet


def describe_engines(replicas: ReplicaSet | None, engine: Engine) -> dict[str, Any]:
    """Engines and failovers, newest last."""
    found = replicas.replicas if replicas is not None else []
    return {
        "version": __version__,
        "pid": os.getpid(),
        "vllm": engine.version,
        "device": engine.device,
        "replicas": [
            {
                "name": r.name,
                "state": r.state.value,
                "session_id": r.session_id,
                "incarnation": r.incarnation,
                "base_url": r.base_url,
                "start_s": r.ready_s,
                "age_s": round((time.monotonic_ns() - r.started_ns) / 1e9, 1),
                "requests": r.requests_in_flight,
                "log": str(r.log.path),
            }
            for r in found
        ],
        "failovers": [f.describe() for f in replicas.failovers] if replicas is not None else [],
    }


def render(found: Mapping[str, Any]) -> str:
    """The same for people."""
    counters = found.get("counters", {})
    journal = found.get("journal")
    lines = [
        f"model     {found.get('model')} on http://{found.get('host')}:{found.get('port')}/v1"
        f" (vLLM {found['vllm']} on {found['device']}, process {found['pid']})",
        f"journal   {journal}, owner {found.get('owner_pid')}"
        if journal
        else "journal   none: UNPROTECTED",
        f"requests  {found.get('in_flight', 0)} running, {found.get('held', 0)} held"
        + (", draining" if found.get("is_draining") else ""),
        "",
        f"{'engine':<8} {'state':<9} {'session':>8} {'requests':>8} {'age':>9} {'start':>8}",
    ]
    for r in found["replicas"]:
        start = f"{r['start_s']:.1f} s" if r["start_s"] else "-"
        lines.append(
            f"{r['name']:<8} {r['state']:<9} {r['session_id']:>8} {r['requests']:>8} "
            f"{r['age_s']:>7.0f} s {start:>8}"
        )
    if found["failovers"]:
        lines += ["", f"{'failed':<8} {'by':<8} {'fault':<16} {'fenced':>9} {'replaced':>9}"]
    for f in found["failovers"][-10:]:
        fenced, replaced = (
            f"{f[k]:.0f} ms" if f[k] is not None else "-" for k in ("fenced_ms", "replaced_ms")
        )
        lines.append(
            f"{f['failed']:<8} {f['replacement'] or '-':<8} {f['kind']:<16} {fenced:>9} "
            f"{replaced:>9}"
        )
    if counters:
        lines += [
            "",
            "  ".join(f"{name} {value:g}" for name, value in sorted(counters.items()) if value),
        ]
    return "\n".join(lines).rstrip()
