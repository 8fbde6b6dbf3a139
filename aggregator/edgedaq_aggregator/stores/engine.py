"""From entries of the journal to commits of one backend: what every store does alike.

Per stream, by the verdict of the account (``delivery.py``): what is there twice is dropped; what a stream
skips becomes a mark that says how many rows; the rest is gathered, and given to the backend in large pieces.
A RAW message in pieces is held until its last piece has come, and the commit position stays before its first
one: only whole messages are ever stored, and a restart reads them again.

No thread, no clock, no process: ``loop.py`` drives this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from edgedaq.delivery import StreamState, StreamTable, Verdict, gap_of
from edgedaq.errors import WireError
from edgedaq.frame import DATA_KINDS, FLAG_FIRST, FLAG_PIECE, Frame, Kind, decode, unpack_map
from edgedaq.logsetup import get_logger
from edgedaq.open_info import OpenInfo, decode_open
from edgedaq.segment_format import Hole, Record
from edgedaq.segment_gaps import bridge

from edgedaq_aggregator.stores.backend import Backend, Refusal, SettlingBackend
from edgedaq_aggregator.stores.commits import Change
from edgedaq_aggregator.stores.marks import Mark
from edgedaq_aggregator.stores.pieces import Pieces

__all__ = ["StoreEngine"]

WRITE_ROWS = 10_000
WRITE_BYTES = 1 << 20
GATHER_BYTES = 8 << 20
FOREIGN_MAX = 65536


@dataclass(slots=True)
class _Gathered:
    frames: list[Frame] = field(default_factory=list)
    rows: int = 0
    body_bytes: int = 0


class StoreEngine:
    """Feeds one backend, which it recovers first.

    Args:
        key: The streams whose ``store_config`` has it are taken.
        set_aside: Called with a frame that is refused for what it is, before it is passed.
    """

    def __init__(self, key: str, backend: Backend, set_aside: Callable[[Refusal], None]) -> None:
        self._key = key
        self._backend = backend
        self._set_aside = set_aside
        self.table, start = backend.recover()
        self.position = start
        """Consumed up to here (exclusive); None until the follower has said where the journal begins."""
        self.committed_position = start
        self.committed: dict[int, StreamState] = {}
        """Accounts as committed, newest last; bounded as the table is."""
        for account in [*self.table.tombstones.values(), *self.table.streams.values()]:
            self.committed[account.stream] = replace(account)
        self.in_count = self.in_bytes = self.last_in_ns = 0
        self.committed_in = (0, 0)
        """``in_count`` and ``in_bytes`` as of the last commit; after a failure the rest comes again."""
        self.duplicate_count = self.refused_count = 0
        self.stored_rows = self.stored_bytes = 0
        self.stored_by_node: dict[str, int] = {}
        self.commit_count = 0
        self.uncommitted_bytes = 0
        self._infos: dict[int, OpenInfo] = {}
        for account in self.table.streams.values():
            self._infos[account.stream] = decode_open(decode(memoryview(account.open_raw)))
        self._gathered: dict[int, _Gathered] = {}
        self._gathered_bytes = 0
        self._pieces = Pieces()
        self._foreign: dict[int, None] = {}
        self._changed: dict[int, None] = {}
        self._ended: list[int] = []
        self._has_marks = False
        self._under_way: tuple[Change, dict[str, int], int, tuple[int, int]] | None = None
        self._written_bytes = 0
        self._log = get_logger().bind(store=key)

    @property
    def has_changes(self) -> bool:
        """There is something of its streams that is not in a commit."""
        return bool(self._changed) or self._has_marks

    def durable_position(self) -> int | None:
        """Return up to where the journal may be trimmed: what is committed, and durable in the backend."""
        if isinstance(self._backend, SettlingBackend):
            return self._backend.durable_position()
        return self.committed_position

    def facts(self) -> dict[str, Any]:
        """Return what the backend tells about itself."""
        return self._backend.facts()

    def wants(self, stream: int) -> bool:
        """Tell whether frames of a stream may be for this store: all but those known to be for others only.

        A stream's first frames are asked about before its OPEN was taken.
        """
        return stream not in self._foreign

    def begin(self, position: int, known: StreamTable) -> None:
        """Learn where reading begins, and which streams there are.

        Args:
            known: The account of all streams at ``position``; those of this store that it does not have are
                taken from there on, with a mark that says what came before; also of those that have ended.
        """
        self.position = position
        is_ours = self._is_ours(known)
        for stream in known.streams:
            if not is_ours(stream):
                self._pass_over(stream)
        for frame in bridge(self._held, known, "not in the journal when it began", is_ours):
            self._take(frame, position)

    def take(self, entries: Iterable[Record | Hole]) -> None:
        """Consume entries in order.

        Raises:
            StoreError, OSError: The backend does not take the data; this engine is then of no more use.
        """
        for entry in entries:
            if isinstance(entry, Record):
                self._take(entry.frame, entry.position)
                self.position = entry.end
                continue
            self._log.error("journal.hole", first=entry.first, last=entry.last, reason=entry.reason)
            if entry.table is not None:
                for frame in bridge(self._held, entry.table, entry.reason, self._is_ours(entry.table)):
                    self._take(frame, entry.first)
            self.position = entry.last

    def write_gathered(self) -> None:
        """Give the backend what was gathered; as long as it is held, so is all that was read with it."""
        for stream in list(self._gathered):
            self._write(stream)

    def reach(self, position: int) -> None:
        """Learn that everything before ``position`` was given to ``take``, or is not for this store."""
        self.position = position

    def commit(self, *, is_clean: bool = False) -> Callable[[], None]:
        """Write everything gathered; return what makes it durable in any thread, before ``committed_now``."""
        self.write_gathered()
        accounts = []
        stored: dict[str, int] = {}
        for stream in self._changed:
            account = self._pieces.before(stream) or self._account(stream)
            if account is not None:
                accounts.append(replace(account))
                known, node = self.committed.get(stream), self._infos[stream].node
                stored[node] = stored.get(node, 0) + account.rows - (known.rows if known else 0)
        for stream in self._ended:
            self._backend.end(stream)
            self._infos.pop(stream, None)
        self._ended.clear()
        change = Change(self._pieces.position(self.position), accounts=accounts, clean=is_clean)
        make_durable = self._backend.commit(change)
        self._under_way = change, stored, self._written_bytes, (self.in_count, self.in_bytes)
        self._written_bytes = self.uncommitted_bytes = 0
        self._changed = dict.fromkeys(self._pieces.streams())
        self._has_marks = False
        return make_durable

    def committed_now(self) -> None:
        """Be told that the commit under way is durable."""
        if self._under_way is None:
            return
        change, stored, body_bytes, self.committed_in = self._under_way
        self._under_way = None
        self._backend.committed()
        self.committed_position = change.position
        for node, rows in stored.items():
            self.stored_rows += rows
            self.stored_by_node[node] = self.stored_by_node.get(node, 0) + rows
        self.stored_bytes += body_bytes
        self.commit_count += 1
        for account in change.accounts:
            self.committed.pop(account.stream, None)
            self.committed[account.stream] = account
        held = len(self.table.streams) + self.table.tombstones_max
        while len(self.committed) > held:
            del self.committed[next(iter(self.committed))]

    def _take(self, frame: Frame, position: int) -> None:
        stream = frame.stream
        state = self.table.streams.get(stream)
        if state is None:
            if frame.kind is Kind.OPEN and stream not in self.table.tombstones:
                self._open(frame)
            return
        verdict = self.table.judge(frame)
        if verdict is Verdict.DUPLICATE:
            self.duplicate_count += 1
            return
        if verdict is Verdict.AHEAD:
            self._skip(state, frame)
        elif frame.row0 > state.next_row and frame.kind is not Kind.GAP:
            self._skip_rows(state, frame)
        self.in_count += frame.rows
        self.in_bytes += len(frame.body)
        self._changed[stream] = None
        self.uncommitted_bytes += len(frame.raw)
        if frame.kind not in DATA_KINDS:
            self._take_mark(frame, state)
        elif frame.flags & FLAG_PIECE and frame.kind is Kind.RAW:
            self._take_piece(frame, state, position)
        else:
            self._interrupt(stream, "its pieces end in the middle")
            self.table.apply(frame)
            self._gather(stream, [frame])

    def _open(self, frame: Frame) -> None:
        try:
            info = decode_open(frame)
            if self._key not in info.store_config:
                self._pass_over(frame.stream)
                return
            self.table.apply(frame)
        except WireError as e:
            self._log.error("stream.refused", stream=f"{frame.stream:016x}", reason=str(e))
            return
        self._infos[frame.stream] = info
        self._changed[frame.stream] = None
        self._backend.open(frame.stream, info)

    def _pass_over(self, stream: int) -> None:
        self._foreign[stream] = None
        if len(self._foreign) > FOREIGN_MAX:
            del self._foreign[next(iter(self._foreign))]

    def _take_mark(self, frame: Frame, state: StreamState) -> None:
        stream, kind = frame.stream, frame.kind
        info, before_ns = self._infos[stream], state.t_last_ns
        first, last, rows, reason = frame.seq, frame.seq, None, ""
        gap_rows = state.gap_rows
        self._interrupt(stream, f"its pieces end in a {kind.name}")
        try:
            if kind is Kind.GAP:
                first = max(frame.seq, state.next_seq)
                last, rows, reason = gap_of(frame)
                if rows is not None:
                    rows = max(frame.row0 + rows - state.next_row, 0)
            elif kind is Kind.CLOSE:
                body = unpack_map(frame.body)
                if not body.get("tail_unknown"):
                    reason = "-"
                else:
                    reason = f"the tail is not known, at most {body.get('bound_s')} s of it"
            elif kind in (Kind.START, Kind.STOP):
                reason = str(unpack_map(frame.body))
            self.table.apply(frame)
        except WireError as e:
            self._refuse(Refusal(frame, str(e)))
            state.next_seq = frame.seq + 1
            self._mark(Mark(info, stream, "refused", before_ns, frame.seq, frame.seq, 0, str(e)))
            return
        state.gap_rows = gap_rows + (rows or 0)  # of a GAP that overlaps what came, only what did not
        if kind is Kind.CLOSE:
            self._ended.append(stream)
            if reason == "-":
                return
        self._mark(Mark(info, stream, kind.name.lower(), before_ns, first, last, rows, reason))

    def _take_piece(self, frame: Frame, state: StreamState, position: int) -> None:
        if frame.flags & FLAG_FIRST:
            self._interrupt(frame.stream, "another message begins in its middle")
        before = replace(state)
        self.table.apply(frame)
        whole = self._pieces.add(frame, before, position)
        if isinstance(whole, str):
            self._lose(frame, whole)
        elif whole:
            self._gather(frame.stream, whole)

    def _interrupt(self, stream: int, reason: str) -> None:
        """Drop a message that will not be whole. It counts no row: only a last piece does."""
        dropped = self._pieces.interrupt(stream)
        if dropped is None:
            return
        first, size_bytes = dropped
        state = self.table.streams[stream]
        reason = f"a message of more than {size_bytes} bytes was not stored: {reason}"
        last = state.next_seq - 1
        self._mark(Mark(self._infos[stream], stream, "gap", state.t_last_ns, first, last, 0, reason))

    def _skip(self, state: StreamState, frame: Frame) -> None:
        """Write down that frames are missing here, and go on behind them."""
        stream = state.stream
        reason = "missing in the journal"
        self._interrupt(stream, reason)
        rows = frame.row0 - state.next_row if frame.row0 >= state.next_row else None
        info, before_ns, first = self._infos[stream], state.t_last_ns, state.next_seq
        self._mark(Mark(info, stream, "gap", before_ns, first, frame.seq - 1, rows, reason))
        state.gap_frames += frame.seq - state.next_seq
        state.gap_rows += rows or 0
        state.gaps_unknown += rows is None
        state.next_seq, state.next_row = frame.seq, frame.row0

    def _skip_rows(self, state: StreamState, frame: Frame) -> None:
        """Count rows that the producer numbered, but that no frame speaks of, or one that knew no number."""
        rows = frame.row0 - state.next_row
        if state.gaps_unknown:
            state.gaps_unknown -= 1
        else:
            info, first = self._infos[state.stream], frame.seq
            reason = "its producer has passed them over"
            self._mark(Mark(info, state.stream, "gap", state.t_last_ns, first, first - 1, rows, reason))
        state.gap_rows += rows
        state.next_row = frame.row0

    def _gather(self, stream: int, frames: list[Frame]) -> None:
        held = self._gathered.get(stream)
        if held is None:
            held = self._gathered[stream] = _Gathered()
        for frame in frames:
            held.frames.append(frame)
            held.rows += frame.rows
            held.body_bytes += len(frame.body)
            self._gathered_bytes += len(frame.body)
        if held.rows >= WRITE_ROWS or held.body_bytes >= WRITE_BYTES:
            self._write(stream)
        elif self._gathered_bytes >= GATHER_BYTES:
            self.write_gathered()

    def _write(self, stream: int) -> None:
        held = self._gathered.pop(stream)
        self._gathered_bytes -= held.body_bytes
        refusals = self._backend.write(stream, held.frames)
        self._written_bytes += held.body_bytes
        for refusal in refusals:
            self._written_bytes -= len(refusal.frame.body)
            self._refuse(refusal)
            self._lose(refusal.frame, refusal.reason)

    def _refuse(self, refusal: Refusal) -> None:
        self.refused_count += 1
        self._set_aside(refusal)

    def _lose(self, frame: Frame, reason: str) -> None:
        """Count rows as missing that were counted as stored, and write it down."""
        stream, rows = frame.stream, frame.rows
        for account in (self._account(stream), self._pieces.before(stream)):
            if account is not None:
                account.rows -= rows
                account.gap_rows += rows
        info = self._infos[stream]
        self._mark(Mark(info, stream, "refused", frame.t_first_ns, frame.seq, frame.seq, rows, reason))

    def _mark(self, mark: Mark) -> None:
        self._has_marks = True
        self._backend.write_mark(mark)

    def _account(self, stream: int) -> StreamState | None:
        return self.table.streams.get(stream) or self.table.tombstones.get(stream)

    def _held(self, stream: int) -> tuple[int, int] | None:
        state = self._account(stream)
        return None if state is None else (state.next_seq, state.next_row)

    def _is_ours(self, known: StreamTable) -> Callable[[int], bool]:
        """Tell by the OPEN in an account whether a stream is for this store."""

        def check(stream: int) -> bool:
            state = known.streams.get(stream) or known.tombstones.get(stream)
            if state is None:
                return False
            try:
                return self._key in decode_open(decode(memoryview(state.open_raw))).store_config
            except WireError:
                return False

        return check
