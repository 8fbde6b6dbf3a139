"""What users' jobs do that nobody would: each ends as documented, and what was put is there once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from edgedaq.frame import Kind

from tests.common.test_worker import drained, rows_of, worker


def test_a_forked_child_cannot_put_and_its_signals_and_end_are_its_own(
    tmp_path: Path, runtime_dir: Path
) -> None:
    code = """
    def start(self):
        import signal, sys
        self.put_rows([[0]], ["n"], store_config=STORE)
        refused = os.fork()
        if not refused:
            try:
                self.put_rows([[666]], ["n"], store_config=STORE)
            except JobError as e:
                os._exit(5 if "fork" in str(e) else 6)
            os._exit(7)
        self.status = os.waitpid(refused, 0)[1] >> 8
        asleep = os.fork()
        if not asleep:
            time.sleep(20)
            os._exit(8)
        time.sleep(0.2)
        os.kill(asleep, signal.SIGTERM)
        self.signal = os.waitpid(asleep, 0)[1] & 0x7F
        leaves = os.fork()
        if not leaves:
            sys.exit(3)
        self.left = os.waitpid(leaves, 0)[1] >> 8
        raises = os.fork()
        if not raises:
            raise RuntimeError("in the child")
        self.raised = os.waitpid(raises, 0)[1] >> 8
        time.sleep(1.5)
        self.put_rows([[1]], ["n"], store_config=STORE)
        time.sleep(1.5)
        self.put_rows([[2]], ["n"], store_config=STORE)

    status = signal = left = raised = None

    def report(self):
        return {"seen": [self.status, self.signal, self.left, self.raised]}
    """
    with worker(tmp_path, runtime_dir, code) as job:
        ended = job.until("ended")
        assert job.end() == 0, job.errors
    assert ended["reason"] == "finished"
    assert ended["snapshot"]["extra"]["seen"] == [5, signal.SIGTERM, 3, 1]
    taken = drained(runtime_dir / "rings")
    assert rows_of(taken) == [(0,), (1,), (2,)]
    assert [frame.kind for frame in taken.frames].count(Kind.CLOSE) == 1
    assert len(job.all_of("report")) >= 3, "the child must not end the parent's service thread"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("os._exit(7)", 7, None),
        ("raise SystemExit", 0, "sys.exit"),
        ("raise SystemExit(3)", 3, "sys.exit"),
        ("raise SystemExit('the crate is off')", 1, "the crate is off"),
        ("os.closerange(3, 1000); time.sleep(20)", None, None),
        ("os.kill(os.getpid(), 11); time.sleep(20)", -11, None),
        ("import ctypes; ctypes.string_at(8)", -11, None),
    ],
)
def test_however_a_job_leaves_what_it_had_put_is_there_once(
    tmp_path: Path, runtime_dir: Path, body: str, status: int | None, reason: str | None
) -> None:
    code = f"""
    def start(self):
        for n in range(1000):
            self.put_rows([[n]], ["n"], store_config=STORE)
        {body}
    """
    begun = time.monotonic()
    with worker(tmp_path, runtime_dir, code) as job:
        ended = job.end()
    assert time.monotonic() - begun < 10
    if status is not None:
        assert ended == status, job.errors
    if reason is not None:
        assert reason in job.all_of("ended")[0]["reason"]
    taken = drained(runtime_dir / "rings")
    assert rows_of(taken) == [(n,) for n in range(1000)]
    assert [frame.kind for frame in taken.frames][-1] is Kind.CLOSE


def test_a_constructor_that_raises_is_a_failure_with_its_reason(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def __init__(self, config, context):
        super().__init__(config, context)
        raise OSError("no such crate")
    """
    with worker(tmp_path, runtime_dir, code) as job:
        assert job.end() == 1
    assert job.all_of("ended")[0]["reason"] == "OSError: no such crate"
    assert not job.all_of("started")


def test_a_job_that_blocks_signals_is_stopped_all_the_same(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    def start(self):
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            self.put_rows([[1]], ["n"], store_config=STORE)
            self.sleep(0.01)
    """
    with worker(tmp_path, runtime_dir, code) as job:
        job.until("report", lambda message: message["snapshot"]["out_count"])
        job.process.send_signal(signal.SIGTERM)
        job.link.send({"type": "stop"})
        assert job.end() == 0
    assert job.all_of("ended")[0]["reason"] == "stopped"


def test_what_a_leaked_thread_has_put_is_there_once_and_what_it_puts_too_late_is_refused(
    tmp_path: Path, runtime_dir: Path
) -> None:
    code = """
    def start(self):
        import atexit
        leaked = threading.Thread(target=self.leak, daemon=True)
        leaked.start()
        atexit.register(leaked.join, 5)  # the process must not end before it has seen the refusal
        time.sleep(0.5)

    def leak(self):
        n = 0
        with open(self.runtime_dir / "put", "w") as put:
            try:
                while True:
                    self.put_rows([[n]], ["n"], store_config=STORE)
                    put.write(f"{n}\\n")
                    put.flush()
                    n += 1
            except JobError as e:
                put.write(f"{e}\\n")
    """
    with worker(tmp_path, runtime_dir, code, ring={"ring_bytes": 64 << 20}) as job:
        assert job.end() == 0, job.errors
    *put, refusal = (runtime_dir / "put").read_text().splitlines()
    assert "nothing can be put any more" in refusal
    taken = drained(runtime_dir / "rings")
    assert rows_of(taken) == [(int(n),) for n in put]
    assert [frame.kind for frame in taken.frames].count(Kind.CLOSE) == 1


def test_a_put_inside_a_put_is_refused_and_tears_nothing(tmp_path: Path, runtime_dir: Path) -> None:
    code = """
    refused = 0

    def start(self):
        import signal
        self.inside = False
        signal.signal(signal.SIGALRM, self.on_alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        n = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            self.put_rows([[n]], ["n"], store_config=STORE)
            n += 1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def on_alarm(self, *_):
        try:
            self.put_rows([[-1]], ["n"], store_config=STORE)
        except JobError:
            self.refused += 1

    def report(self):
        return {"refused": self.refused}
    """
    with worker(
        tmp_path, runtime_dir, code, claims={"uplink": ["store"]}, ring={"ring_bytes": 64 << 20}
    ) as job:
        ended = job.until("ended")
        assert job.end() == 0, job.errors
    rows = [row[0] for row in rows_of(drained(runtime_dir / "rings"))]
    put = [n for n in rows if n >= 0]
    assert put == list(range(len(put)))
    assert ended["snapshot"]["extra"]["refused"] > 0
