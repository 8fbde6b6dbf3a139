"""Frames of any kind as tables, for stores that hold tables, and which frames must stay together.

Raw streams are tables of one column, ``message``; event streams have ``metadata`` (JSON) and ``payload``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from edgedaq.batch import MESSAGE_COLUMN, BatchDecoder, event_of, raw_messages
from edgedaq.errors import WireError
from edgedaq.frame import FLAG_CONTINUES, FLAG_PIECE, Frame, Kind
from edgedaq.open_info import OpenInfo

from edgedaq_aggregator.stores.backend import Refusal

__all__ = ["TableDecoder", "by_time", "dumped", "each_or_refused", "units_of", "whole_messages"]

T = TypeVar("T")


class TableDecoder:
    """Turns the frames of one stream, of any kind, into record batches."""

    def __init__(self, info: OpenInfo) -> None:
        self._decoder = BatchDecoder(info)

    def batches(self, frames: Sequence[Frame]) -> list[pa.RecordBatch]:
        """Return the rows of frames in order; of RAW pieces, all of their message are there.

        Raises:
            WireError: A body is not what OPEN and its header say.
        """
        kind = frames[0].kind
        if kind is Kind.RAW:
            messages = pa.array(whole_messages(frames), pa.binary())
            return [pa.RecordBatch.from_arrays([messages], names=[MESSAGE_COLUMN])]
        if kind is not Kind.EVENT:
            return self._decoder.batches(frames)
        events = [event_of(frame) for frame in frames]
        try:
            metadata = pa.array([dumped(values) for values, _ in events], pa.string())
        except (ValueError, TypeError, RecursionError) as e:
            message = f"its metadata has no JSON form: {e}"
            raise WireError(message) from e
        payload = pa.array([bytes(payload) for _, payload in events], pa.binary())
        return [pa.RecordBatch.from_arrays([metadata, payload], names=["metadata", "payload"])]


def dumped(value: object) -> str | None:
    """Return a value as JSON, bytes as hex, None as itself."""
    return None if value is None else json.dumps(value, default=_hex, separators=(",", ":"))


def whole_messages(frames: Sequence[Frame]) -> list[bytes]:
    """Return the messages of RAW frames, pieces joined.

    Raises:
        WireError: A table of lengths does not describe its body.
    """
    found: list[bytes] = []
    parts: list[memoryview] = []
    for frame in frames:
        if not frame.flags & FLAG_PIECE:
            found += [bytes(message) for message in raw_messages(frame)]
            continue
        parts.append(frame.body)
        if not frame.flags & FLAG_CONTINUES:
            found.append(b"".join(parts))
            parts = []
    return found


def units_of(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Return what must stay together: single frames, and all pieces of one message."""
    units: list[list[Frame]] = []
    is_within = False
    for frame in frames:
        if is_within:
            units[-1].append(frame)
        else:
            units.append([frame])
        is_within = bool(frame.flags & FLAG_PIECE and frame.flags & FLAG_CONTINUES)
    return units


def by_time(frames: Sequence[Frame], opened_ns: int, period_ns: int) -> Iterator[tuple[int, list[Frame]]]:
    """Split frames where the UTC period changes, e.g. the day; yield its number since 1970.

    Args:
        opened_ns: Time of frames that have none.
    """

    def period_of(unit: list[Frame]) -> int:
        return max(unit[0].t_first_ns or opened_ns, 0) // period_ns

    for period, group in itertools.groupby(units_of(frames), period_of):
        yield period, list(itertools.chain.from_iterable(group))


def each_or_refused(
    encode: Callable[[Sequence[Frame]], list[T]], frames: Sequence[Frame], refused: list[Refusal]
) -> list[T]:
    """Return what ``encode`` makes of frames together; where it cannot, of each that it can.

    Args:
        refused: Those that it cannot are added here.
    """
    try:
        return encode(frames)
    except WireError as e:
        units = units_of(frames)
        if len(units) == 1:
            refused += [Refusal(frame, str(e)) for frame in frames]
            return []
    return [item for unit in units for item in each_or_refused(encode, unit, refused)]


def _hex(value: object) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)
