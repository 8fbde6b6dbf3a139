"""Plays what was stored once more: a rehearsal of everything behind the device, without the device.

``path`` is a CSV or Parquet file, or a directory of such files: a stored run, of whose files each is a stream
of its own under its own name. Rows come at the pace of their ``time_column``, ``speed`` times faster, all
files together by time; 0 is as fast as they are taken, and then a time is not needed. What the rows hold is
put as it is, their times included.

CSV needs no library (``.csv.zst`` pyarrow); the first line names the columns. What a column is, is what its
first 1000 values are: whole numbers, floats, ``true`` or ``false``, lists (``[1,2,3]``), ISO 8601 in the
time column, else text. An empty cell is a missing value. Parquet needs pyarrow, and keeps its types.
Files of marks are passed over, and lines of another width; ``skipped_lines`` in the job's report counts them.
"""

from __future__ import annotations

import csv
import datetime as dt
import heapq
import io
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from edgedaq.clock import mono_ns
from edgedaq.config import StorableDAQJobConfig
from edgedaq.errors import ConfigError, JobError
from edgedaq.job import DAQJob
from edgedaq.schema import Column, Schema
from edgedaq.store_config import MARKS_FILE, DAQJobStoreConfig
from msgspec import Meta

__all__ = ["DAQJobReplay", "DAQJobReplayConfig", "time_ns"]

_SUFFIXES = (".csv", ".csv.zst", ".parquet")
_ROWS = 1000
_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")
_SECONDS_END, _MILLISECONDS_END, _MICROSECONDS_END = 1e11, 1e14, 1e17  # of the year 5138, each
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Put = Callable[[int, int], None]


class DAQJobReplayConfig(StorableDAQJobConfig, kw_only=True):
    """``path`` begins at the directory of the TOML; ``repeat`` 0 plays for ever."""

    path: str
    speed: Annotated[float, Meta(ge=0)] = 1.0
    time_column: str = "timestamp"
    repeat: Annotated[int, Meta(ge=0)] = 1


class _Chunk(NamedTuple):
    """Some rows of a file: their times, which never fall, and what puts those from one index to another."""

    times: list[int]
    put: Put


class DAQJobReplay(DAQJob):
    """Plays ``path``, then ends."""

    config_type = DAQJobReplayConfig
    config: DAQJobReplayConfig

    def start(self) -> None:
        """Play all files, as often as asked for.

        Raises:
            ConfigError: There is nothing to play, or nothing tells at which pace.
        """
        self._skipped_lines = 0
        path = Path(self.context.spec.config_file).parent / self.config.path
        for _ in range(self.config.repeat) if self.config.repeat else itertools.count():
            self._play([self._chunks(path, file) for file in _files(path)])

    def report(self) -> dict[str, Any]:
        """Return how many lines were passed over."""
        return {"skipped_lines": getattr(self, "_skipped_lines", 0)}

    def _play(self, sources: Sequence[Iterator[_Chunk]]) -> None:
        """Put the rows of all sources in the order of their times, each when it is due."""
        held = [(next(source, None), source) for source in sources]
        heap = [
            (chunk.times[0], index, 0, chunk, source)
            for index, (chunk, source) in enumerate(held)
            if chunk is not None
        ]
        heapq.heapify(heap)
        begun_ns, first_ns = mono_ns(), heap[0][0] if heap else 0
        while heap:
            time, index, begin, chunk, source = heap[0]
            until = min((entry[0] for entry in heap[1:3]), default=chunk.times[-1])
            if self.config.speed:
                now_ns = first_ns + int((mono_ns() - begun_ns) * self.config.speed)
                if time > now_ns:
                    self.sleep((time - now_ns) / self.config.speed / 1e9)
                    continue
                until = min(until, now_ns)
            end = max(bisect_right(chunk.times, until, begin), begin + 1)
            chunk.put(begin, end)
            if end == len(chunk.times):
                following = next(source, None)
                if following is None:
                    heapq.heappop(heap)
                    continue
                chunk, end = following, 0
            heapq.heapreplace(heap, (chunk.times[end], index, end, chunk, source))

    def _chunks(self, path: Path, file: Path) -> Iterator[_Chunk]:
        where: dict[str, Any] = {}
        if file != path:  # one of a stored run: a stream of its own, stored under its own name
            name = str(file.relative_to(path))
            name = name[: -len(next(suffix for suffix in _SUFFIXES if name.endswith(suffix)))]
            where = {"tag": name, "store_config": _named(self.config.store_config, name)}
        found = self._parquet(file, where) if file.suffix == ".parquet" else self._csv(file, where)
        latest = None
        for times, put in found:
            rising = list(itertools.accumulate(times, max, initial=latest))
            rising = rising if latest is None else rising[1:]
            latest = rising[-1]
            yield _Chunk(rising, put)

    def _csv(self, file: Path, where: dict[str, Any]) -> Iterator[tuple[Iterable[int], Put]]:
        with _open_text(file) as lines:
            reader = csv.reader(lines)
            names = tuple(next(reader, ()))
            time_at = self._time_at(file, names)
            readers: list[Callable[[str], Any]] = []
            schema: Schema | None = None
            while cells := list(itertools.islice(reader, _ROWS)):
                whole = [row for row in cells if len(row) == len(names)]
                self._skipped_lines += len(cells) - len(whole)
                if not whole:
                    continue
                if schema is None:
                    readers = [
                        _reader_of(column, at == time_at)
                        for at, column in enumerate(zip(*whole, strict=True))
                    ]
                rows = [[read(cell) for read, cell in zip(readers, row, strict=True)] for row in whole]
                schema = schema or _schema_of(names, rows, readers)
                times = [0] * len(rows) if time_at is None else [time_ns(row[time_at]) for row in rows]
                yield times, self._putter_of_rows(rows, schema, where)

    def _putter_of_rows(self, rows: list[list[Any]], schema: Schema, where: dict[str, Any]) -> Put:
        return lambda begin, end: self.put_rows(rows[begin:end], schema=schema, **where)

    def _parquet(self, file: Path, where: dict[str, Any]) -> Iterator[tuple[Iterable[int], Put]]:
        try:
            import pyarrow as pa  # noqa: PLC0415  # CSV goes without
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError as e:
            message = f"{file}: Parquet needs pyarrow, which is not installed here"
            raise ConfigError(message) from e
        with parquet.ParquetFile(file) as stored:
            time_at = self._time_at(file, stored.schema_arrow.names)
            for batch in stored.iter_batches(_ROWS):
                times = [0] * batch.num_rows
                if time_at is not None:
                    column = batch.column(time_at)
                    if pa.types.is_timestamp(column.type):
                        column = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
                    times = [time_ns(value) for value in column.to_pylist()]
                yield times, self._putter_of_batch(batch, where)

    def _putter_of_batch(self, batch: Any, where: dict[str, Any]) -> Put:
        return lambda begin, end: self.put_table(batch.slice(begin, end - begin), **where)

    def _time_at(self, file: Path, names: Sequence[str]) -> int | None:
        if self.config.time_column in names:
            return names.index(self.config.time_column)
        if not self.config.speed:
            return None
        message = (
            f"{file}: time_column must be one of {', '.join(names) or 'its columns (it has none)'}, got "
            f"{self.config.time_column!r}; speed = 0 plays it without a time"
        )
        raise ConfigError(message)


def time_ns(value: Any) -> int:
    """Return the UTC ns that a value of a time column means; a number by its size: s, ms, us or ns.

    A missing one is 0: such a row comes together with the one before it.
    """
    if isinstance(value, str):
        found = _ISO.fullmatch(value)
        if found is None:
            message = f"a time must be ISO 8601 or a number, got {value!r:.100}"
            raise JobError(message)
        date, clock, fraction, zone = found.groups()
        moment = dt.datetime.fromisoformat(f"{date}T{clock}{'+00:00' if zone in (None, 'Z') else zone}")
        whole_s = (moment - _EPOCH) // dt.timedelta(seconds=1)
        return whole_s * 10**9 + int((fraction or "").ljust(9, "0"))
    if not value:
        return 0
    size = abs(value)
    for end, unit_ns in ((_SECONDS_END, 10**9), (_MILLISECONDS_END, 10**6), (_MICROSECONDS_END, 10**3)):
        if size < end:
            return int(value * unit_ns)
    return int(value)


def _files(path: Path) -> list[Path]:
    """Return what there is to play.

    Raises:
        ConfigError: It does not exist, or holds nothing that can be played.
    """
    if path.is_file():
        found = [path] if path.name.endswith(_SUFFIXES) else []
    else:
        found = sorted(
            file
            for file in path.rglob("*")
            if file.name.endswith(_SUFFIXES)
            and file.name != MARKS_FILE
            and not file.name.startswith((".", "_"))
        )
    if not found:
        message = f"path must be a file, or a directory of files, of {', '.join(_SUFFIXES)}, got {path}"
        raise ConfigError(message)
    return found


def _named(store_config: DAQJobStoreConfig, name: str) -> DAQJobStoreConfig:
    """Return where a file of a stored run goes: its own name in place of that in the TOML."""
    options = store_config.to_map()
    for option in options.values():
        if "file_path" in option:
            option["file_path"] = name + "".join(Path(option["file_path"]).suffixes[-1:])
    return DAQJobStoreConfig.from_map(options)


def _open_text(file: Path) -> io.TextIOBase:
    if file.suffix != ".zst":
        return file.open(newline="", encoding="utf-8")
    try:
        import pyarrow as pa  # noqa: PLC0415  # what is not compressed goes without
    except ImportError as e:
        message = f"{file}: zstd needs pyarrow, which is not installed here"
        raise ConfigError(message) from e
    stream: Any = pa.input_stream(str(file), compression="zstd")
    return io.TextIOWrapper(stream, newline="", encoding="utf-8")


def _reader_of(cells: Sequence[str], is_time: bool) -> Callable[[str], Any]:  # noqa: FBT001
    """Return what turns the cells of a column into values."""
    filled = [cell for cell in cells if cell]
    kinds: list[Callable[[str], Any]] = [_int, _float, _bool, _list]
    if is_time:
        kinds.insert(0, _time)
    for kind in kinds:
        values = [kind(cell) for cell in filled]
        if values and not any(isinstance(value, str) for value in values):
            return _float if kind is _int and any(isinstance(value, float) for value in values) else kind
    return _text


def _schema_of(names: Sequence[str], rows: Sequence[Sequence[Any]], readers: Sequence[object]) -> Schema:
    columns = Schema.infer(names, rows).columns
    return Schema(
        tuple(
            Column(column.name, "timestamp") if reader is _time else column
            for column, reader in zip(columns, readers, strict=True)
        )
    )


# Each returns a cell's value, None for an empty one, and the text itself where it is none of its kind.


def _int(cell: str) -> Any:
    try:
        return int(cell) if cell else None
    except ValueError:
        return _float(cell)


def _float(cell: str) -> Any:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _bool(cell: str) -> Any:
    return {"true": True, "false": False, "": None}.get(cell, cell)


def _list(cell: str) -> Any:
    try:
        return json.loads(cell) if cell.startswith("[") else cell or None
    except ValueError:
        return cell


def _time(cell: str) -> Any:
    return time_ns(cell) if _ISO.fullmatch(cell) else cell or None


def _text(cell: str) -> Any:
    return cell or None
