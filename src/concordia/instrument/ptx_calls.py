"""What the functions of a PTX text do together, floor 3.

Owns: `Calls`: who calls whom, and what a function hides or reaches when its callees are counted in.
Promises: a callee without a body is a reason, unless it is of CUDA's own library on the device;
time is linear in functions and calls, and the order of everything is the text's. Called by ptx. It
looks at no instruction: ptx_walk did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from concordia.instrument.ptx_walk import REASONS_KEPT, Walk
from concordia.instrument.report import Hook

# They write buffers of the driver and its heap, which no region can be.
_SYSTEM_CALLS: Final = frozenset({"vprintf", "__assertfail", "malloc", "free"})


class Calls:
    """The functions that have a body, by name."""

    def __init__(self, walks: Mapping[str, Walk], aliases: Mapping[str, str]) -> None:
        self._walks = walks
        self._callees: dict[str, list[str]] = {}
        self.reasons: dict[str, list[str]] = {}  # why not every store is marked, with callees
        self._whole: set[str] = set()
        self._unknown: set[str] = set()  # that get to code which is not here
        self._callers: dict[str, list[str]] = {}
        for name, walk in walks.items():
            called = list(dict.fromkeys(aliases.get(callee, callee) for callee in walk.callees))
            foreign = [c for c in called if c not in walks and c not in _SYSTEM_CALLS]
            hidden = [f"a call of {callee}, whose code is not here" for callee in foreign]
            self.reasons[name] = [*walk.reasons, *hidden][:REASONS_KEPT]
            self._callees[name] = [callee for callee in called if callee in walks]
            for callee in self._callees[name]:
                self._callers.setdefault(callee, []).append(name)
            if walk.is_whole:
                self._whole.add(name)
            if walk.is_calling_unknown or foreign:
                self._unknown.add(name)
        self._pass_up()

    def is_whole(self, name: str) -> bool:
        """Whether it stores through tensor maps or multicast addresses."""
        return name in self._whole

    def may_exit_unseen(self, name: str) -> bool:
        """Whether it gets to code that is not here: a thread may end in it."""
        return name in self._unknown

    def pass_down(self, kernels: Mapping[str, Hook]) -> Iterator[tuple[Walk, Hook]]:
        """Every function that is edited when these kernels are, and how: a function has the exits
        and marks of all kernels that get to it.
        """
        wanted = dict(kernels)
        ahead = list(wanted)
        while ahead:
            name = ahead.pop()
            for callee in self._callees[name]:
                had = wanted.get(callee, Hook(0))
                has = had | wanted[name] & (Hook.EXIT | Hook.MARKS)
                if has != had:
                    wanted[callee] = has
                    ahead.append(callee)
        return ((self._walks[name], hooks) for name, hooks in wanted.items())

    def sharers(
        self, kernels: Iterable[str], is_edited: Callable[[Walk], bool], *, is_chained: bool
    ) -> set[str]:
        """These, and all functions that get to one which they get to and which is edited: what is
        done to it for one is done to all. Chained: and those that share one with those, and so on.
        """
        found = set(kernels)
        ahead, below, above = list(found), set[str](), set[str]()
        while ahead:
            shared = [
                callee
                for callee in _reached(ahead, self._callees, below)
                if is_edited(self._walks[callee])
            ]
            ahead = [name for name in _reached(shared, self._callers, above) if name not in found]
            found.update(ahead)
            if not is_chained:
                break
        return found

    def _pass_up(self) -> None:
        """A function is looked at again only when a callee had something new, which is seldom more
        often than there are reasons to keep.
        """
        ahead = [name for name in self._walks if self.reasons[name] or name in self._whole]
        while ahead:
            name = ahead.pop()
            for caller in self._callers.get(name, ()):
                own = self.reasons[caller]
                new = [reason for reason in self.reasons[name] if reason not in own]
                new = new[: REASONS_KEPT - len(own)]
                own += new
                is_new = bool(new)
                for found in (self._whole, self._unknown):
                    if name in found and caller not in found:
                        found.add(caller)
                        is_new = True
                if is_new:
                    ahead.append(caller)


def _reached(
    names: Iterable[str], ways: Mapping[str, Iterable[str]], seen: set[str]
) -> Iterator[str]:
    """All that these get to and that was not seen."""
    ahead = list(names)
    while ahead:
        for name in ways.get(ahead.pop(), ()):
            if name not in seen:
                seen.add(name)
                ahead.append(name)
                yield name
