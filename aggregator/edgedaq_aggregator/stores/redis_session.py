"""One connection to a Redis server: calls, guarded transactions, what the server says of its persistence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import redis.connection
from edgedaq.errors import ConfigError, StoreError
from redis.backoff import NoBackoff
from redis.retry import Retry

from edgedaq_aggregator.stores.server_config import ServerStoreConfig, read_password

__all__ = ["DAQJobStoreRedisConfig", "Persistence", "Session"]

_PORT = 6379
_CONNECT_LIMIT_S = 10.0
_WAITAOF_FROM = (7, 2)


class DAQJobStoreRedisConfig(ServerStoreConfig, kw_only=True, forbid_unknown_fields=True):
    """Besides where the server is.

    Args:
        db: Number of the database.
        accept_volatile: Store even where the server keeps nothing on disk.
    """

    db: Annotated[int, msgspec.Meta(ge=0)] = 0
    accept_volatile: bool = False


class Persistence(NamedTuple):
    """When what a server has said yes to is on its disk."""

    how: str
    """
    always    when it says yes
    waitaof   when WAITAOF returns
    everysec  within seconds; INFO tells that the fsync has passed
    save      with the next save that begins
    untold    some time, nobody knows when
    none      never
    """
    told: str
    """The settings that make it so."""

    @property
    def doubt(self) -> str:
        """What that means for what is stored there; empty where all is well."""
        means = {
            "always": "",
            "waitaof": "",
            "everysec": "the journal keeps what is not fsynced yet, some seconds",
            "save": "the journal keeps everything since the last save began",
            "untold": "commits may be lost with the server's machine; the journal keeps them for 60 s",
            "none": "the server keeps nothing on disk: appendonly yes there, or accept_volatile = true here",
        }[self.how]
        return means and f"{self.told}: {means}"


class Session:
    """One connection. After any error it is of no more use. Not for two threads at a time.

    Raises:
        StoreError: The server cannot be reached, or refuses us.
    """

    def __init__(self, config: DAQJobStoreRedisConfig) -> None:
        self._timeout_s = config.timeout
        connections: Any = redis.connection  # which has types only in part
        try:
            options: dict[str, Any] = {
                "db": config.db,
                "username": config.user or None,
                "password": read_password(config) or None,
                "socket_timeout": config.timeout,
                "socket_connect_timeout": min(config.timeout, _CONNECT_LIMIT_S),
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
                "legacy_responses": True,
            }
            if config.unix_socket:
                made = connections.UnixDomainSocketConnection(path=config.unix_socket, **options)
            elif config.tls_ca:
                made = connections.SSLConnection(
                    host=config.host, port=config.port or _PORT, ssl_ca_certs=config.tls_ca, **options
                )
            else:
                made = connections.Connection(host=config.host, port=config.port or _PORT, **options)
            self._connection = made
            made.connect()
        except ConfigError as e:
            raise StoreError(str(e)) from e
        except (redis.RedisError, OSError) as e:
            message = f"the server at {config.place} does not let us in: {e}"
            raise StoreError(message) from e

    def call(self, *command: Any) -> Any:
        """Return the reply to one command."""
        return self.pipeline([command])[0]

    def pipeline(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the replies to commands that are sent at once.

        Raises:
            StoreError: One of them failed; others may have been done.
        """
        try:
            self._connection.send_packed_command(self._connection.pack_commands(commands))
            return [self._connection.read_response() for _ in commands]
        except (redis.RedisError, OSError) as e:
            raise StoreError(_told(e)) from e

    def refusal(self, *command: Any) -> str:
        """Return the error that a command gives, empty if none."""
        try:
            self._connection.send_command(*command)
            self._connection.read_response(disconnect_on_error=False)
        except redis.ResponseError as e:
            return str(e)
        except (redis.RedisError, OSError) as e:
            raise StoreError(_told(e)) from e
        return ""

    def transaction(
        self, packed: Sequence[Any], count: int, commands: Sequence[Sequence[Any]]
    ) -> list[Any] | None:
        """Do everything, or nothing because a watched key was changed meanwhile (None).

        Args:
            packed: ``count`` commands as bytes, done before ``commands``.

        Returns:
            The replies; each one that is an exception says that this command alone was not done.
        """
        connection = self._connection
        try:
            tail = connection.pack_commands([*commands, ("EXEC",)])
            connection.send_packed_command([*connection.pack_command("MULTI"), *packed, *tail])
            read = connection.read_response
            for _ in range(1 + count + len(commands)):
                read()
            replies = read()
        except (redis.RedisError, OSError) as e:
            raise StoreError(_told(e)) from e
        return None if replies is None else list(replies)

    def wait_for_disk(self) -> None:
        """Return when the server's own append-only file has everything that this connection wrote."""
        limit_ms = max(int(self._timeout_s * 900), 1)
        if int(self.call("WAITAOF", 1, 0, limit_ms)[0]) < 1:
            message = f"the server's append-only file was not synced within {limit_ms} ms"
            raise StoreError(message)

    def info(self) -> dict[str, str]:
        """Return what INFO says."""
        lines = bytes(self.call("INFO")).decode("utf-8", "replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def persistence(self) -> Persistence:
        """Ask the server when it has on its disk what it says yes to."""
        if self.refusal("INFO"):
            return Persistence("untold", "INFO is not allowed to us")
        info = self.info()
        settings = {
            name: self._setting(name) for name in ("appendfsync", "save", "no-appendfsync-on-rewrite")
        }
        version = tuple(int(part) for part in info.get("redis_version", "0").split(".")[:2] if part.isdigit())
        if info.get("aof_enabled") == "1":
            fsync = settings["appendfsync"]
            told = f"appendonly yes, appendfsync {fsync or 'unknown'}"
            if fsync == "always":
                return Persistence("always", told)
            if fsync == "everysec" and version >= _WAITAOF_FROM:
                return Persistence("waitaof", told)
            if fsync == "everysec" and settings["no-appendfsync-on-rewrite"] != "yes":
                return Persistence("everysec", told)
            return Persistence("untold", told)
        if settings["save"] is None:
            return Persistence("untold", "appendonly no, save unknown")
        if settings["save"]:
            return Persistence("save", f"appendonly no, save {settings['save']}")
        return Persistence("none", 'appendonly no, save ""')

    def close(self) -> None:
        """End the connection."""
        self._connection.disconnect()

    def _setting(self, name: str) -> str | None:
        if self.refusal("CONFIG", "GET", name):
            return None  # many a hosted server does not tell
        found = self.call("CONFIG", "GET", name)
        return bytes(found[1]).decode("utf-8", "replace") if found else None


def _told(e: Exception) -> str:
    if isinstance(e, redis.ResponseError | redis.AuthenticationError):
        return f"the server refuses: {e}"
    return f"the connection to the server is lost: {e}"
