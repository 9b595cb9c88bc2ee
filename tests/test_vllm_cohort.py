"""integrations/vllm/cohort.py.

Invariants: no member enters before all are there and decided; nobody enters in the middle of a pass; outsiders wait until the cohort is
in; every wait ends at the deadline.
"""

from __future__ import annotations

from concordia.integrations.vllm.cohort import Cohorts
from concordia.integrations.vllm.identity import CohortTicket

PAIR = CohortTicket("c", 2, 5.0)


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
