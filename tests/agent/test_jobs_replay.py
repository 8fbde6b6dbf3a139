from __future__ import annotations

import csv
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from edgedaq.batch import frame_columns
from edgedaq.config import build_job_config
from edgedaq.errors import ConfigError, JobError
from edgedaq.frame import Kind
from edgedaq.job_context import JobContext, WorkerSpec
from edgedaq.schema import decode_open
from edgedaq_agent.jobs.replay import DAQJobReplay, DAQJobReplayConfig, time_ns

from tests.common.test_worker import drained
from tests.contract.job_contract import JobContract, RunningJob

SAMPLE = Path(__file__).parents[2] / "configs" / "examples" / "replay.csv"
STORES = {"csv": {"file_path": "replayed.csv"}}
NAMES = ("timestamp", "event", "charge", "is_good", "hits", "comment")


def sample_rows() -> list[tuple[Any, ...]]:
    with SAMPLE.open(newline="", encoding="utf-8") as file:
        return [
            (
                time_ns(row["timestamp"]),
                int(row["event"]),
                float(row["charge"]) if row["charge"] else None,
                row["is_good"] == "true",
                json.loads(row["hits"]),
                row["comment"] or None,
            )
            for row in csv.DictReader(file)
        ]


class TestDAQJobReplay(JobContract):
    job_type = "DAQJobReplay"
    config: ClassVar[dict[str, Any]] = {
        "path": str(SAMPLE), "speed": 100.0, "repeat": 0, "store_config": STORES,
    }  # fmt: skip

    def check_output(self, job: RunningJob) -> None:
        found, expected = job.rows(), sample_rows()
        assert len(found) >= 30
        assert [list(row) for row in found] == [list(expected[n % len(expected)]) for n in range(len(found))]
        (info,) = job.infos.values()
        assert info.schema
        dtypes = [column.text for column in info.schema.columns]
        assert dtypes == ["timestamp", "i8", "f8", "bool", "i8[]", "utf8"]


@contextmanager
def replayed(runtime_dir: Path, config_dir: Path, **settings: Any) -> Any:
    """Run the job by hand to its end; yield it and what a consumer then finds, by tag."""
    raw = {"daq_job_type": "DAQJobReplay", "store_config": STORES, **settings}
    config = build_job_config(DAQJobReplayConfig, raw, file="r.toml", stem="r")
    spec = WorkerSpec(
        unique_id="r", job_type="DAQJobReplay", target="", node="n", boot="b",
        runtime_dir=str(runtime_dir), config_file=str(config_dir / "r.toml"), claims={"uplink": ["store"]},
    )  # fmt: skip
    context = JobContext(spec)
    job = DAQJobReplay(config, context)
    found: dict[str, list[tuple[Any, ...]]] = {}
    try:
        began_s = time.monotonic()
        job.start()
        took_s = time.monotonic() - began_s
    finally:
        context.close()
    frames = drained(runtime_dir / "rings").frames
    infos = {f.stream: decode_open(f) for f in frames if f.kind is Kind.OPEN}
    for frame in frames:
        if frame.rows:
            info = infos[frame.stream]
            found.setdefault(info.tag, []).extend(zip(*frame_columns(info, frame)[1], strict=True))
    yield job, found, infos, took_s


@pytest.mark.parametrize("speed", [1.0, 10.0])
def test_rows_come_at_their_own_pace_times_the_speed(runtime_dir: Path, tmp_path: Path, speed: float) -> None:
    lines = ["timestamp,n", *(f"2026-01-01T00:00:00.{n}00Z,{n}" for n in range(9))]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    with replayed(runtime_dir, tmp_path, path="a.csv", speed=speed) as (_, found, _, took_s):
        assert [row[1] for row in found[""]] == list(range(9))
    assert took_s >= 0.8 / speed
    assert took_s < 0.8 / speed + 5


def test_a_stored_run_is_played_file_by_file_together_by_time(runtime_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "node1"
    (run / "sub").mkdir(parents=True)
    for name, first in (("a.csv", 0), ("sub/b.csv", 1)):
        rows = [f"{1_700_000_000 + n},{n}" for n in range(first, 5000, 2)]
        (run / name).write_text("\n".join(["t,n", *rows]), encoding="utf-8")
    (run / "_marks.csv").write_text("kind\ngap\n", encoding="utf-8")
    (run / "waves.bin").write_bytes(b"x")
    with replayed(runtime_dir, tmp_path, path="node1", speed=0, time_column="t") as (_, found, infos, _):
        assert {tag: [row[1] for row in rows] for tag, rows in found.items()} == {
            "a": list(range(0, 5000, 2)),
            "sub/b": list(range(1, 5000, 2)),
        }
        stored = {info.tag: info.store_config["csv"]["file_path"] for info in infos.values()}
        assert stored == {"a": "a.csv", "sub/b": "sub/b.csv"}


def test_parquet_and_compressed_csv_are_played(runtime_dir: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = pa.array([1_700_000_000_000 + n for n in range(3000)], pa.timestamp("ms", tz="UTC"))
    table = pa.table({"timestamp": times, "n": pa.array(range(3000), pa.int32())})
    parquet.write_table(table, tmp_path / "a.parquet")
    halves = [SAMPLE.read_bytes()[:1000], SAMPLE.read_bytes()[1000:]]
    frames = b"".join(pa.compress(half, codec="zstd", asbytes=True) for half in halves)
    (tmp_path / "b.csv.zst").write_bytes(frames)
    with replayed(runtime_dir, tmp_path, path="a.parquet", speed=1000) as (_, found, _, _):
        assert [row[1] for row in found[""]] == list(range(3000))
        assert found[""][1][0] - found[""][0][0] == 10**6
    shutil.rmtree(runtime_dir / "rings")
    with replayed(runtime_dir, tmp_path, path="b.csv.zst", speed=0) as (_, found, _, _):
        assert [list(row) for row in found[""]] == [list(row) for row in sample_rows()]


def test_lines_that_are_none_are_passed_over_and_counted(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("timestamp,n\n1,1\n2\n3,3\n4,", encoding="utf-8")
    with replayed(runtime_dir, tmp_path, path="a.csv", speed=0, repeat=2) as (job, found, _, _):
        assert [row[1] for row in found[""]] == [1, 3, None] * 2
        assert job.report() == {"skipped_lines": 2}


@pytest.mark.parametrize(
    ("content", "settings", "named"),
    [
        (None, {}, r"path must be a file, or a directory of files, of \.csv.*got .*a\.csv"),
        ("time,n\n1,1\n", {}, r"time_column must be one of time, n, got 'timestamp'; speed = 0"),
        ("", {}, "time_column must be one of"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_way_out(
    runtime_dir: Path, tmp_path: Path, content: str | None, settings: dict[str, Any], named: str
) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=named), replayed(runtime_dir, tmp_path, path="a.csv", **settings):
        pass


def test_times_are_told_by_their_form_and_size() -> None:
    expected = 1_767_225_600_500_000_000
    for value in (
        "2026-01-01T00:00:00.5Z",
        "2026-01-01 01:00:00.500+01:00",
        "2026-01-01T00:00:00.500000000",
        1_767_225_600.5,
        1_767_225_600_500,
        1_767_225_600_500_000,
        expected,
    ):
        assert time_ns(value) == expected
    assert time_ns("2026-01-01T00:00:00.123456789Z") % 10**9 == 123_456_789
    assert time_ns("1969-12-31T23:59:59.25Z") == -750_000_000
    assert time_ns(None) == 0
    with pytest.raises(JobError, match="ISO 8601"):
        time_ns("yesterday")
