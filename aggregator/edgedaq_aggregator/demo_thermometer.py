"""A thermometer that needs no hardware: a vessel in a room that drifts, and a heater that switches.

The demo lays this file beside its TOML, as a user's own job lies there. The vessel takes on the temperature
around it with a time constant; a thermostat heats from ``low_c`` until ``high_c``. One row per interval:

============ ====== =====================================================================================
column       unit   meaning
============ ====== =====================================================================================
timestamp    UTC    when it was read
temperature  °C     of the vessel, with the sensor's noise
room         °C     around it: a slow random walk, with the same noise
is_heating   bool   the heater is on
============ ====== =====================================================================================
"""

from __future__ import annotations

import random
import time

from edgedaq import Column, DAQJob, Schema, StorableDAQJobConfig

SCHEMA = Schema(
    (
        Column("timestamp", "timestamp"),
        Column("temperature", "f8", unit="°C"),
        Column("room", "f8", unit="°C"),
        Column("is_heating", "bool"),
    )
)


class ThermometerConfig(StorableDAQJobConfig, kw_only=True):
    """The heater alone would raise the vessel by ``heater_c`` above the room."""

    interval_seconds: float = 0.1
    room_c: float = 21.0
    low_c: float = 24.0
    high_c: float = 26.0
    heater_c: float = 12.0
    time_constant_s: float = 6.0
    noise_c: float = 0.05


class DAQJobThermometer(DAQJob):
    """Puts a row per interval."""

    config_type = ThermometerConfig
    config: ThermometerConfig

    def start(self) -> None:
        """Read until stopped."""
        config = self.config
        source = random.Random()  # noqa: S311 -- a simulation
        vessel_c = room_c = config.room_c
        is_heating = True
        last_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            passed_s, last_s = now_s - last_s, now_s
            room_c += source.gauss(0, 0.05) * passed_s**0.5
            target_c = room_c + (config.heater_c if is_heating else 0.0)
            vessel_c += (target_c - vessel_c) * min(passed_s / config.time_constant_s, 1.0)
            is_heating = vessel_c < (config.high_c if is_heating else config.low_c)
            temperature, room = (c + source.gauss(0, config.noise_c) for c in (vessel_c, room_c))
            self.put_rows([[time.time_ns(), temperature, room, is_heating]], schema=SCHEMA)
            self.sleep(config.interval_seconds)
