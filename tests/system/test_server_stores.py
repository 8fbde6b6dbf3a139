"""An agent and an aggregator with stores in real servers, killed with everything else at random moments."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from edgedaq_aggregator.ledger import LedgerRow

from tests.servers import MariaDB, RedisServer
from tests.system.harness import NODE, Site, kill_seed
from tests.system.payload import COLUMNS

pytestmark = [pytest.mark.kills, pytest.mark.timeout(300)]

_KILLS = 8


def test_mysql_and_redis_hold_what_csv_holds_when_servers_and_stores_are_killed(
    tmp_path: Path, runtime_dir: Path
):
    chance = random.Random(kill_seed())
    mariadb = MariaDB("--local-infile=1")
    redis_server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    servers: list[MariaDB | RedisServer] = [mariadb, redis_server]
    try:
        for server in servers:
            server.start()
        mariadb.rows("CREATE DATABASE daq")
        with Site(tmp_path, runtime_dir) as site:
            add_server_store(site, "mysql", "DAQJobStoreMySQL", mariadb, 'database = "daq"\nuser = "root"\n')
            add_server_store(site, "redis", "DAQJobStoreRedis", redis_server, "")
            site.add_table_job(rate_hz=500.0, batch_count=5)
            path = site.agent_dir / "table.toml"
            path.write_text(
                f'{path.read_text()}[store_config.mysql]\ntable_name = "t"\n[store_config.redis]\nkey = "t"\n'
            )
            site.aggregator.start()
            site.agent.start()
            site.wait_put("table", 200)
            for _ in range(_KILLS):
                victim = chance.choice([*servers, "mysql", "redis"])
                if isinstance(victim, str):
                    pid = site.aggregator.kill_worker(victim)
                    site.aggregator.wait_replaced(victim, pid)
                else:
                    victim.kill()
                    threading.Event().wait(chance.uniform(0, 1))
                    victim.start()
                site.wait_put("table", 100)
            ledger = site.deliver_rest()
            verdict = site.judge_table(batch_count=5)
            assert verdict.is_clean, verdict
            held = held_by_csv(site)
            assert sorted(held_by_mysql(mariadb)) == held
            assert sorted(held_by_redis(redis_server)) == held
            check_ledger(ledger, len(held))
    finally:
        for server in servers:
            server.close()


def add_server_store(site: Site, name: str, job_type: str, server: MariaDB | RedisServer, more: str) -> None:
    site.add_store(name, job_type)
    path = site.aggregator_dir / f"{name}.toml"
    path.write_text(f'{path.read_text()}unix_socket = "{server.socket}"\n{more}')


def held_by_csv(site: Site) -> list[tuple[object, ...]]:
    lines = (site.node_dir / "table.csv").read_text().splitlines()[1:]
    return sorted(tuple(map(typed, line.split(","))) for line in lines)


def held_by_mysql(server: MariaDB) -> list[tuple[object, ...]]:
    assert COLUMNS == ("life", "sequence", "check", "value")
    return server.rows("SELECT life, sequence, `check`, value FROM t", database="daq")


def held_by_redis(server: RedisServer) -> list[tuple[object, ...]]:
    with server.client() as client:
        found = client.xrange(f"{NODE}:t")
    return [tuple(typed(fields[name.encode()].decode()) for name in COLUMNS) for _, fields in found]


def typed(text: str) -> object:
    return float(text) if set(text) & set(".en") else int(text)


def check_ledger(ledger: list[LedgerRow], rows: int) -> None:
    for store in ("csv", "mysql", "redis"):
        assert sum(row.stored for row in ledger if row.store == store) == rows
    assert all(row.balances and not row.waiting for row in ledger)
