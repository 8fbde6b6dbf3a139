"""When commits of a Redis server are on its disk, asked from the server again and again.

``everysec`` before WAITAOF: an fsync begins in the first round of the server's loop in which its clock shows
a new second, unless one is under way. So let INFO say, at a second ``s``, that nothing waits and none is
under way, and again at ``s + 2`` or later: in between one began after ``s`` and has ended, and everything
written before ``s`` is on the disk.

``save``: a dump has what was there when it began: its end less its duration, which INFO both tell.
"""

from __future__ import annotations

import time

from edgedaq_aggregator.stores.redis_session import Persistence, Session
from edgedaq_aggregator.stores.settling import Settling

__all__ = ["Durability"]

_UNTOLD_S = 60
_ASK_S = 0.5


class Durability:
    """How far commits are on the server's disk. One thread commits and notes it, another one asks."""

    def __init__(self, persistence: Persistence) -> None:
        self._how = persistence.how
        self._settling = Settling()
        self._asked_s = 0.0
        self._quiet_s: int | None = None

    @property
    def is_late(self) -> bool:
        """Commits are durable some time after they have returned."""
        return self._how in ("everysec", "save", "untold")

    def note(self, session: Session, position: int | None, server_s: int) -> None:
        """Take a commit that the server has, at a time of its clock; wait where that makes it durable."""
        if self._how == "waitaof":
            session.wait_for_disk()
        if self.is_late:
            self._settling.add(server_s + 1, position)
        else:
            self._settling.durable_position = position

    def is_due(self) -> bool:
        """Tell whether it is time to ask."""
        return self.is_late and time.monotonic() >= self._asked_s + _ASK_S

    def ask(self, session: Session) -> None:
        """Learn from the server what has become durable."""
        self._asked_s = time.monotonic()
        now_s = int(session.call("TIME")[0])
        info = {} if self._how == "untold" else session.info()
        if self._how == "untold":
            self._settling.reach(now_s - _UNTOLD_S)
        elif self._how == "save":
            if info.get("rdb_last_bgsave_status") == "ok":
                took_s = max(int(info.get("rdb_last_bgsave_time_sec", "-1")), 0)
                self._settling.reach(int(info.get("rdb_last_save_time", "0")) - took_s - 1)
        else:
            self._ask_everysec(info, now_s)

    @property
    def durable_position(self) -> int | None:
        """What the journal may be trimmed to."""
        return self._settling.durable_position

    def _ask_everysec(self, info: dict[str, str], now_s: int) -> None:
        waiting = int(info.get("aof_pending_bio_fsync", "1")) + int(info.get("aof_buffer_length", "1"))
        if waiting or info.get("aof_last_write_status") != "ok":
            if info.get("aof_last_write_status") != "ok":
                self._quiet_s = None
            return
        if self._quiet_s is None:
            self._quiet_s = now_s
        elif now_s >= self._quiet_s + 2:
            self._settling.reach(self._quiet_s)
            self._quiet_s = now_s
