"""What jobs in the control room are handed of all nodes: their topics, from the journal, without loss.

A job is for the journal what a store is: registered by its unique id at its first start, it begins with what
comes from then on, and the journal is not trimmed before it. What was handled is written down every
``SAVE_EVERY_S`` and at an orderly end; a job that died is handed again what came after that. Streams of this
aggregator's own node are left out: they come by its rings.

``<state_dir>/jobs/<unique id>.json``, replaced in one step::

    position   int                        everything in the journal before it was handled
    streams    {16 hex: [int, int]}       of each open stream of its topics: next seq, next row, as handled

A message in pieces is handled with its last piece; until then the position stays before its first one. If the
file cannot be read, the journal knows a position that is older. What is missing is handed over as a GAP.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import zmq
from edgedaq.delivery import StreamTable, gap_of
from edgedaq.errors import WireError
from edgedaq.feeds import Portion
from edgedaq.frame import FLAG_CONTINUES, FLAG_FIRST, FLAG_PIECE, Frame, Kind, decode
from edgedaq.job_context import WorkerSpec
from edgedaq.logsetup import get_logger
from edgedaq.messages import MessageReader
from edgedaq.names import matches_any
from edgedaq.open_info import OpenInfo, decode_open
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_gaps import bridge, gap_frame

from edgedaq_aggregator.journal_client import JournalFollower

__all__ = ["JournalFeed"]

SAVE_EVERY_S = 0.5
_READ_AHEAD = 4
_FOREIGN_MAX = 65536


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Stream = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    position: _Count | None = None
    streams: dict[_Stream, tuple[_Count, _Count]] = {}


@dataclass(slots=True)
class _Account:
    """One open stream of the topics: what comes next of it, and the message in pieces that it is in."""

    info: OpenInfo
    next_seq: int = 1
    next_row: int = 0
    begun: tuple[int, int, int] | None = None
    """Position, seq and row of the first piece of a message whose last one has not come."""


class JournalFeed:
    """The feed of one job; see ``edgedaq.feeds``."""

    def __init__(self, spec: WorkerSpec, topics: Sequence[str], context: zmq.Context[Any]) -> None:
        self.reader = MessageReader()
        self._node = spec.node
        self._topics = list(topics)
        self._path = Path(spec.state_dir) / "jobs" / f"{spec.unique_id}.json"
        self._log = get_logger()
        self._saved = self._load()
        self._resume = {int(key, 16): handled for key, handled in self._saved.streams.items()}
        self._accounts: dict[int, _Account] = {}
        self._foreign: dict[int, None] = {}
        self._has_begun = False
        self._is_between = True
        self._reached: int | None = None
        self._save_due_s = 0.0
        self._follower = JournalFollower(
            Path(spec.state_dir) / "journal",
            Path(spec.runtime_dir),
            spec.unique_id,
            self._saved.position,
            from_begin=False,
            wants=lambda stream: stream not in self._foreign,
            context=context,
        )

    def pollables(self) -> list[Any]:
        """Return the socket of the journal."""
        return self._follower.pollables()

    def receive(self) -> list[Portion]:
        """Return what is durable in the journal and was not handed over, some of it."""
        portions: list[Portion] = []
        for _ in range(_READ_AHEAD):
            entries = self._follower.read(0)
            position = self._follower.position
            if position is None:
                return []
            if not self._has_begun:
                self._begin(entries[0][0] if entries else position)
            if not entries:
                break
            portions.append(Portion(self._frames(entries), partial(self._reach, position)))
        if not portions and self._follower.position is not None:
            self._reach(self._follower.position)
        return portions

    def close(self) -> None:
        """Write down what was handled, and end."""
        if self._is_between:
            with contextlib.suppress(OSError):
                self._save()
        self._follower.close()

    def _begin(self, position: int) -> None:
        """Learn which streams are open where reading begins, and go on in them or take them from here on."""
        self._has_begun = True
        known = self._follower.table_at_start()
        self._resume_in(known)
        is_ours = self._is_ours(known)
        for stream, state in known.streams.items():
            if not is_ours(stream):
                self._pass_over(stream)
            elif stream not in self._accounts:
                info = decode_open(decode(memoryview(state.open_raw)))
                self._accounts[stream] = _Account(info, state.next_seq, state.next_row)
        self._log.info("journal.followed", position=position, streams_count=len(self._accounts))

    def _resume_in(self, known: StreamTable) -> None:
        """Take up the streams that were being handled, as far as an account of the journal tells of them."""
        is_ours = self._is_ours(known)
        for state in [*known.tombstones.values(), *known.streams.values()]:
            handled = self._resume.pop(state.stream, None)
            if handled is not None and is_ours(state.stream):
                self._accounts[state.stream] = _Account(
                    decode_open(decode(memoryview(state.open_raw))), *handled
                )

    def _frames(self, entries: Iterable[Record | Hole]) -> Iterator[tuple[OpenInfo, Frame]]:
        self._is_between = False
        for entry in entries:
            if isinstance(entry, Record):
                yield from self._take(entry.frame, entry.position)
                continue
            self._log.error("journal.hole", first=entry.first, last=entry.last, reason=entry.reason)
            if entry.table is not None:
                self._resume_in(entry.table)
                for frame in bridge(self._held, entry.table, entry.reason, self._is_ours(entry.table)):
                    yield from self._take(frame, entry.first)

    def _take(self, frame: Frame, position: int) -> Iterator[tuple[OpenInfo, Frame]]:
        """Yield a frame that comes next in its stream, behind a GAP for what should have come before."""
        account = self._accounts.get(frame.stream)
        if account is None:
            if frame.kind is Kind.OPEN and frame.stream not in self._foreign:
                self._open(frame)
            return
        last, rows = frame.seq, frame.rows
        if frame.kind is Kind.GAP:
            last, lost, _ = gap_of(frame)
            rows = lost or 0
        if last < account.next_seq:
            return
        if frame.seq > account.next_seq:
            missing = frame.row0 - account.next_row
            yield (
                account.info,
                gap_frame(
                    frame.stream,
                    account.next_seq,
                    frame.seq - 1,
                    account.next_row,
                    missing if missing >= 0 else None,
                    "missing in the journal",
                ),
            )
            account.begun = None
            account.next_seq = frame.seq
        if not frame.flags & FLAG_PIECE or frame.kind is not Kind.RAW:
            account.begun = None
        elif frame.flags & FLAG_FIRST:
            account.begun = position, account.next_seq, account.next_row
        if not frame.flags & FLAG_CONTINUES:
            account.begun = None
        account.next_seq, account.next_row = last + 1, frame.row0 + rows
        if frame.kind is Kind.CLOSE:
            del self._accounts[frame.stream]
        yield account.info, frame

    def _open(self, frame: Frame) -> None:
        try:
            info = decode_open(frame)
        except WireError as e:
            self._log.error("stream.refused", stream=f"{frame.stream:016x}", reason=str(e))
            return
        if self._wants(info):
            self._accounts[frame.stream] = _Account(info)
        else:
            self._pass_over(frame.stream)

    def _wants(self, info: OpenInfo) -> bool:
        return info.node != self._node and matches_any(self._topics, info.topics)

    def _is_ours(self, known: StreamTable) -> Callable[[int], bool]:
        """Tell by the OPEN in an account whether a stream is wanted."""

        def check(stream: int) -> bool:
            state = known.streams.get(stream) or known.tombstones.get(stream)
            try:
                return state is not None and self._wants(decode_open(decode(memoryview(state.open_raw))))
            except WireError:
                return False

        return check

    def _held(self, stream: int) -> tuple[int, int] | None:
        account = self._accounts.get(stream)
        return None if account is None else (account.next_seq, account.next_row)

    def _pass_over(self, stream: int) -> None:
        self._foreign[stream] = None
        if len(self._foreign) > _FOREIGN_MAX:
            del self._foreign[next(iter(self._foreign))]

    def _reach(self, position: int) -> None:
        """Take note that everything before a position was handled."""
        self._is_between = True
        self._reached = position
        if time.monotonic() >= self._save_due_s:
            self._save_due_s = time.monotonic() + SAVE_EVERY_S
            self._save()

    def _load(self) -> _Saved:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Saved)
        except FileNotFoundError:
            return _Saved()
        except (OSError, msgspec.MsgspecError) as e:
            self._log.error("position.damaged", path=str(self._path), reason=str(e))
            return _Saved()

    def _save(self) -> None:
        """Write down what was handled, durably, then let the journal trim it.

        Raises:
            OSError: The disk does not take it; the journal is told nothing.
        """
        if self._reached is None:
            return
        begun = [account.begun for account in self._accounts.values() if account.begun is not None]
        streams = {
            f"{stream:016x}": (account.next_seq, account.next_row)
            if account.begun is None
            else account.begun[1:]
            for stream, account in self._accounts.items()
        }
        position = min([self._reached, *(first for first, _, _ in begun)])
        saved = _Saved(position, streams)
        if saved == self._saved:
            return
        self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(saved) + b"\n")
            file.flush()
            os.fdatasync(file.fileno())
        new.replace(self._path)
        self._saved = saved
        self._follower.report(position)
