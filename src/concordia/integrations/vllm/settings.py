"""What `kv_connector_extra_config` may say.

Owns: the connector's settings. Promises: an unknown name or a wrong type is refused with the name,
so that a misspelt switch cannot silently leave an engine unprotected. Called by the connector.
Reads nothing else.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from concordia import config
from concordia.device.policy import AUTO, DEFAULT, policy_of
from concordia.errors import UsageError
from concordia.paths import Paths

LAYOUTS = ("auto", "blocks")


@dataclass(frozen=True, slots=True)
class Settings:
    """
    journal    the journal's folder
    replica    incarnation number of the replica, 0 for an engine that belongs to none
    device     "auto", "host" or "cuda:<index>"
    layout     "auto", or "blocks" to save whole blocks only
    residency  how long a worker's executor stays on its GPU (docs/residency.md)
    executor_ctas  thread blocks of it: a prefill's appends are over sooner with more of them, each
               of which takes a multiprocessor meanwhile
    is_prefix_restored  whether a prefix that the journal has is restored for any request that
                        replays it
    """

    journal: pathlib.Path
    replica: int = 0
    device: str = "auto"
    layout: str = "auto"
    residency: str = DEFAULT
    executor_ctas: int = 1
    is_prefix_restored: bool = True

    @staticmethod
    def of(extra: Mapping[str, Any] | None) -> Settings:
        """Checked settings; raises UsageError."""
        given = dict(extra or {})
        journal = pathlib.Path(str(given.pop("journal", Paths.default().journal)))
        names = {field.name: field.type for field in fields(Settings)}
        names.pop("journal")
        given["is_prefix_restored"] = given.pop("prefix_restore", True)
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise UsageError(f"kv_connector_extra_config has unknown names: {', '.join(unknown)}")
        kinds = {"int": int, "str": str, "bool": bool}
        for name, value in given.items():
            kind = kinds[str(names[name])]
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UsageError(
                    f"kv_connector_extra_config.{name} must be {names[name]}, not {value!r}"
                )
        settings = Settings(journal=journal, **given)
        if settings.layout not in LAYOUTS:
            raise UsageError(f"kv_connector_extra_config.layout must be one of {LAYOUTS}")
        if not 1 <= settings.executor_ctas <= config.EXECUTOR_CTAS_MAX:
            raise UsageError(
                "kv_connector_extra_config.executor_ctas must be 1 to "
                f"{config.EXECUTOR_CTAS_MAX}, not {settings.executor_ctas}"
            )
        if settings.residency != AUTO:
            policy_of(settings.residency)
        return settings
