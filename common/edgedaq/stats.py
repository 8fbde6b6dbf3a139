"""What processes report about themselves, and how reports are added up without adding anything twice.

::

    NodeReport            one per second and node, by its supervisor
    └── JobReport         one per job
        ├── folded        Snapshot: the sum of the job's ended lives, or None
        └── current       Snapshot: the newest of the life that runs, or None

A ``Snapshot`` is cumulative over one life: a newer one of the same life *replaces* the older one, an ended
life is *folded* into the sum. So a report that is repeated, or lost, changes no total. Counters count rows of
tables and messages of everything else; ``in`` is what a job consumed, ``out`` what it put.

Latency is a ``QuantileSketch``: buckets whose edges grow by a constant factor (as in DDSketch), so that
sketches of many processes add up exactly and every quantile is right to 2 % of its value.

On the wire all of these are plain maps and lists (``to_map``, ``to_list``); what comes back is validated.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Any, Self

import msgspec

from edgedaq.errors import ConfigError, WireError
from edgedaq.names import check_name

__all__ = [
    "JOBS_MAX",
    "RELATIVE_ERROR",
    "JobReport",
    "NodeReport",
    "QuantileSketch",
    "Snapshot",
    "WindowedRate",
    "WindowedSketch",
    "fold",
    "snapshot_from_map",
]

JOBS_MAX = 1024
"""Jobs that one report may name."""

RELATIVE_ERROR = 0.02
"""How far a sketch's quantile may lie from the true value, relative to it."""

Count = Annotated[int, msgspec.Meta(ge=0)]

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)
_BUCKET_LIMIT = math.ceil(math.log(1e9) / _LOG_GAMMA)
_ZERO_BUCKET = -_BUCKET_LIMIT - 1
_BUCKETS_MAX = 2 * _BUCKET_LIMIT + 2
_SMALLEST = 1e-9
_CENTRE = 2 / (1 + _GAMMA)


class Snapshot(msgspec.Struct):
    """The account of one life of one job so far; or, folded, of several.

    ``t_mono_ns`` is monotonic, ``last_in_ns`` and ``last_out_ns`` are UTC ns (0: never). A queue that the job
    does not have, and a gauge that nobody measured, is None. ``blocked_by`` names the consumer that a put
    waits for. ``streams`` maps a stream id (16 hex digits) to the rows put into it. ``extra`` holds what only
    this kind of job reports.
    """

    job: str
    job_type: str
    life: str
    pid: int
    t_mono_ns: int
    in_count: Count = 0
    in_bytes: Count = 0
    last_in_ns: Count = 0
    out_count: Count = 0
    out_bytes: Count = 0
    last_out_ns: Count = 0
    in_queue: Count | None = None
    out_queue: Count | None = None
    dropped_count: Count = 0
    put_blocked_s: float = 0.0
    is_blocked: bool = False
    blocked_by: str = ""
    cpu_percent: float | None = None
    rss_bytes: Count | None = None
    streams: dict[str, Count] = {}
    extra: dict[str, Any] = {}

    def to_map(self) -> dict[str, Any]:
        """Return it as a map for a link or a session."""
        return dict(msgspec.to_builtins(self))


class JobReport(msgspec.Struct):
    """One job as its supervisor sees it. ``last_restart_ns`` is UTC ns, 0 when it never restarted."""

    job: str
    job_type: str
    state: str
    restart_count: Count = 0
    last_restart_ns: Count = 0
    folded: Snapshot | None = None
    current: Snapshot | None = None

    def total(self) -> Snapshot | None:
        """Return the sum over all lives, with the gauges of the current one; None before the first report."""
        if self.current is None:
            return self.folded
        whole = fold(self.folded, self.current)
        if whole is self.folded:
            return whole
        now = self.current
        return msgspec.structs.replace(
            whole,
            in_queue=now.in_queue,
            out_queue=now.out_queue,
            is_blocked=now.is_blocked,
            blocked_by=now.blocked_by,
            cpu_percent=now.cpu_percent,
            rss_bytes=now.rss_bytes,
            streams=now.streams,
            extra=now.extra,
        )


class NodeReport(msgspec.Struct):
    """One node as its supervisor sees it.

    ``boot`` names the boot that ``t_mono_ns`` counts from. ``life`` (16 hex digits) names the process of the
    supervisor: the sums of a report begin with that process, so a new life's are added to the old one's.
    """

    node: str
    version: str
    boot: str
    t_utc_ns: int
    t_mono_ns: int
    jobs: list[JobReport] = []
    extra: dict[str, Any] = {}
    life: str = ""

    def to_map(self) -> dict[str, Any]:
        """Return it as a map for a link or a session."""
        return dict(msgspec.to_builtins(self))

    @classmethod
    def from_map(cls, value: object) -> Self:
        """Return the report that ``to_map`` described.

        Raises:
            WireError: It is not such a map, a name in it is not one, or it names too many jobs.
        """
        try:
            report = msgspec.convert(value, cls)
            check_name("the node of a report", report.node)
            for job in report.jobs:
                check_name("the job of a report", job.job)
        except (msgspec.ValidationError, ConfigError) as e:
            message = f"a node report is not valid: {e}"
            raise WireError(message) from e
        if len(report.jobs) > JOBS_MAX:
            message = f"a node report may name {JOBS_MAX} jobs, got {len(report.jobs)}"
            raise WireError(message)
        return report


def snapshot_from_map(value: object) -> Snapshot:
    """Return the snapshot that ``Snapshot.to_map`` described.

    Raises:
        WireError: It is not such a map.
    """
    try:
        return msgspec.convert(value, Snapshot)
    except msgspec.ValidationError as e:
        message = f"a snapshot is not valid: {e}"
        raise WireError(message) from e


def fold(ended: Snapshot | None, last: Snapshot) -> Snapshot:
    """Return the sum of ended lives and the last snapshot of one more.

    Gauges and streams are those of a running process, so a sum has none. A sum bears the life that was
    folded last; folding that life again returns the sum unchanged.

    Args:
        ended: What was folded before, or None.
        last: The final snapshot of a life that has ended.
    """
    if ended is not None and ended.life == last.life:
        return ended
    before = ended or Snapshot(last.job, last.job_type, last.life, last.pid, last.t_mono_ns)
    return Snapshot(
        last.job,
        last.job_type,
        last.life,
        last.pid,
        last.t_mono_ns,
        in_count=before.in_count + last.in_count,
        in_bytes=before.in_bytes + last.in_bytes,
        last_in_ns=max(before.last_in_ns, last.last_in_ns),
        out_count=before.out_count + last.out_count,
        out_bytes=before.out_bytes + last.out_bytes,
        last_out_ns=max(before.last_out_ns, last.last_out_ns),
        dropped_count=before.dropped_count + last.dropped_count,
        put_blocked_s=before.put_blocked_s + last.put_blocked_s,
    )


class QuantileSketch:
    """How often values of which size were seen; quantiles are right to ``RELATIVE_ERROR``.

    Bucket ``i`` holds values in ``(g**(i-1), g**i]`` and answers with a value that is within the error of all
    of them. Values up to 1e-9, negative ones included (a clock that is off makes such latencies), count as 0;
    values above 1e9 count as 1e9. So there are at most about a thousand buckets, whatever is added.
    """

    __slots__ = ("buckets",)

    def __init__(self, buckets: dict[int, int] | None = None) -> None:
        self.buckets: dict[int, int] = buckets if buckets is not None else {}

    @property
    def count(self) -> int:
        """How many values were added."""
        return sum(self.buckets.values())

    def add(self, value: float, count: int = 1) -> None:
        """Add a value ``count`` times."""
        index = bucket_of(value)
        self.buckets[index] = self.buckets.get(index, 0) + count

    def merge(self, other: QuantileSketch) -> None:
        """Add all that another sketch has seen; exact."""
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count

    def quantile(self, q: float) -> float | None:
        """Return the smallest value that a share ``q`` of what was seen does not exceed; None when empty."""
        total = self.count
        if not total:
            return None
        rank = max(math.ceil(q * total), 1)
        seen = 0
        index = _ZERO_BUCKET
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if seen >= rank:
                break
        return 0.0 if index == _ZERO_BUCKET else _GAMMA**index * _CENTRE

    def to_list(self) -> list[int]:
        """Return ``[bucket, count, bucket, count, ...]``, which any encoding keeps."""
        return [number for pair in sorted(self.buckets.items()) for number in pair]

    @classmethod
    def from_list(cls, value: object) -> QuantileSketch:
        """Return the sketch that ``to_list`` described.

        Raises:
            WireError: It is not a list of pairs of a known bucket and a positive count.
        """
        if not isinstance(value, list) or len(value) % 2 or len(value) > 2 * _BUCKETS_MAX:
            message = f"a sketch must be a list of at most {_BUCKETS_MAX} pairs"
            raise WireError(message)
        buckets: dict[int, int] = {}
        for index, count in zip(value[::2], value[1::2], strict=True):
            if type(index) is not int or type(count) is not int or abs(index) > -_ZERO_BUCKET or count < 1:
                message = f"a sketch has no bucket {index!r} with count {count!r}"
                raise WireError(message)
            buckets[index] = buckets.get(index, 0) + count
        return cls(buckets)


def bucket_of(value: float) -> int:
    """Return the number of the bucket that a value falls into."""
    if not value > _SMALLEST:
        return _ZERO_BUCKET
    if value >= 1e9:
        return _BUCKET_LIMIT
    return max(math.ceil(math.log(value) / _LOG_GAMMA), -_BUCKET_LIMIT)


class WindowedSketch:
    """A sketch of what was seen in the last ``window_s``, forgotten slice by slice.

    The age at which a value is forgotten lies between ``window_s`` and one slice more.
    """

    def __init__(self, window_s: float = 60.0, slices: int = 12) -> None:
        self._slice_ns = int(window_s * 1e9 / slices)
        self._slices = slices
        self._held: deque[tuple[int, QuantileSketch]] = deque()

    def add(self, value: float, count: int, now_ns: int) -> None:
        """Add a value ``count`` times at a monotonic time, which never goes back."""
        number = now_ns // self._slice_ns
        if not self._held or self._held[-1][0] < number:
            self._forget(number)
            self._held.append((number, QuantileSketch()))
        self._held[-1][1].add(value, count)

    def sketch(self, now_ns: int) -> QuantileSketch:
        """Return a sketch of its own of what is in the window at a monotonic time."""
        self._forget(now_ns // self._slice_ns)
        whole = QuantileSketch()
        for _, part in self._held:
            whole.merge(part)
        return whole

    def _forget(self, number: int) -> None:
        while self._held and self._held[0][0] < number - self._slices:
            self._held.popleft()


class WindowedRate:
    """How fast a cumulative count grew over the last ``window_s``."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_ns = int(window_s * 1e9)
        self._seen: deque[tuple[int, int]] = deque()

    def add(self, total: int, now_ns: int) -> None:
        """Note what the count is at a monotonic time; a count that went back starts anew."""
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now_ns, total))
        while len(self._seen) > 2 and self._seen[1][0] <= now_ns - self._window_ns:
            self._seen.popleft()

    def per_s(self) -> float | None:
        """Return the growth per second; None until two counts are known."""
        if len(self._seen) < 2:
            return None
        (t_first, first), (t_last, last) = self._seen[0], self._seen[-1]
        return (last - first) * 1e9 / (t_last - t_first) if t_last > t_first else None
