"""The writer of tables of Python values.

A stream of rows begins PACKED, if its schema allows. A value that its column cannot hold, or a missing one,
turns the stream to COLUMNS for good: rows then lie in the slot as msgpack, and the dtypes that were widened
so far before them.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import msgspec

from edgedaq.errors import JobError
from edgedaq.frame import Kind
from edgedaq.open_frames import Body
from edgedaq.ring_layout import (
    FORM_PACKED,
    FORM_ROWS,
    W_COMMIT,
)
from edgedaq.schema import MISFIT, Schema, pack_rows, row_packer, split_columns, to_columns
from edgedaq.sealing import Slot
from edgedaq.stream_writer import EMPTY, NOWHERE, Binding, StreamWriter
from edgedaq.table_rows import check_row, columns_to_rows
from edgedaq.values import EXACT_TYPES, fit_values

__all__ = ["TableWriter"]

PutBlocks = Callable[[Sequence[Sequence[Any]], int], int]

_BLOCKS = (128, 64, 32, 16, 8)
_ROWS = (list, tuple)


class TableWriter(StreamWriter):
    """One stream of rows. ``put(row)`` is the fast path: fetch it once, call it often."""

    put: Callable[[Sequence[Any]], None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.info.schema is None:
            message = f"job {self.info.job}: a table of rows needs a schema"
            raise JobError(message)
        self.schema: Schema = self.info.schema
        is_packed = self.schema.is_packed and self.schema.row_bytes <= self.slot_bytes
        self._put_blocks: PutBlocks = _no_block
        self.put = _packed_put(self) if is_packed else _columns_put(self)

    def put_rows(self, rows: Sequence[Sequence[Any]], timeout_s: float | None = None) -> None:
        """Put rows; one that cannot be put does not undo those before it.

        Raises:
            JobError: A row has another number of values than the table has columns.
            PutTimeout: There was no room in time; it says how many rows were taken.
        """
        if timeout_s is not None:
            with self.limit(timeout_s):
                self.put_rows(rows)
        elif type(rows) in _ROWS and len(rows) >= _BLOCKS[-1]:
            done = 0
            while done < len(rows):
                done = self._put_blocks(rows, done)
                for row in rows[done : done + _BLOCKS[-1]]:
                    self.put(row)
                done += _BLOCKS[-1]
        else:
            for row in rows:
                self.put(row)

    def put_columns(
        self, columns: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]], timeout_s: float | None = None
    ) -> None:
        """Put a table given by columns, by name or in order; raises like ``puts``."""
        self.put_rows(columns_to_rows(self.schema.names, columns), timeout_s)

    def use_blocks(self, put_blocks: PutBlocks) -> None:
        """Put many rows by ``put_blocks``: from an index on, up to the one that it returns."""
        self._put_blocks = put_blocks

    def turn_to_columns(self, row: Sequence[Any]) -> Callable[[Sequence[Any]], None]:
        """Put a row that has no PACKED form, and all after it, as COLUMNS; return what puts them."""
        self.check_width(row)
        self._put_blocks = _no_block
        self.put = _columns_put(self)
        self.put(row)
        return self.put

    def check_width(self, values: Sequence[Any]) -> None:
        """Refuse a row that is not one.

        Raises:
            JobError: It is no row, or has another number of values than the table has columns.
        """
        check_row(self.info.job, values)
        names = self.schema.names
        if len(values) != len(names):
            message = (
                f"job {self.info.job}: a row must have {len(names)} values ({', '.join(names)}), "
                f"got {len(values)}"
            )
            raise JobError(message)


def _no_block(_: Sequence[Sequence[Any]], begin: int) -> int:
    """Take nothing: each row goes by itself."""
    return begin


def _packed_put(writer: TableWriter) -> Callable[[Sequence[Any]], None]:
    schema = writer.schema
    row_bytes = schema.row_bytes
    width = len(schema.columns)
    step = (1 << 32) + row_bytes
    used_bytes = writer.slot_bytes // row_bytes * row_bytes
    data = EMPTY
    commit = NOWHERE
    offset = word = 0
    is_armed = False
    instead: Callable[[Sequence[Any]], None] | None = None
    begun = writer.begun
    whole = schema.row_struct

    if whole is not None:
        pack_into = whole.pack_into
        blocks = [(size, struct.Struct(f"<{whole.format[1:] * size}").pack_into) for size in _BLOCKS]

        def put(row: Sequence[Any]) -> None:
            nonlocal offset, word
            try:
                pack_into(data, offset, *row)
            except MISFIT:
                slow(row)
                return
            offset += row_bytes
            word += step
            commit[0] = word
            if is_armed:
                begun(binding)

        def put_blocks(rows: Sequence[Sequence[Any]], begin: int) -> int:
            nonlocal offset, word
            done = begin
            for size, pack_block in blocks:
                while len(rows) - done >= size:
                    end = offset + size * row_bytes
                    if end > len(data):
                        break
                    block = rows[done : done + size]
                    try:
                        if list(map(len, block)).count(width) != size:
                            return done
                        pack_block(data, offset, *itertools.chain.from_iterable(block))
                    except MISFIT:
                        return done
                    offset = end
                    word += size * step
                    commit[0] = word
                    done += size
                    if is_armed:
                        begun(binding)
            return done

        writer.use_blocks(put_blocks)

    else:
        pack = row_packer(schema)

        def put(row: Sequence[Any]) -> None:
            nonlocal offset, word
            try:
                if offset >= len(data):
                    slow(row)
                    return
                pack(data, offset, row)
            except MISFIT:
                slow(row)
                return
            offset += row_bytes
            word += step
            commit[0] = word
            if is_armed:
                begun(binding)

    def slow(row: Sequence[Any]) -> None:
        nonlocal instead
        if instead is not None:
            instead(row)
            return
        writer.gate.interrupt()
        if offset < len(data):
            instead = writer.turn_to_columns(row)
            return
        writer.check_width(row)
        writer.renew(FORM_PACKED, row_bytes, binding)
        put(row)

    def bind(slot: Slot) -> None:
        nonlocal data, commit, offset, word, is_armed
        data, commit = slot.data[:used_bytes], slot.words[W_COMMIT : W_COMMIT + 1]
        offset = word = 0
        is_armed = True

    def unbind() -> None:
        nonlocal data, commit, offset
        data, commit, offset = EMPTY, NOWHERE, 0

    def arm() -> None:
        nonlocal is_armed
        is_armed = True

    def disarm() -> None:
        nonlocal is_armed
        is_armed = False

    binding = Binding(bind, unbind, arm, disarm)
    return put


class _Fitter:
    """What the columns of a stream hold by now; makes a row what msgpack can hold of it."""

    def __init__(self, schema: Schema) -> None:
        self._names = schema.names
        self._texts = [column.text for column in schema.columns]
        self._shaped = [bool(column.shape) for column in schema.columns]
        self.dtypes: dict[str, str] = {}
        self.kinds: tuple[Any, ...] = ()
        self._note_kinds()

    def _note_kinds(self) -> None:
        self.kinds = tuple(EXACT_TYPES.get(text) for text in self._texts)

    def fit(self, values: Sequence[Any], *, all_of_them: bool) -> tuple[list[Any], bool]:
        """Return a row's values as COLUMNS holds them, and whether that widened a column."""
        fitted = list(values)
        is_wider = False
        for index, value in enumerate(values):
            if value is None or (not all_of_them and type(value) is self.kinds[index]):
                continue
            (fitted[index],), text = fit_values((value,), self._texts[index])
            if text != self._texts[index]:
                self._texts[index] = self.dtypes[self._names[index]] = text
                is_wider = True
        if is_wider:
            self._note_kinds()
        return fitted, is_wider


def _columns_put(writer: TableWriter) -> Callable[[Sequence[Any]], None]:
    one = 1 << 32
    data = EMPTY
    ends = EMPTY
    commit = NOWHERE
    offset = count = room = 0
    is_armed = False
    fitter = _Fitter(writer.schema)
    prefix = b""
    packer = msgspec.msgpack.Encoder()
    begun = writer.begun

    def put(row: Sequence[Any]) -> None:
        nonlocal offset, count, prefix
        is_wider = False
        held = row
        if type(row) not in _ROWS or tuple(map(type, row)) != fitter.kinds:
            writer.check_width(row)
            held, is_wider = fitter.fit(row, all_of_them=False)
        try:
            raw = packer.encode(held)
        except (OverflowError, ValueError, TypeError):
            held, is_wider = fitter.fit(row, all_of_them=True)
            raw = packer.encode(held)
        if is_wider:
            prefix = msgpack.packb(fitter.dtypes)
        end = offset + len(raw)
        if is_wider or end > room or count >= len(ends):
            writer.gate.interrupt()
            if len(prefix) + len(raw) > writer.slot_bytes:
                put_large(held)
                return
            writer.renew(FORM_ROWS, len(prefix), binding, prefix)
            end = offset + len(raw)
        ends[count] = end
        data[offset:end] = raw
        count += 1
        offset = end
        commit[0] = count * one + end
        if is_armed:
            begun(binding)

    def put_large(values: Sequence[Any]) -> None:
        """Put one row past the slots."""
        limit = writer.sealer.limit
        schema = writer.schema
        if not fitter.dtypes and None not in values and schema.is_packed:
            body = pack_rows(schema, [values])
            bodies = [Body(Kind.PACKED, (body,), 1)] if len(body) <= limit else []
        else:
            columns = to_columns(schema, [values])
            found = split_columns(schema, columns, limit, fitter.dtypes)
            bodies = [Body(Kind.COLUMNS, (body,), rows) for body, rows in found]
        if not bodies:
            message = f"one row must have at most {limit} bytes, got {schema.row_bytes}"
            raise JobError(message)
        writer.append(bodies)

    def bind(slot: Slot) -> None:
        nonlocal data, ends, commit, offset, count, room, is_armed
        data, ends, commit = slot.data, slot.ends, slot.words[W_COMMIT : W_COMMIT + 1]
        offset, count, room = len(prefix), 0, len(slot.data)
        is_armed = True

    def unbind() -> None:
        nonlocal data, ends, commit, offset, count, room
        data = ends = EMPTY
        commit = NOWHERE
        offset = count = room = 0

    def arm() -> None:
        nonlocal is_armed
        is_armed = True

    def disarm() -> None:
        nonlocal is_armed
        is_armed = False

    binding = Binding(bind, unbind, arm, disarm)
    return put
