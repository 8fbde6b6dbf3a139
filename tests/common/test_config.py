from __future__ import annotations

from typing import Annotated

import msgspec
import pytest
from edgedaq.config import DAQJobConfig, RingOptions, StorableDAQJobConfig, build_job_config
from edgedaq.errors import ConfigError
from edgedaq.typed_toml import build, read_toml
from edgedaq.units import BYTES, SECONDS, Bytes, Seconds, format_bytes, format_seconds
from hypothesis import given, settings
from hypothesis import strategies as st


class MyJobConfig(DAQJobConfig):
    my_setting: str
    interval_seconds: float = 1.0


class UnitsConfig(DAQJobConfig):
    poll_interval_seconds: Annotated[Seconds, msgspec.Meta(gt=0)] = 1.0
    buffer: Bytes = 0
    gains: list[Annotated[int, msgspec.Meta(ge=0, le=255)]] = msgspec.field(default_factory=list)
    timeout: Seconds | None = None
    channels: dict[str, RingOptions] = msgspec.field(default_factory=dict)


def load(config_type, **raw):
    return build_job_config(config_type, {"daq_job_type": "X", **raw}, file="configs/hv.toml", stem="hv")


def lines(config_type, **raw):
    with pytest.raises(ConfigError) as caught:
        load(config_type, **raw)
    return str(caught.value).splitlines()


def test_a_users_configuration_has_its_own_settings_and_the_common_ones():
    config = load(MyJobConfig, my_setting="a")
    assert (config.my_setting, config.interval_seconds, config.daq_job_unique_id) == ("a", 1.0, "hv")
    assert config.restart == "on_failure"
    assert config.hang_limit is None


def test_a_users_configuration_may_be_frozen():
    class Frozen(DAQJobConfig, frozen=True):  # type: ignore[misc]  # msgspec allows it
        my_setting: str = ""

    assert load(Frozen).daq_job_unique_id == "hv"


def test_the_seeds_job_file_loads(tmp_path):
    class SensorConfig(StorableDAQJobConfig):
        interval_seconds: float = 1.0

    path = tmp_path / "my_sensor.toml"
    path.write_text(
        'daq_job_type = "DAQJobMySensor"\ninterval_seconds = 1.0\n\n'
        '[store_config.csv]\nfile_path = "sensor_data.csv"\nadd_date = true\n'
    )
    config = build_job_config(SensorConfig, read_toml(path), file=str(path), stem=path.stem)
    assert config.daq_job_unique_id == "my_sensor"
    assert config.store_config.csv is not None
    assert config.store_config.csv.add_date
    assert config.store_config.topics() == ("store.DAQJobStoreCSV",)


def test_a_range_is_told_with_file_key_value_and_limit():
    assert lines(UnitsConfig, poll_interval_seconds=0) == [
        "configs/hv.toml: poll_interval_seconds must be greater than 0, got 0.0"
    ]
    assert lines(UnitsConfig, gains=[1, 256]) == [
        "configs/hv.toml: gains[1] must be at least 0 and at most 255, got 256"
    ]


def test_a_negative_time_is_refused_with_the_value_that_was_written():
    assert lines(UnitsConfig, poll_interval_seconds=-1) == [
        "configs/hv.toml: poll_interval_seconds must be a time of 0 or more, got -1"
    ]


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    assert lines(MyJobConfig, my_setting="a", intervall_seconds=2) == [
        "configs/hv.toml: unknown key 'intervall_seconds', did you mean 'interval_seconds'?"
    ]


def test_an_unknown_section_is_refused_with_the_nearest_known_one():
    assert lines(StorableDAQJobConfig, store_config={"cvs": {"file_path": "a.csv"}}) == [
        "configs/hv.toml: unknown section [store_config.cvs], did you mean 'csv'?"
    ]


def test_a_key_without_any_likeness_is_refused_with_all_known_ones():
    (line,) = lines(RingHolder, ring={"zzz": 1})
    assert line == "configs/hv.toml: unknown key 'ring.zzz', known: linger_s, ring_bytes, slot_bytes, slots"


class RingHolder(DAQJobConfig):
    pass


def test_every_problem_of_a_file_is_told_at_once():
    found = lines(
        MyJobConfig, verbosity="LOUD", stop_limit="3 parsecs", ring={"ring_bytes": "1 KiB"}, bogus=1
    )
    assert len(found) == 5
    assert all(line.startswith("configs/hv.toml: ") for line in found)
    assert "my_setting is missing; it must be a text" in found[-1]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"my_setting": 3}, "my_setting must be a text, got 3"),
        ({"my_setting": "a", "interval_seconds": "1"}, "interval_seconds must be a number, got '1'"),
        (
            {"my_setting": "a", "restart": "sometimes"},
            'restart must be one of "always", "on_failure", "never"',
        ),
        ({"my_setting": "a", "restart_limit": True}, "restart_limit must be a whole number, got True"),
        ({"my_setting": "a", "ring": 5}, "ring must be a section [ring], got 5"),
        ({"my_setting": "a", "daq_job_unique_id": "a/b"}, "daq_job_unique_id must be 1 to 63 letters"),
        ({"my_setting": "a", "daq_job_unique_id": "ALL"}, "daq_job_unique_id must not be 'ALL'"),
        (
            {"my_setting": "a", "ring": {"ring_bytes": "1 MiB", "slot_bytes": "512 KiB"}},
            "ring: slot_bytes must be at most a quarter of ring_bytes (1 MiB), got 512 KiB",
        ),
    ],
)
def test_a_wrong_value_is_one_line(raw, text):
    (line,) = lines(MyJobConfig, **raw)
    assert text in line


def test_units_are_accepted_wherever_a_size_or_a_time_stands():
    config = load(
        UnitsConfig,
        poll_interval_seconds="50 ms",
        buffer="64 MiB",
        timeout="2 h",
        stop_limit="1.5 s",
        channels={"a": {"ring_bytes": "1 MiB"}},
    )
    assert config.poll_interval_seconds == pytest.approx(0.05)
    assert (config.buffer, config.timeout, config.stop_limit) == (64 << 20, 7200.0, 1.5)
    assert config.channels["a"].ring_bytes == 1 << 20


@pytest.mark.parametrize(
    ("text", "count"),
    [("10 GB", 10**10), ("1KiB", 1024), ("0 B", 0), ("1_000 B", 1000), ("1.5 KiB", 1536), (7, 7)],
)
def test_sizes(text, count):
    assert BYTES.parse(text) == count


@pytest.mark.parametrize(
    "text", ["", "MiB", "1 mib", "1 MiB 2", "-1 B", "1e3 B", "0.1 B", None, True, [], -1, 1.5]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="must be a"):
        BYTES.parse(text)


@pytest.mark.parametrize("text", ["5", "5 sec", "ms", "nan s", float("nan"), float("inf"), -0.5, False])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match="must be a time"):
        SECONDS.parse(text)


def test_a_wrong_unit_is_told_with_the_nearest_one():
    with pytest.raises(ConfigError, match="got unit 'Mib', did you mean 'MiB'"):
        BYTES.parse("1 Mib")


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.none(), st.booleans()))
def test_any_value_is_a_quantity_or_a_config_error(value):
    for unit in (BYTES, SECONDS):
        try:
            number = unit.parse(value)
        except ConfigError:
            continue
        assert number >= 0


def test_quantities_are_written_for_people():
    assert format_bytes(64 << 20) == "64 MiB"
    assert format_bytes(5) == "5 B"
    assert format_seconds(0.05) == "50 ms"
    assert format_seconds(7200) == "2 h"


def test_rules_between_settings_are_told_with_the_file():
    class Range(DAQJobConfig):
        low: int = 0
        high: int = 0

        def __post_init__(self):
            if self.low > self.high:
                message = f"high must be at least low, got {self.high}"
                raise ValueError(message)

    assert lines(Range, low=2, high=1) == ["configs/hv.toml: high must be at least low, got 1"]


def test_a_checked_configuration_survives_the_way_to_its_worker_and_is_checked_there_again():
    config = load(UnitsConfig, poll_interval_seconds="50 ms", channels={"a": {}})
    again = build(
        UnitsConfig, msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.to_builtins(config))), "x"
    )
    assert again == config


def test_files_that_are_no_toml_say_so_in_one_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("a = \n")
    with pytest.raises(ConfigError, match=r"a\.toml: is not valid TOML: .*line 1") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"b\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "b.toml")
