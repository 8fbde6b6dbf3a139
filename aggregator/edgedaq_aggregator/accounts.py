"""What is remembered of one node and its jobs between reports, so that every total counts each thing once.

::

    JobAccount   base (sum of ended lives of the supervisor) + report (newest of its current life)
    Tally        base (sum of ended lives of one reporter)   + current (newest of its current life)

A report of the current life *replaces*, a new life first *folds* the old one into the base. All of it is
plain data: ``to_map`` and ``from_map`` are inverses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from edgedaq.errors import WireError
from edgedaq.stats import JobReport, NodeReport, QuantileSketch, Snapshot, WindowedRate, fold

__all__ = ["ENDED_LIVES_MAX", "JobAccount", "NodeAccount", "Tally", "sketch_of", "sum_known"]

ENDED_LIVES_MAX = 16
"""Ended lives of a supervisor that are remembered, so that a late report of one is not taken for a new
life."""


class JobAccount(msgspec.Struct):
    """One job over all lives of its supervisor."""

    report: JobReport
    base: Snapshot | None = None
    base_restart_count: int = 0
    is_listed: bool = True

    @property
    def restart_count(self) -> int:
        """Restarts over all lives of the supervisor."""
        return self.base_restart_count + self.report.restart_count

    def total(self) -> Snapshot | None:
        """Return counters over everything, gauges of the current life; None when it never reported."""
        newest = self.report.total()
        if self.base is None or newest is None:
            return newest or self.base
        return msgspec.structs.replace(
            newest,
            **{name: getattr(whole, name) for whole in (fold(self.base, newest),) for name in _COUNTERS},
        )

    def end_life(self) -> None:
        """Fold what the supervisor's ended life had summed."""
        newest = self.report.total()
        if newest is not None:
            self.base = fold(self.base, newest)
        self.base_restart_count += self.report.restart_count
        self.report = msgspec.structs.replace(self.report, restart_count=0, folded=None, current=None)


_COUNTERS = (
    "in_count",
    "in_bytes",
    "last_in_ns",
    "out_count",
    "out_bytes",
    "last_out_ns",
    "dropped_count",
    "put_blocked_s",
)


class Tally(msgspec.Struct):
    """Named counts that one process keeps since it started, summed over its lives."""

    life: str = ""
    base: dict[str, int] = {}
    current: dict[str, int] = {}

    def update(self, life: str, counts: Mapping[str, int]) -> None:
        """Take the counts of a life: the newest ones of the current life, or the first ones of the next."""
        if life != self.life:
            self.base = {
                key: self.base.get(key, 0) + self.current.get(key, 0) for key in {*self.base, *self.current}
            }
            self.life = life
        self.current = dict(counts)

    def total(self, key: str) -> int | None:
        """Return a count over all lives; None when nobody ever told it."""
        if key not in self.base and key not in self.current:
            return None
        return self.base.get(key, 0) + self.current.get(key, 0)


@dataclass(slots=True)
class NodeAccount:
    """One node: what its supervisor reports, and what the intake and the stores count of it.

    ``heard_ns`` is this process's monotonic time when something of the node last arrived, None if it was
    before this process. ``last_active_ns`` is UTC, 0 if never. ``has_ended``: its last report says how its
    jobs ended.
    """

    node: str
    version: str = ""
    life: str = ""
    boot: str = ""
    t_mono_ns: int = 0
    last_active_ns: int = 0
    jobs: dict[str, JobAccount] = field(default_factory=dict)
    arrived: Tally = field(default_factory=Tally)
    ended_lives: deque[str] = field(default_factory=lambda: deque(maxlen=ENDED_LIVES_MAX))
    extra: dict[str, Any] = field(default_factory=dict)
    link: dict[str, Any] = field(default_factory=dict)
    link_ns: int = 0
    heard_ns: int | None = None
    has_ended: bool = False
    in_rate: WindowedRate = field(default_factory=WindowedRate)
    out_rate: WindowedRate = field(default_factory=WindowedRate)

    def update(self, report: NodeReport) -> bool:
        """Take a report; False when it is older than what is held, and so says nothing."""
        if report.life in self.ended_lives:
            return False
        is_same_life = report.life == self.life and report.boot == self.boot
        if is_same_life and self.t_mono_ns and report.t_mono_ns < self.t_mono_ns:
            return False
        if not is_same_life and self.jobs:
            for account in self.jobs.values():
                account.end_life()
            if self.life:
                self.ended_lives.append(self.life)
        self.life, self.boot, self.t_mono_ns = report.life, report.boot, report.t_mono_ns
        self.version, self.extra = report.version, report.extra
        listed = {job.job: job for job in report.jobs}
        for name, job in listed.items():
            self.jobs.setdefault(name, JobAccount(job)).report = job
        for name, account in self.jobs.items():
            account.is_listed = name in listed
        return True

    def is_alive(self, now_ns: int, silent_ns: int) -> bool:
        """Tell whether anything of the node arrived lately."""
        return self.heard_ns is not None and now_ns - self.heard_ns <= silent_ns

    def link_at(self, now_ns: int, silent_ns: int) -> Mapping[str, Any]:
        """Return what the intake told of the node lately; nothing when the intake is silent."""
        return self.link if now_ns - self.link_ns <= silent_ns else {}

    def to_map(self) -> dict[str, Any]:
        """Return what must outlive this process."""
        return {
            "node": self.node,
            "version": self.version,
            "life": self.life,
            "boot": self.boot,
            "t_mono_ns": self.t_mono_ns,
            "last_active_ns": self.last_active_ns,
            "ended_lives": list(self.ended_lives),
            "jobs": {name: msgspec.to_builtins(_without_extras(job)) for name, job in self.jobs.items()},
            "arrived": msgspec.to_builtins(self.arrived),
        }

    @classmethod
    def from_map(cls, value: Any) -> Self:
        """Return what ``to_map`` described.

        Raises:
            WireError: It is not that.
        """
        try:
            kept = msgspec.convert(value, _Kept)
        except msgspec.ValidationError as e:
            message = f"the kept account of a node is not valid: {e}"
            raise WireError(message) from e
        return cls(
            node=kept.node,
            version=kept.version,
            life=kept.life,
            boot=kept.boot,
            t_mono_ns=kept.t_mono_ns,
            last_active_ns=kept.last_active_ns,
            jobs=kept.jobs,
            arrived=kept.arrived,
            ended_lives=deque(kept.ended_lives, maxlen=ENDED_LIVES_MAX),
        )


class _Kept(msgspec.Struct):
    """The shape of a kept account."""

    node: str
    version: str
    life: str
    boot: str
    t_mono_ns: int
    last_active_ns: int
    ended_lives: list[str]
    jobs: dict[str, JobAccount]
    arrived: Tally


def sketch_of(value: object) -> QuantileSketch | None:
    """Return the sketch that a report bears; None when it bears none."""
    if value is None:
        return None
    try:
        return QuantileSketch.from_list(value)
    except WireError:
        return None


def sum_known(values: list[Any]) -> Any:
    """Return the sum of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _without_extras(account: JobAccount) -> JobAccount:
    report = account.report
    if report.current is None:
        return account
    current = msgspec.structs.replace(report.current, extra={}, streams={})
    return msgspec.structs.replace(account, report=msgspec.structs.replace(report, current=current))
