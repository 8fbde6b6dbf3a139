from __future__ import annotations

import random
import statistics
from array import array
from typing import Any, ClassVar

import pytest
from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError
from edgedaq_agent.jobs import simulated_detector as detector_job
from edgedaq_agent.jobs.simulated_detector import (
    DAQJobSimulatedDetectorConfig,
    Detector,
    measure,
    waveform_bytes,
)

from tests.contract.job_contract import JobContract, RunningJob

STORES = {"csv": {"file_path": "events.csv"}}


class TestSimulatedDetector(JobContract):
    job_type = "DAQJobSimulatedDetector"
    config: ClassVar[dict[str, Any]] = {
        "seed": 4,
        "rate_hz": 400.0,
        "samples": 128,
        "store_config": STORES,
        "waveform_store_config": {"raw": {"file_path": "waveforms.bin"}},
    }

    def has_enough(self, job: RunningJob) -> bool:
        return len(job.rows()) >= 40

    def check_output(self, job: RunningJob) -> None:
        rows, waveforms = job.rows(), job.messages("waveforms")
        config = config_of(**{**self.config, "store_config": STORES})
        detector = Detector(config)
        assert [row[0] for row in rows] == list(range(len(rows)))
        # A kill can fall between the two puts of one event.
        assert len(waveforms) - len(rows) in (0, 1)
        for event, row in enumerate(rows):
            detector.wait_s()
            samples = detector.waveform()
            assert waveforms[event] == waveform_bytes(event, row[1], samples)
            assert row[2:] == tuple(detector_job._row(config, event, row[1], samples)[2:])


def config_of(**settings: object) -> DAQJobSimulatedDetectorConfig:
    raw = {"daq_job_type": "DAQJobSimulatedDetector", "store_config": STORES, **settings}
    return build_job_config(DAQJobSimulatedDetectorConfig, raw, file="d.toml", stem="d")


def measured(config: DAQJobSimulatedDetectorConfig, samples: array[int]) -> detector_job.Measured:
    pretrigger = int(config.samples * config.pretrigger)
    return measure(samples, pretrigger, config.sampling_ns, config.noise_adc, (1 << config.adc_bits) - 1)


def test_the_same_seed_gives_the_same_events_and_another_one_others():
    def events(seed: int) -> list[tuple[float, array[int]]]:
        detector = Detector(config_of(seed=seed))
        return [(detector.wait_s(), detector.waveform()) for _ in range(20)]

    assert events(7) == events(7)
    assert events(7) != events(8)


def test_waits_are_those_of_a_poisson_process():
    detector = Detector(config_of(seed=1, rate_hz=50.0))
    waits = [detector.wait_s() for _ in range(20_000)]
    assert statistics.mean(waits) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(waits) == pytest.approx(1 / 50, rel=0.04)


def test_a_lone_pulse_is_measured_with_its_baseline_height_and_charge():
    config = config_of(
        seed=1,
        noise_adc=0.0,
        pile_up_mean=0.0,
        stopped_fraction=0.0,
        amplitude_width_adc=0.0,
        baseline_wander_adc=0.0,
        samples=1024,
    )
    found = measured(config, Detector(config).waveform())
    assert found.baseline == pytest.approx(1000, abs=1)
    assert found.amplitude == pytest.approx(600, rel=0.02)
    # The integral of exp(-t/decay) - exp(-t/rise) is decay - rise; at its peak it is 0.578 for 90 and 12 ns.
    peak = 0.7305 - 0.1
    assert found.charge == pytest.approx(600 * (90 - 12) / peak, rel=0.06)
    assert (found.n_pulses, found.is_clipped) == (1, False)


def test_noise_and_a_wandering_baseline_are_there():
    config = config_of(seed=3, pile_up_mean=0.0, noise_adc=5.0, baseline_wander_adc=20.0)
    detector = Detector(config)
    heads = [detector.waveform()[:100] for _ in range(300)]
    assert statistics.mean(statistics.stdev(head) for head in heads) == pytest.approx(5.0, rel=0.1)
    baselines = [statistics.mean(head) for head in heads]
    assert 8 < statistics.stdev(baselines) < 40
    assert statistics.mean(baselines) == pytest.approx(1000, abs=25)


def test_pile_up_and_decays_make_windows_with_more_than_one_pulse():
    lone = config_of(seed=5, pile_up_mean=0.0, stopped_fraction=0.0)
    busy = config_of(seed=5, pile_up_mean=0.8, stopped_fraction=0.2)

    def shares(config: DAQJobSimulatedDetectorConfig) -> tuple[float, float]:
        detector = Detector(config)
        counts = [measured(config, detector.waveform()).n_pulses for _ in range(300)]
        return sum(count == 1 for count in counts) / 300, sum(count > 1 for count in counts) / 300

    assert shares(lone)[0] > 0.97
    assert shares(busy)[1] > 0.3


def test_pulse_heights_have_the_long_tail_of_an_energy_loss():
    detector = Detector(config_of(seed=9, pile_up_mean=0.0, stopped_fraction=0.0, samples=64, pretrigger=0.1))
    heights = sorted(max(detector.waveform()) - 1000 for _ in range(2000))
    median = heights[1000]
    assert heights[1900] - median > 1.5 * (median - heights[100])


def test_samples_never_leave_the_range_of_the_adc():
    config = config_of(seed=2, adc_bits=10, amplitude_adc=5000.0, noise_adc=50.0, baseline_adc=60.0)
    detector = Detector(config)
    waveforms = [detector.waveform() for _ in range(50)]
    assert min(map(min, waveforms)) == 0
    assert max(map(max, waveforms)) == 1023
    assert all(measured(config, samples).is_clipped for samples in waveforms)


def test_two_pulses_count_as_two_only_when_the_signal_falls_between_them():
    quiet = [100] * 20
    apart = array("h", quiet + [300] * 5 + quiet + [300] * 5 + quiet)
    merged = array("h", quiet + [300] * 5 + [140] * 5 + [300] * 5 + quiet)
    assert measure(apart, 20, 8.0, 10.0, 4095).n_pulses == 2
    assert measure(merged, 20, 8.0, 10.0, 4095).n_pulses == 1


def test_a_waveform_message_is_event_time_and_little_endian_samples():
    message = waveform_bytes(3, 1_700_000_000_000_000_000, array("h", [1, -2, 300]))
    assert message.hex() == "0300000000000000" + "0000a2eac44b9717"[:0] + message[8:16].hex() + "0100feff2c01"
    assert int.from_bytes(message[8:16], "little") == 1_700_000_000_000_000_000
    assert len(message) == 16 + 2 * 3


def test_poisson_counts_have_the_mean_they_are_given():
    source = random.Random(1)
    counts = [detector_job._poisson(source, 0.7) for _ in range(20_000)]
    assert statistics.mean(counts) == pytest.approx(0.7, rel=0.05)
    assert statistics.variance(counts) == pytest.approx(0.7, rel=0.06)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay_ns": 5.0}, "decay_ns"),
        ({"pretrigger": 0.0}, "pretrigger"),
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"adc_bits": 16}, "adc_bits"),
        ({"sample": 3}, "samples"),
    ],
)
def test_a_detector_that_cannot_be_is_refused_by_key(settings, named):
    with pytest.raises(ConfigError, match=named):
        config_of(**settings)
