"""A muon detector that needs no hardware: pulses with noise, pile-up and a wandering baseline.

Events arrive as a Poisson process of ``rate_hz``. Each is one window of ``samples`` int16 ADC counts,
``sampling_ns`` apart. The first pulse starts after ``pretrigger`` of the window; its height follows the
Moyal distribution (a close, exactly sampled relative of Landau's) and its shape is the difference of two
exponentials. A muon that stops in the detector decays there (``stopped_fraction``): a second pulse follows
after an exponential time of 2197 ns. Unrelated pulses pile up, ``pile_up_mean`` of them per window on
average. The baseline is a random walk that is pulled back to ``baseline_adc``, and a slow oscillation. What
leaves the range of the ADC is clipped.

Two outputs. The **event table** (``store_config``), one row per event, is measured from the waveform as a
readout would do it, never taken from what was simulated:

============ ====== =====================================================================================
column       unit   meaning
============ ====== =====================================================================================
event        1      0, 1, 2, ... in this life of the job
timestamp    UTC    trigger time
baseline     ADC    mean of the samples before the pretrigger point
amplitude    ADC    largest sample above the baseline
charge       ADC ns sum of samples above the baseline, times ``sampling_ns``
n_pulses     1      rises above 8 times the noise, separated by falls below 3 times the noise
is_clipped   bool   some sample is at the end of the ADC's range
============ ====== =====================================================================================

The **waveforms** (``waveform_store_config``; without it none are put), one raw message per event,
little-endian::

    offset  size         field
         0  8            event, as in the table
         8  8            trigger time, UTC ns
        16  2 * samples  int16 samples, ADC counts

so ``numpy.fromfile(path, [("event", "<u8"), ("t_ns", "<i8"), ("adc", "<i2", samples)])`` reads a raw file
of them.

The same ``seed`` gives the same events (times apart) in every life; without one every life differs.
"""

from __future__ import annotations

import math
import random
import struct
import sys
import time
from array import array
from dataclasses import dataclass
from typing import Annotated

from edgedaq.clock import utc_ns
from edgedaq.config import StorableDAQJobConfig
from edgedaq.errors import ConfigError
from edgedaq.job import DAQJob
from edgedaq.schema import Column, Schema
from edgedaq.store_config import DAQJobStoreConfig
from msgspec import Meta

__all__ = [
    "COLUMNS",
    "SCHEMA",
    "DAQJobSimulatedDetector",
    "DAQJobSimulatedDetectorConfig",
    "Detector",
    "Measured",
    "measure",
    "waveform_bytes",
]

SCHEMA = Schema(
    (
        Column("event", "i8"),
        Column("timestamp", "timestamp"),
        Column("baseline", "f8", unit="ADC"),
        Column("amplitude", "f8", unit="ADC"),
        Column("charge", "f8", unit="ADC ns"),
        Column("n_pulses", "i4"),
        Column("is_clipped", "bool"),
    )
)
COLUMNS = SCHEMA.names

MUON_LIFETIME_NS = 2197.0
_NOISE_POOL = 1 << 15
_WAVEFORM_HEADER = struct.Struct("<Qq")

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class DAQJobSimulatedDetectorConfig(StorableDAQJobConfig, kw_only=True):
    """Physics of the detector; ADC quantities in counts, times in the unit of their name."""

    waveform_store_config: DAQJobStoreConfig | None = None
    seed: int | None = None
    rate_hz: Positive = 20.0
    samples: Annotated[int, Meta(ge=16, le=1 << 20)] = 512
    sampling_ns: Positive = 8.0
    pretrigger: Share = 0.2
    adc_bits: Annotated[int, Meta(ge=8, le=15)] = 14
    baseline_adc: NotNegative = 1000.0
    baseline_wander_adc: NotNegative = 10.0
    noise_adc: NotNegative = 4.0
    amplitude_adc: Positive = 600.0
    amplitude_width_adc: NotNegative = 90.0
    rise_ns: Positive = 12.0
    decay_ns: Positive = 90.0
    stopped_fraction: Share = 0.05
    pile_up_mean: Annotated[float, Meta(ge=0, le=50)] = 0.05

    def __post_init__(self) -> None:
        """Refuse a pulse that falls before it rises, and a window without a baseline."""
        if self.decay_ns <= self.rise_ns:
            message = f"decay_ns must be greater than rise_ns, which is {self.rise_ns}, got {self.decay_ns}"
            raise ConfigError(message)
        if not 2 <= int(self.samples * self.pretrigger) < self.samples:
            message = (
                f"pretrigger must leave 2 or more of {self.samples} samples before the pulse and 1 after it, "
                f"got {self.pretrigger}"
            )
            raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a readout finds in one waveform; the columns of the event table say the units."""

    baseline: float
    amplitude: float
    charge: float
    n_pulses: int
    is_clipped: bool


class DAQJobSimulatedDetector(DAQJob):
    """Puts a row and a waveform per simulated event."""

    config_type = DAQJobSimulatedDetectorConfig
    config: DAQJobSimulatedDetectorConfig

    def start(self) -> None:
        """Put events until stopped.

        A machine that cannot keep up with ``rate_hz`` measures at the rate that it can: a detector whose
        readout is busy does not trigger either.
        """
        config = self.config
        detector = Detector(config)
        event = 0
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + detector.wait_s(), time.monotonic() - 1.0)
            self.sleep(max(due_s - time.monotonic(), 0.0))
            t_utc_ns = utc_ns()
            samples = detector.waveform()
            if config.waveform_store_config is not None:
                message = waveform_bytes(event, t_utc_ns, samples)
                self.put_raw(message, store_config=config.waveform_store_config, tag="waveforms")
            self.put_rows([_row(config, event, t_utc_ns, samples)], COLUMNS, schema=SCHEMA)
            event += 1


class Detector:
    """The simulated hardware: waits and waveforms, a pure function of configuration and seed."""

    def __init__(self, config: DAQJobSimulatedDetectorConfig) -> None:
        self._config = config
        self._random = random.Random(config.seed)  # noqa: S311 -- a simulation
        self._template = _template(config)
        self._noise = self._noise_pool()
        self._walk_adc = 0.0
        self._phase = self._random.uniform(0, 2 * math.pi)
        self._ceiling = (1 << config.adc_bits) - 1

    def wait_s(self) -> float:
        """Return the time until the next event."""
        return self._random.expovariate(self._config.rate_hz)

    def waveform(self) -> array[int]:
        """Return the int16 samples of the next event."""
        config, source = self._config, self._random
        start_ns = int(config.samples * config.pretrigger) * config.sampling_ns
        pulses = [(start_ns, self._height_adc())]
        if source.random() < config.stopped_fraction:
            pulses.append((start_ns + source.expovariate(1 / MUON_LIFETIME_NS), self._height_adc()))
        window_ns = config.samples * config.sampling_ns
        pulses += [
            (source.uniform(-config.decay_ns, window_ns), self._height_adc())
            for _ in range(_poisson(source, config.pile_up_mean))
        ]
        offset = source.randrange(_NOISE_POOL)
        level = self._baseline_adc() + 0.5
        values = [level + noise for noise in self._noise[offset : offset + config.samples]]
        for begin_ns, height_adc in pulses:
            self._add_pulse(values, begin_ns, height_adc)
        ceiling = self._ceiling
        return array("h", [min(max(int(value), 0), ceiling) for value in values])

    def _height_adc(self) -> float:
        config = self._config
        deviate = self._random.gauss(0, 1)
        moyal = -math.log(max(deviate * deviate, 1e-12))
        return max(config.amplitude_adc + config.amplitude_width_adc * moyal, 0.0)

    def _baseline_adc(self) -> float:
        config = self._config
        self._walk_adc = 0.98 * self._walk_adc + self._random.gauss(0, 0.2 * config.baseline_wander_adc)
        self._phase += 0.01
        return config.baseline_adc + self._walk_adc + 0.5 * config.baseline_wander_adc * math.sin(self._phase)

    def _add_pulse(self, values: list[float], begin_ns: float, height_adc: float) -> None:
        first = math.ceil(begin_ns / self._config.sampling_ns)
        skipped = max(-first, 0)
        for index, share in enumerate(self._template[skipped:], first + skipped):
            if index >= len(values):
                return
            values[index] += height_adc * share

    def _noise_pool(self) -> list[float]:
        """Return noise to take windows from: a normal deviate per sample would cost most of an event."""
        pool = [self._random.gauss(0, self._config.noise_adc) for _ in range(_NOISE_POOL)]
        return pool + [pool[index % _NOISE_POOL] for index in range(self._config.samples)]


def measure(
    samples: array[int], pretrigger_samples: int, sampling_ns: float, noise_adc: float, ceiling: int
) -> Measured:
    """Measure one waveform as a readout would.

    Args:
        samples: ADC counts, pulses pointing up.
        pretrigger_samples: How many of them lie before the trigger, at least 1.
        noise_adc: RMS of the noise, which the thresholds are multiples of (0 counts as 1).
        ceiling: Largest count that the ADC can give.
    """
    baseline = sum(samples[:pretrigger_samples]) / pretrigger_samples
    high = max(samples)
    charge = (sum(samples) - baseline * len(samples)) * sampling_ns
    rising = baseline + 8 * (noise_adc or 1.0)
    falling = baseline + 3 * (noise_adc or 1.0)
    n_pulses = 0
    is_armed = True
    for sample in samples:
        if is_armed:
            if sample > rising:
                n_pulses += 1
                is_armed = False
        elif sample < falling:
            is_armed = True
    return Measured(baseline, high - baseline, charge, n_pulses, high >= ceiling or min(samples) <= 0)


def waveform_bytes(event: int, t_utc_ns: int, samples: array[int]) -> bytes:
    """Return the raw message of one event, drawn at the top of this module."""
    if sys.byteorder == "big":
        samples = array("h", samples)
        samples.byteswap()
    return _WAVEFORM_HEADER.pack(event, t_utc_ns) + samples.tobytes()


def _row(
    config: DAQJobSimulatedDetectorConfig, event: int, t_utc_ns: int, samples: array[int]
) -> list[float]:
    pretrigger_samples = int(config.samples * config.pretrigger)
    ceiling = (1 << config.adc_bits) - 1
    found = measure(samples, pretrigger_samples, config.sampling_ns, config.noise_adc, ceiling)
    return [event, t_utc_ns, found.baseline, found.amplitude, found.charge, found.n_pulses, found.is_clipped]


def _template(config: DAQJobSimulatedDetectorConfig) -> list[float]:
    """Return a pulse of height 1, sampled until it has decayed to a thousandth of it."""
    count = min(math.ceil(7 * config.decay_ns / config.sampling_ns) + 1, config.samples)
    times = [index * config.sampling_ns for index in range(count)]
    shape = [math.exp(-t / config.decay_ns) - math.exp(-t / config.rise_ns) for t in times]
    ratio = config.decay_ns / config.rise_ns
    peak_ns = math.log(ratio) * config.rise_ns * config.decay_ns / (config.decay_ns - config.rise_ns)
    peak = math.exp(-peak_ns / config.decay_ns) - math.exp(-peak_ns / config.rise_ns)
    return [value / peak for value in shape]


def _poisson(source: random.Random, mean: float) -> int:
    """Return a Poisson number by counting exponential waits; meant for small means."""
    count = 0
    waited = source.expovariate(1.0)
    while waited < mean:
        count += 1
        waited += source.expovariate(1.0)
    return count
