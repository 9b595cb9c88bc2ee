"""integrations/vllm/identity.py: who a request is.

Invariants: what no router would send is refused; a name and incarnation is taken once, among as many as are remembered; a client's own requests have
the fallback.
"""

from __future__ import annotations

import pytest

from concordia import config
from concordia.errors import UsageError
from concordia.integrations.vllm.identity import Identity, Roll, parse_identity


@pytest.mark.parametrize(
    "own",
    [
        3,
        {"request": ""},
        {"request": "x" * 300},
        {"incarnation": -1},
        {"incarnation": True},
        {"restore": "yes"},
        {"cohort": {"size": 2}},
        {"cohort": {"id": "c", "deadline_s": "soon"}},
    ],
)
def test_identity_is_refused_when_no_router_would_send_it(own: object) -> None:
    with pytest.raises(UsageError):
        parse_identity({"concordia": own}, fallback="f")


def test_name_is_taken_once_when_many_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NAMES_REMEMBERED", 2)
    roll = Roll()
    roll.enter(Identity(name="a"))
    roll.enter(Identity(name="a", incarnation=2))
    with pytest.raises(UsageError, match="was here"):
        roll.enter(Identity(name="a"))
    roll.enter(Identity(name="b"))
    roll.enter(Identity(name="a"))  # the oldest is forgotten, so that memory has a bound


def test_identity_is_the_fallback_when_a_client_sends_none() -> None:
    assert parse_identity(None, fallback="f") == Identity(name="f")
    assert parse_identity({"concordia": False}, fallback="f").is_disabled
    routed = parse_identity({"concordia": {"request": "r", "restore": True, "tokens": 9}}, fallback="f")
    assert (routed.name, routed.is_routed, routed.is_restore, routed.tokens_known) == ("r", True, True, 9)
