"""Line: the calls of several threads on the pools of one model, and who of them waits for blocks of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# How often who waits looks at what is free, in seconds: finalizers, which free blocks too, notify nobody.
_LOOK = 0.01
# Seconds for which nobody can free anything before that is taken for true: a result that holds blocks may be dropped as
# soon as it is returned.
_GRACE = 0.2
# Seconds without a forward pass after which a call is not expected to free anything: its thread may itself be waiting
# for one that waits here.
_PATIENCE = 30.0


@dataclass(eq=False)
class Place:
    """A call that computes or waits.

    Attributes:
        number: the lowest came first.
        thread: that computes for it, or did last.
        depth: calls inside of calls of that thread.
        in_pass: whether it is in a forward pass.
        seen: when it last was, or began or waited.
        enough: while it waits, whether it finds what it needs.
        holds: while it waits, whether it keeps blocks that others could use.
        tried: bytes that were free when it last went on, and has not got through a pass since.
        num_left: calls that were over when its last pass began.
    """

    number: int
    thread: int
    depth: int = 0
    in_pass: bool = False
    seen: float = 0.0
    enough: Callable[[], bool] | None = None
    holds: bool = False
    tried: int | None = None
    num_left: int = 0

    @property
    def may_free(self) -> bool:
        """Whether it is under way, and may come to an end."""
        return self.enough is None and (self.in_pass or time.monotonic() - self.seen < _PATIENCE)


class Line:
    """Calls by when they came. Who finds too few blocks waits for those of other threads.

    The call that came first keeps what it has and goes on first. Others give up what they can while they wait, so that
    two never wait for one another. Where nobody computes any more, the last of those that kept their blocks gets its
    error, and without such the first.

    Args:
        lock: of the pools.
        free_bytes: of the pools, to be called with the lock.
    """

    def __init__(self, lock: threading.RLock, free_bytes: Callable[[], int]) -> None:
        self._changed = threading.Condition(lock)
        self._free_bytes = free_bytes
        self._places: list[Place] = []
        self._count = 0
        self._num_left = 0
        # What each thread computes for.
        self._of_thread: dict[int, Place] = {}

    def add(self) -> Place:
        """A place behind all others."""
        with self._changed:
            self._count += 1
            place = Place(self._count, threading.get_ident(), seen=time.monotonic(), num_left=self._num_left)
            self._places.append(place)
            return place

    def remove(self, place: Place) -> None:
        """The call is over."""
        with self._changed:
            if place in self._places:
                self._places.remove(place)
                self._num_left += 1
            self._changed.notify_all()

    def move_back(self, place: Place) -> None:
        """Behind all others: what comes now came later than they."""
        with self._changed:
            self._count += 1
            place.number = self._count

    def enter(self) -> None:
        """This thread begins a call; one inside of another is a part of it."""
        with self._changed:
            place = self._of_thread.get(threading.get_ident())
            if place is None:
                place = self._of_thread[threading.get_ident()] = self.add()
            place.depth += 1

    def leave(self) -> None:
        """The call that this thread entered last is over."""
        with self._changed:
            place = self._of_thread[threading.get_ident()]
            place.depth -= 1
            if not place.depth:
                del self._of_thread[threading.get_ident()]
                self.remove(place)

    @contextmanager
    def computing(self, place: Place) -> Iterator[None]:
        """This thread computes for a place of `add`."""
        thread = threading.get_ident()
        with self._changed:
            outer = self._of_thread.get(thread)
            self._of_thread[thread], place.thread, place.seen = place, thread, time.monotonic()
            place.depth += 1
        try:
            yield
        finally:
            with self._changed:
                place.depth -= 1
                place.seen = time.monotonic()
                del self._of_thread[thread]
                if outer is not None:
                    self._of_thread[thread] = outer

    def pass_begins(self) -> None:
        """This thread is in a forward pass from now on."""
        if (place := self._of_thread.get(threading.get_ident())) is not None:
            place.in_pass, place.num_left = True, self._num_left

    def pass_ends(self, *, whole: bool) -> None:
        """Not any more; `whole` if it came to its end."""
        if (place := self._of_thread.get(threading.get_ident())) is not None:
            place.in_pass, place.seen = False, time.monotonic()
            if whole:
                place.tried = None

    @property
    def is_first(self) -> bool:
        """Whether no call of another thread came before this thread's."""
        with self._changed:
            place = self._of_thread.get(threading.get_ident())
            return place is not None and not any(other.number < place.number for other in self._others(place))

    @property
    def has_others(self) -> bool:
        """Whether other threads are in calls beside this thread's, or were when its last pass began.

        What they gave back meanwhile is worth another try.
        """
        with self._changed:
            place = self._of_thread.get(threading.get_ident())
            return place is not None and self._had_others(place)

    @property
    def others_wait(self) -> bool:
        """Whether other threads wait for blocks."""
        if len(self._places) < 2:
            return False
        with self._changed:
            place = self._of_thread.get(threading.get_ident())
            return place is not None and any(other.enough is not None for other in self._others(place))

    def wait_behind(self) -> None:
        """Let the calls that came before and wait for blocks go first."""
        if self.others_wait:
            self.wait(lambda: True, holds=False)

    def wait(self, enough: Callable[[], bool], *, holds: bool) -> bool:
        """Wait until blocks are there for this thread's call, and for those before it that wait.

        Args:
            enough: whether it finds what it needs; called with the lock.
            holds: it keeps blocks meanwhile.

        Returns: whether it is worth another try; False where nobody can free anything.
        """
        with self._changed:
            place = self._of_thread.get(threading.get_ident())
            if place is None or not self._had_others(place):
                return False
            place.enough, place.holds = enough, holds
            before, hoped = self._free_bytes(), time.monotonic()
            try:
                while not self._may_go(place):
                    if self._may_hope(place):
                        hoped = time.monotonic()
                    elif time.monotonic() - hoped > _GRACE:
                        return self._free_bytes() > before
                    self._changed.wait(_LOOK)
                place.tried = self._free_bytes()
                return True
            finally:
                place.enough, place.seen = None, time.monotonic()
                self._changed.notify_all()

    def _others(self, place: Place) -> list[Place]:
        """Of other threads. What this thread keeps besides cannot come free while it waits."""
        return [other for other in self._places if other.thread != place.thread]

    def _had_others(self, place: Place) -> bool:
        return bool(self._others(place)) or place.num_left != self._num_left

    def _may_go(self, place: Place) -> bool:
        assert place.enough is not None
        # Also settles what finalizers have freed, which `enough` then counts.
        free = self._free_bytes()
        if place.tried is not None and free <= place.tried:
            return False  # it was not enough, whatever was thought
        return place.enough() and not any(
            other.enough is not None and other.number < place.number for other in self._others(place)
        )

    def _may_hope(self, place: Place) -> bool:
        """Whether waiting may help: somebody computes, or will go on, or is to give up before."""
        others = self._others(place)
        waiting = [other for other in others if other.enough is not None]
        if any(other.may_free or (other in waiting and self._may_go(other)) for other in others):
            return True
        waiting = sorted([*waiting, place], key=lambda each: each.number)
        holding = [each for each in waiting if each.holds]
        gives_up = holding[-1] if holding and holding != waiting[:1] else waiting[0]
        return place is not gives_up
