"""What all writers of streams have in common: slots, and frames that go past the slots.

A put is: write the row into the slot, add it to the slot's commit word, look whether the writer is *armed*.
It is a closure over locals, takes no lock and allocates next to nothing. A writer is armed while everything
in its slot is sealed: the put that comes then stamps the time and wakes the service thread. Everything else
is off that path, and entered because the path failed: no slot, slot full, a value that does not fit.

A writer is used by one thread at a time: those of the thread that made the outlet by that one, those of other
threads under the outlet's side lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgedaq.clock import mono_ns, utc_ns
from edgedaq.gate import Gate, PutTimeout
from edgedaq.open_frames import Body
from edgedaq.ring_layout import (
    W_T_FIRST,
    W_T_PUT,
)
from edgedaq.schema import OpenInfo
from edgedaq.sealing import Account, Sealer, Slot

__all__ = ["EMPTY", "NOWHERE", "Binding", "Lane", "StreamWriter"]

EMPTY = memoryview(bytearray())
"""The data of a writer without a slot: nothing fits into it."""

NOWHERE = memoryview(bytearray(8)).cast("Q")
"""The commit word of a writer without a slot."""


class Lane:
    """The slots that the writers of one kind of thread share. Called with the gate's lock held."""

    def __init__(self, sealer: Sealer, slots: Sequence[Slot]) -> None:
        self._sealer = sealer
        self._slots = list(slots)

    def take(self) -> Slot | None:
        """Return an empty slot, if need be that of the stream that put longest ago; None without room."""
        for slot in self._slots:
            if slot.account is None:
                return slot
        slot = min(self._slots, key=lambda held: held.words[W_T_PUT])
        if not self._sealer.seal(slot):
            return None
        self._sealer.detach(slot)
        self._slots.remove(slot)
        self._slots.append(slot)
        return slot


@dataclass(frozen=True, slots=True)
class Binding:
    """How a writer's closure is told of its slot.

    ``bind`` gives it an empty one, ``unbind`` takes it away, ``arm`` says that all in it is sealed;
    ``disarm`` is the writer's own.
    """

    bind: Callable[[Slot], None]
    unbind: Callable[[], None]
    arm: Callable[[], None]
    disarm: Callable[[], None]


class StreamWriter:
    """One stream; opened when it first puts."""

    def __init__(self, gate: Gate, sealer: Sealer, lane: Lane, stream: int, info: OpenInfo) -> None:
        self.gate = gate
        self.sealer = sealer
        self.info = info
        self.stream = stream
        self.account: Account | None = None
        self._lane = lane
        self._deadline: float | None = None
        self._is_torn = False

    @property
    def slot_bytes(self) -> int:
        """Size of a slot's data."""
        return self.sealer.ring.layout.slot_bytes

    def begun(self, binding: Binding) -> None:
        """Stamp the first row since the slot was sealed, and tell the service thread."""
        account = self.account
        if account is None or account.slot is None:
            return
        with self.gate.condition:
            words = account.slot.words
            if not account.unsealed()[0]:
                return  # it was sealed on the way here: the next one is the first
            if not words[W_T_PUT]:
                words[W_T_FIRST] = utc_ns()
                words[W_T_PUT] = mono_ns()
            binding.disarm()
        self.gate.announce()

    def renew(self, form: int, width: int, binding: Binding, prefix: bytes = b"") -> None:
        """Wait until the writer has an empty slot; what was in its slot is sealed.

        Raises:
            PutTimeout: The deadline of this put has passed.
            JobError: There are too many streams.
        """

        def attempt() -> Slot | None:
            account = self._opened()
            if account is None:
                return None
            slot = account.slot
            if slot is None:
                slot = self._lane.take()
                if slot is None:
                    return None
            elif not self.sealer.seal(slot):
                return None
            else:
                slot.unbind()
            self.sealer.attach(slot, account, form, width, prefix)
            slot.arm, slot.unbind = binding.arm, binding.unbind
            binding.bind(slot)
            return slot

        self.gate.wait_until(attempt, self._deadline)
        self.gate.wake()

    def append(self, bodies: Sequence[Body]) -> None:
        """Wait until frames are published, all at once, behind what is in the slot. Raises like ``renew``."""
        first_ns, put_ns = utc_ns(), mono_ns()

        def attempt() -> bool | None:
            account = self._sealed()
            if account is None:
                return None
            return self.sealer.append(account, bodies, t_first_ns=first_ns, t_put_ns=put_ns) or None

        self.gate.wait_until(attempt, self._deadline)
        self.gate.wake()

    def append_gap(self, rows: int | None, reason: str) -> None:
        """Write down that ``rows`` (None: nobody knows how many) were lost before they could be put."""
        self.gate.interrupt()

        def attempt() -> bool | None:
            account = self._sealed()
            return None if account is None else self.sealer.append_gap(account, rows, reason) or None

        self.gate.wait_until(attempt, self._deadline)
        self.gate.wake()

    @contextmanager
    def limit(self, timeout_s: float | None) -> Iterator[None]:
        """Let the puts inside wait for room no longer than this in total."""
        if timeout_s is None:
            yield
            return
        before = self.rows_put()
        self._deadline = time.monotonic() + timeout_s
        try:
            yield
        except PutTimeout as e:
            e.accepted = self.rows_put() - before
            raise
        finally:
            self._deadline = None

    def rows_put(self) -> int:
        """Return how many rows or messages were put into this stream."""
        return 0 if self.account is None else self.account.put_rows()

    def mark_torn(self) -> None:
        """Note that a message was begun and will not be completed: a GAP without rows will part it."""
        self._is_torn = True

    def _opened(self) -> Account | None:
        if self.account is None:
            self.account = self.sealer.open_stream(self.stream, self.info)
        return self.account

    def _sealed(self) -> Account | None:
        """Return the account once everything that was put is in the ring, and the stream has no slot."""
        account = self._opened()
        if account is None:
            return None
        if account.slot is not None:
            if not self.sealer.seal(account.slot):
                return None
            self.sealer.detach(account.slot)
        if self._is_torn:
            if not self.sealer.append_gap(account, 0, "message not completed"):
                return None
            self._is_torn = False
        return account
