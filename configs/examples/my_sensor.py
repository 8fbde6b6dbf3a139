"""Two jobs of a user: one that says itself where its data goes, and one whose TOML says it.

``DAQJobMyJob`` is the example of the ENRGDAQ documentation with its imports changed, and nothing else but the
file name in place of its ``csv=...``. ``my_job.toml`` runs it, ``my_sensor.toml`` the other.
"""

# ruff: noqa: ANN201, D101, D102, I001, INP001, TID251  -- as its author wrote it

from edgedaq import DAQJob, DAQJobConfig, DAQJobMessageStoreTabular, DAQJobStoreConfig, StorableDAQJobConfig
from edgedaq.store_config import DAQJobStoreConfigCSV
import time


class MyJobConfig(DAQJobConfig):
    my_setting: str
    interval_seconds: float = 1.0


class DAQJobMyJob(DAQJob):
    config_type = MyJobConfig
    config: MyJobConfig

    def start(self):
        while True:
            # Produce and route data
            self._put_message_out(
                DAQJobMessageStoreTabular(
                    store_config=DAQJobStoreConfig(csv=DAQJobStoreConfigCSV("my_job.csv")),
                    keys=["timestamp", "value"],
                    data=[[time.time(), 42.0]],
                )
            )
            time.sleep(self.config.interval_seconds)


class MySensorConfig(StorableDAQJobConfig):
    interval_seconds: float = 1.0


class DAQJobMySensor(DAQJob):
    config_type = MySensorConfig
    config: MySensorConfig

    def start(self) -> None:
        while True:
            self.put_rows([[time.time(), 42.0]], ["timestamp", "value"])
            self.sleep(self.config.interval_seconds)
