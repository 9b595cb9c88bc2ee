"""integrations/vllm/cohort.py.

Invariants: no member enters before all are there and decided; nobody enters in the middle of a pass; outsiders wait until a recovery's cohort
is in, and never for a client's; every wait ends at the cohort's deadline, and RESTORE_WAIT_S after the request came, whatever comes meanwhile;
a client's name may be used again.
"""

from __future__ import annotations

import random
import secrets

from concordia import config
from concordia.integrations.vllm.cohort import Cohorts
from concordia.integrations.vllm.identity import CohortTicket

PAIR = CohortTicket("c", 2, 5.0)
CLIENTS = CohortTicket("client-c", 2, 10.0)
WAIT_S = config.RESTORE_WAIT_S


def test_cohort_enters_together_when_all_are_there_and_decided() -> None:
    held = Cohorts()
    held.join("a", PAIR, now=0)
    held.decide("a")
    held.settle(now=1)
    assert not held.may_enter("a")
    held.join("b", PAIR, now=1)
    held.decide("b")
    assert not held.may_enter("a"), "not in the middle of a pass"
    held.settle(now=1)
    assert held.may_enter("a")
    assert held.may_enter("b")


def test_outsider_waits_when_a_cohort_is_not_in() -> None:
    held = Cohorts()
    assert held.may_enter("x")
    held.join("a", PAIR, now=0)
    held.join("b", PAIR, now=0)
    held.decide("a")
    held.decide("b")
    held.settle(now=0)
    assert not held.may_enter("x")
    held.end("a")
    held.settle(now=0)
    assert not held.may_enter("x")
    held.end("b")
    held.settle(now=0)
    assert held.may_enter("x")


def test_everybody_goes_on_when_the_deadline_has_passed() -> None:
    held = Cohorts()
    held.join("a", PAIR, now=0)
    held.decide("a")
    assert held.settle(now=4.9) == []
    assert not held.may_enter("x")
    (late,) = held.settle(now=5.0)
    assert late.is_late
    assert held.may_enter("a")
    assert held.may_enter("x")


def test_cohort_goes_on_without_a_member_when_that_member_leaves() -> None:
    held = Cohorts()
    held.join("a", PAIR, now=0)
    held.join("b", PAIR, now=0)
    held.decide("a")
    held.forget("b")
    held.settle(now=0)
    assert held.may_enter("a")
    held.end("a")
    held.settle(now=0)
    assert not held.is_waiting


def test_second_cohort_waits_when_the_first_is_not_in() -> None:
    held = Cohorts()
    held.join("a", CohortTicket("one", 1, 5.0), now=0)
    held.join("b", CohortTicket("two", 1, 5.0), now=0)
    held.decide("b")
    held.settle(now=0)
    assert not held.may_enter("b")
    held.decide("a")
    held.settle(now=0)
    assert held.may_enter("a")
    held.end("a")
    held.settle(now=0)
    assert held.may_enter("b")


def test_late_member_enters_alone_when_its_cohort_has_gone() -> None:
    cohorts = Cohorts()
    ticket = CohortTicket("c", 2, 1.0)
    cohorts.join("a", ticket, now=0.0)
    cohorts.decide("a")
    cohorts.settle(now=2.0)
    cohorts.join("b", ticket, now=3.0)
    cohorts.settle(now=3.0)
    assert cohorts.may_enter("b")
    assert cohorts.may_enter("somebody else")


def test_members_enter_at_their_deadline_when_another_cohort_is_not_in() -> None:
    held = Cohorts()
    held.join("a", CohortTicket("one", 2, WAIT_S), now=0.0)
    held.join("b", CohortTicket("two", 2, WAIT_S), now=8.0)
    held.join("x", None, now=8.1)
    held.settle(now=8.1)
    assert [held.may_enter(name) for name in "abx"] == [False, False, False]
    held.settle(now=10.0)
    assert [held.may_enter(name) for name in "abx"] == [True, False, False]
    held.settle(now=18.0)
    assert [held.may_enter(name) for name in "abx"] == [True, True, True]


def test_outsider_enters_when_a_clients_cohort_is_forming() -> None:
    held = Cohorts()
    held.join("a", CLIENTS, now=0.0)
    held.join("x", None, now=0.0)
    held.join("r", PAIR, now=0.0)
    held.join("s", PAIR, now=0.0)
    held.decide("r")
    held.decide("s")
    held.settle(now=0.0)
    assert held.may_enter("r"), "what is restored waits for no client"
    assert not held.may_enter("x")
    held.end("r")
    held.end("s")
    held.settle(now=0.1)
    assert held.may_enter("x")
    assert not held.may_enter("a")
    held.join("b", CLIENTS, now=1.0)
    held.decide("a")
    held.decide("b")
    held.settle(now=1.0)
    assert held.may_enter("a")
    assert held.may_enter("b")


def test_nobody_is_held_beyond_the_bound_when_cohorts_never_complete() -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    draw = random.Random(seed)
    held = Cohorts()
    came: dict[str, float] = {}
    for pass_number in range(4000):
        now = pass_number / 50
        if draw.random() < 0.05:
            name = f"r{pass_number}"
            kind = draw.choice(("none", "recovery", "client"))
            ticket = CohortTicket(f"{kind}-{draw.randrange(9)}", draw.choice((2, 4096)), draw.uniform(0, WAIT_S))
            held.join(name, None if kind == "none" else ticket, now=now)
            came[name] = now
        held.settle(now=now)
        for name in [name for name in came if held.may_enter(name)]:
            held.end(name)
            held.forget(name)
            del came[name]
        assert all(now < since + WAIT_S for since in came.values())


def test_name_is_used_again_when_its_cohort_is_in() -> None:
    held = Cohorts()
    for turn in range(3):
        first, second = f"a{turn}", f"b{turn}"
        held.join(first, CLIENTS, now=turn)
        held.decide(first)
        held.settle(now=turn)
        assert not held.may_enter(first), "the new cohort of this name waits for its own members"
        held.join(second, CLIENTS, now=turn)
        held.decide(second)
        held.settle(now=turn)
        assert held.may_enter(first)
        assert held.may_enter(second)
        held.end(first)
        if turn != 1:  # once the second has not entered yet, and the name comes again
            held.end(second)
            held.settle(now=turn)
