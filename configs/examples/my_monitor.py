"""A job of a user that looks at what other jobs put: ``my_monitor.toml`` runs it.

It takes live topics, so it may miss something when it is slow, and never holds anybody up. What must not be
missed is asked for by ``topics_to_subscribe`` instead.
"""

# ruff: noqa: INP001  -- it stands beside its TOML, in no package

from __future__ import annotations

from typing import ClassVar

from edgedaq import DAQJob, DAQJobConfig, DAQJobMessage, DAQJobMessageStoreTabular


class MyMonitorConfig(DAQJobConfig):
    """Warn when a column leaves its range."""

    column: str
    upper_limit: float


class DAQJobMyMonitor(DAQJob):
    """Watches one column of ``my_sensor``."""

    config_type = MyMonitorConfig
    config: MyMonitorConfig
    live_topics: ClassVar[list[str]] = ["job.my_sensor"]

    def handle_message(self, message: DAQJobMessage) -> None:
        """Take some rows as they come."""
        if not isinstance(message, DAQJobMessageStoreTabular) or self.config.column not in message.keys:
            return
        index = list(message.keys).index(self.config.column)
        for row in message.data or ():
            if row[index] > self.config.upper_limit:
                self.logger.warning("value.exceeded", column=self.config.column, value=row[index])
