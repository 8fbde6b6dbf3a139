from __future__ import annotations

import contextlib
import decimal
import fractions
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgedaq import (
    DAQJob,
    DAQJobConfig,
    DAQJobMessageEvent,
    DAQJobMessageGap,
    DAQJobMessageStorePyArrow,
    DAQJobMessageStoreRaw,
    DAQJobMessageStoreTabular,
    DAQJobStoreConfig,
    DAQJobStoreConfigCSV,
    DAQJobStoreConfigRaw,
    Schema,
    StorableDAQJobConfig,
)
from edgedaq.batch import event_of, frame_columns, raw_messages
from edgedaq.delivery import gap_of
from edgedaq.errors import JobError
from edgedaq.frame import Kind
from edgedaq.inlet import Inlet, withdraw_claim
from edgedaq.job_context import JobContext, JobStopped, WorkerSpec
from edgedaq.messages import Source
from edgedaq.schema import Column, OpenInfo, decode_open

from tests.common.producing import Producer, Taken, pump
from tests.common.test_worker import drained, worker

CSV = DAQJobStoreConfig(csv=DAQJobStoreConfigCSV(file_path="a.csv"))
RAW = DAQJobStoreConfig(raw=DAQJobStoreConfigRaw(file_path="a.bin"))


class Bench:
    """A job that a test drives by hand, and what consumers get of it."""

    def __init__(self, runtime_dir: Path, config: Any) -> None:
        spec = WorkerSpec(
            unique_id="job1", job_type="Job", target="x:Job", node="node1", boot="boot",
            runtime_dir=str(runtime_dir), claims={"uplink": ["store", "alarm"]},
        )  # fmt: skip
        self.context = JobContext(spec)
        self.job = DAQJob(config, self.context)
        self.rings_dir = runtime_dir / "rings"
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self.context.close()

    def taken(self) -> list[tuple[OpenInfo, Any]]:
        self.close()
        taken = drained(self.rings_dir)
        infos = {f.stream: decode_open(f) for f in taken.frames if f.kind is Kind.OPEN}
        return [(infos[f.stream], f) for f in taken.frames]

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            row
            for info, frame in self.taken()
            if frame.kind in (Kind.PACKED, Kind.COLUMNS, Kind.ARROW)
            for row in zip(*frame_columns(info, frame)[1], strict=True)
        ]


@pytest.fixture
def bench(runtime_dir: Path) -> Iterator[Bench]:
    made = Bench(runtime_dir, StorableDAQJobConfig(daq_job_type="Job", store_config=CSV))
    yield made
    made.close()


def test_rows_go_where_the_toml_of_the_job_says(bench: Bench) -> None:
    bench.job.put_rows([[1, 2.5], [2, 3.5]], ["n", "x"])
    taken = bench.taken()
    info, frame = taken[1]
    assert info.topics == ("store.DAQJobStoreCSV",)
    assert info.store_config == CSV.to_map()
    assert (info.node, info.job, info.job_type, info.life) == ("node1", "job1", "Job", bench.context.life)
    assert [column.dtype for column in info.schema.columns] == ["i8", "f8"] if info.schema else False
    assert [f.kind for _, f in taken] == [Kind.OPEN, Kind.PACKED, Kind.CLOSE]
    assert frame.rows == 2


def test_a_put_may_name_another_store_and_more_topics(bench: Bench) -> None:
    bench.job.put_raw(b"abc", store_config=RAW, topics=["alarm.high"], tag="waveforms")
    info, frame = bench.taken()[1]
    assert info.topics == ("alarm.high", "store.DAQJobStoreRaw")
    assert info.tag == "waveforms"
    assert [bytes(m) for m in raw_messages(frame)] == [b"abc"]


def test_all_messages_of_the_seed_are_put(bench: Bench) -> None:
    pa = pytest.importorskip("pyarrow")
    job = bench.job
    job._put_message_out(
        DAQJobMessageStoreTabular(store_config=CSV, keys=["a", "b"], data=[[1, "x"], [2, None]])
    )
    job._put_message_out(
        DAQJobMessageStoreTabular(store_config=CSV, keys=["a", "b"], data_columns={"b": ["y"], "a": [3]})
    )
    table = pa.table({"a": [4, 5], "b": pa.array(["z", "z"]).dictionary_encode()})
    job._put_message_out(DAQJobMessageStorePyArrow(store_config=CSV, table=table))
    job._put_message_out(DAQJobMessageStorePyArrow(store_config=CSV, table=table.to_batches()[0]))
    job._put_message_out(DAQJobMessageStoreRaw(store_config=RAW, data=b"raw"))
    job._put_message_out(DAQJobMessageEvent(topics=["alarm"], metadata={"k": 1}, data=b"payload"))
    with pytest.raises(JobError, match="either data or"):
        job._put_message_out(DAQJobMessageStoreTabular(keys=["a"], data=[[1]], data_columns={"a": [1]}))
    taken = bench.taken()
    rows = [
        row
        for info, frame in taken
        if frame.kind in (Kind.PACKED, Kind.COLUMNS, Kind.ARROW)
        for row in zip(*frame_columns(info, frame)[1], strict=True)
    ]
    expected = [(1, "x"), (2, None), (3, "y"), (4, "z"), (5, "z"), (4, "z"), (5, "z")]
    assert sorted(rows, key=lambda row: row[0]) == sorted(expected, key=lambda row: row[0])
    assert len({info.life for info, _ in taken}) == 1
    assert sum(1 for _, frame in taken if frame.kind is Kind.OPEN) == 4, "both arrow tables are one stream"
    events = [event_of(frame) for _, frame in taken if frame.kind is Kind.EVENT]
    assert [(facts, bytes(payload)) for facts, payload in events] == [({"k": 1}, b"payload")]


def test_store_options_made_anew_for_every_message_stay_one_stream(bench: Bench) -> None:
    for n in range(1500):
        bench.job._put_message_out(
            DAQJobMessageStoreTabular(
                store_config=DAQJobStoreConfig(csv=DAQJobStoreConfigCSV(file_path="b.csv")),
                keys=["n", "x"],
                data=[[n, n if n < 1000 else None]],
            )
        )
    assert len(bench.context.outlet().stream_rows()) == 1
    assert bench.rows() == [(n, n if n < 1000 else None) for n in range(1500)]


def test_undeclared_numbers_keep_the_type_of_the_first_and_widen_when_they_must(bench: Bench) -> None:
    for value in (1, 2, 2.5, None, "text", True):
        bench.job.put_rows([[value]], ["v"])
    assert bench.rows() == [(1,), (2,), (2.5,), (None,), ("text",), ("true",)]


def test_no_value_of_numpy_or_python_is_refused_for_its_type(bench: Bench) -> None:
    class Word(str):
        __slots__ = ()

    odd = [
        *(np.str_("text"), Word("word"), np.longdouble(1.5), np.clongdouble(1 + 2j), np.float16(0.5)),
        *(np.array(3.0), np.datetime64("2020-01-01"), np.uint64(2**64 - 1), np.ma.masked),
        *(decimal.Decimal("1.5"), fractions.Fraction(1, 2), 2**200, float("nan"), 1j),
        *({"a": 1}, {1}, object()),
        *(np.ones((2, 2)), np.array([1, "a", None], dtype=object), np.array([np.longdouble(1)])),
    ]
    for first in (1, 1.0, "text", True, None, [1.5], b"x"):
        for n, value in enumerate(odd):
            bench.job.put_rows([[first, -1], [value, n]], ["x", "n"], tag=f"{first!r}")
    rows = bench.rows()
    assert [row[1] for row in rows] == [m for _ in range(7) for n in range(len(odd)) for m in (-1, n)]
    assert [row[0] for row in rows if row[1] in (0, 1)] == ["text", "word"] * 7


@pytest.mark.parametrize("rows", [[1.0], [None], ["text"], [{"a": 1}], np.ones(3), [[1], 5], [[1], None]])
def test_what_is_no_row_is_refused_with_what_a_row_is(bench: Bench, rows: Any) -> None:
    for limit_s in (None, 1.0):
        with pytest.raises(JobError, match=r"job job1: rows must be a list of rows, .* got a "):
            bench.job.put_rows(rows, ["a"], timeout_s=limit_s)


def test_names_of_columns_must_be_text(bench: Bench) -> None:
    with pytest.raises(JobError, match=r"job job1: rows need keys or a schema, got \(1,\)"):
        bench.job.put_rows([[1]], [1])  # type: ignore[list-item]


def test_tables_are_columns_arrays_or_arrow(bench: Bench) -> None:
    np = pytest.importorskip("numpy")
    schema = Schema((Column("n", "i8"), Column("x", "f8")))
    job = bench.job
    job.put_table({"n": [1, 2], "x": [0.5, 1.5]})
    job.put_table({"x": np.array([2.5, 3.5]), "n": np.array([3, 4])}, schema=schema)
    job.put_table(np.array([(5, 4.5)], dtype=[("n", "<i8"), ("x", "<f8")]))
    with pytest.raises(JobError, match="equally long"):
        job.put_table({"n": [1, 2], "x": [0.5]})
    with pytest.raises(JobError, match="columns n, x"):
        job.put_table({"n": [1], "y": [0.5]}, schema=schema)
    with pytest.raises(JobError, match="columns by name"):
        job.put_table([1, 2])
    assert bench.rows() == [(1, 0.5), (2, 1.5), (3, 2.5), (4, 3.5), (5, 4.5)]


def test_a_put_that_goes_nowhere_is_refused(runtime_dir: Path) -> None:
    bench = Bench(runtime_dir, DAQJobConfig(daq_job_type="Job"))
    try:
        with pytest.raises(JobError, match="must name a topic or a store"):
            bench.job.put_rows([[1]], ["n"])
        with pytest.raises(JobError, match="keys or a schema"):
            bench.job.put_rows([[1]], store_config=CSV)
        with pytest.raises(JobError, match="names of the schema"):
            bench.job.put_rows([[1]], ["m"], schema=Schema((Column("n", "i8"),)), store_config=CSV)
        with pytest.raises(JobError, match="must follow a put"):
            bench.job.report_loss(3, "overrun")
        bench.job.put_rows([], ["n"])
    finally:
        bench.close()


def test_a_loss_is_a_gap_in_the_stream_that_was_put_to_last(bench: Bench) -> None:
    bench.job.put_rows([[1]], ["n"], tag="a")
    bench.job.put_raw(b"x", tag="b")
    bench.job.report_loss(5, "overrun")
    bench.job.report_loss(None, "unplugged", tag="a")
    gaps = [(info.tag, frame.seq) for info, frame in bench.taken() if frame.kind is Kind.GAP]
    assert sorted(gaps) == [("a", 2), ("b", 2)]


def test_a_thread_reports_losses_of_its_own_streams_only(bench: Bench) -> None:
    found: list[str] = []

    def work() -> None:
        try:
            bench.job.report_loss(1, "before it put anything")
        except JobError:
            found.append("refused")
        bench.job.put_rows([[10]], ["n"])
        bench.job.report_loss(7, "overrun")

    bench.job.put_rows([[1]], ["n"])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    bench.job.put_rows([[2]], ["n"])
    taken = bench.taken()
    assert found == ["refused"]
    (gap,) = [frame for _, frame in taken if frame.kind is Kind.GAP]
    mine = [f.rows for _, f in taken if f.kind is Kind.PACKED and f.stream != gap.stream]
    assert sum(mine) == 2


def test_a_stop_is_raised_once_out_of_sleep(bench: Bench) -> None:
    bench.context.request_stop()
    assert bench.job.is_stopping
    with pytest.raises(JobStopped):
        bench.job.sleep(1000)
    bench.job.sleep(0)
    bench.job.put_rows([[1]], ["n"])
    assert bench.rows() == [(1,)]


def test_a_job_that_consumes_is_handed_every_message_of_its_topics(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    topics_to_subscribe = ("store.X",)

    def handle_message(self, message):
        if isinstance(message, DAQJobMessageStoreTabular):
            for row in message.data:
                self.put_rows([[row[0], message.source.job]], ["n", "of"], topics=["out"])
        else:
            self.put_raw(message.data, topics=["out"])
    """
    rings_dir = runtime_dir / "rings"
    rings_dir.mkdir()
    taken = Taken()
    with (
        contextlib.ExitStack() as stack,
        Inlet(rings_dir, "uplink", ["out"], retire=True) as uplink,
        worker(tmp_path, runtime_dir, code, claims={"uplink": ["out"]}) as w,
    ):
        w.until("started")
        pump(uplink, taken, (rings_dir / "job1.wants").exists)
        producer = stack.enter_context(Producer(rings_dir, claims={}))
        producer.tell("rows", first=0, count=500)
        producer.tell("raw", messages=[(1, 100), (2, 200_000)])
        pump(uplink, taken, lambda: taken.rows() == 502)
        assert w.until("report", lambda report: report["snapshot"]["in_count"] == 502)
        producer.kill()
        w.link.send({"type": "stop"})
        assert w.end() == 0
        withdraw_claim(rings_dir, "job1")
        pump(uplink, taken, lambda: not uplink.rings)
    infos = {f.stream: decode_open(f) for f in taken.frames if f.kind is Kind.OPEN}
    found = [
        row
        for f in taken.frames
        if f.kind is Kind.COLUMNS
        for row in zip(*frame_columns(infos[f.stream], f)[1], strict=True)
    ]
    assert found == [(n, "job") for n in range(500)]


def test_the_job_of_the_seed_runs_with_only_its_imports_changed(tmp_path: Path, runtime_dir: Path) -> None:
    source = """
import time
from edgedaq import DAQJob, DAQJobConfig
from edgedaq import DAQJobMessageStoreTabular, DAQJobStoreConfig
from edgedaq import DAQJobStoreConfigCSV

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
                    store_config=DAQJobStoreConfig(csv=DAQJobStoreConfigCSV(file_path="my.csv")),
                    keys=["timestamp", "value"],
                    data=[[time.time(), 42.0]],
                )
            )
            time.sleep(self.config.interval_seconds)
"""
    file = tmp_path / "my_job.py"
    file.write_text(source, encoding="utf-8")
    config = {"daq_job_type": "my_job.py:DAQJobMyJob", "my_setting": "x", "interval_seconds": 0.01}
    with worker(tmp_path, runtime_dir, "pass", target=f"{file}:DAQJobMyJob", config=config) as w:
        w.until("report", lambda report: report["snapshot"]["out_count"] > 10)
        w.link.send({"type": "stop"})
        assert w.end() == 0
        count = w.all_of("ended")[0]["snapshot"]["out_count"]
    taken = drained(runtime_dir / "rings")
    infos = {f.stream: decode_open(f) for f in taken.frames if f.kind is Kind.OPEN}
    values = [v for f in taken.frames if f.rows for v in frame_columns(infos[f.stream], f)[1][1]]
    assert values == [42.0] * count


def test_edgedaq_is_imported_without_heavy_libraries() -> None:
    import subprocess
    import sys

    code = "import sys, edgedaq; print(sorted({'numpy', 'pyarrow', 'zmq'} & set(sys.modules)))"
    assert shutil.which(sys.executable)
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": "common"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_what_an_opened_stream_puts_goes_where_put_rows_puts_it(bench: Bench) -> None:
    schema = Schema((Column("n", "i8"),))
    put = bench.job.open_table(schema)
    for n in range(3):
        put((n,))
    bench.job.put_rows([[3]], schema=schema)
    put((4,))
    bench.job.report_loss(2, "overrun")
    bench.job.open_raw(topics=["alarm"])(b"x")
    with ThreadPoolExecutor(1) as pool, pytest.raises(JobError, match="main thread"):
        pool.submit(bench.job.open_table, schema).result()
    taken = bench.taken()
    assert [
        row
        for info, f in taken
        if f.kind is Kind.PACKED
        for row in zip(*frame_columns(info, f)[1], strict=True)
    ] == [(n,) for n in range(5)]
    assert len({f.stream for _, f in taken if f.kind is Kind.PACKED}) == 1
    assert [f.rows for info, f in taken if info.topics == ("alarm", "store.DAQJobStoreCSV") and f.rows] == [1]


class _Operator(DAQJob):
    def handle_message(self, message: Any) -> None:
        self.put_raw(message.data, topics=["store.X"])


@pytest.mark.parametrize("is_first", [True, False])
def test_what_an_operator_missed_is_a_loss_in_what_it_puts(runtime_dir: Path, is_first: bool) -> None:
    bench = Bench(runtime_dir, DAQJobConfig(daq_job_type="Job"))
    operator = _Operator(bench.job.config, bench.context)
    message = DAQJobMessageStoreRaw(data=b"x")
    gap = DAQJobMessageGap(
        source=Source("pi", "adc", 7, 3, 0), last=5, rows=40, reason="missed by this consumer"
    )
    if not is_first:
        operator.handle_message(message)
    operator.handle_gap(gap)
    operator.handle_message(message)
    operator.write_down_missed()
    gaps = [gap_of(frame) for _, frame in bench.taken() if frame.kind is Kind.GAP]
    assert [(rows, reason) for _, rows, reason in gaps] == [
        (None, "input of pi/adc: 40 rows: missed by this consumer")
    ]
