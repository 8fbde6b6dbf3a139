"""What the TOML of every store with a server behind it says: where the server is, and who we are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from edgedaq.config import DAQJobConfig, Seconds
from edgedaq.errors import ConfigError, StoreError

from edgedaq_aggregator.stores.reader import StorePlace

__all__ = ["ServerStoreConfig", "config_of", "read_password"]

_CREDENTIALS = "CREDENTIALS_DIRECTORY"


class ServerStoreConfig(DAQJobConfig, kw_only=True, forbid_unknown_fields=True):
    """One server and one account there.

    Args:
        host: Name or address.
        port: 0: the server's usual one.
        unix_socket: Path of the server's socket on this machine, in place of host and port.
        user: Account; empty: the server's default.
        password: In the clear, for trying things out.
        password_file: File whose first line it is.
        password_credential: Name of a systemd credential (``LoadCredential=``) that it is.
        tls_ca: File of the authority that signed the server's certificate; the connection is then encrypted.
        timeout: Longest wait for one answer of the server.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    unix_socket: str = ""
    user: str = ""
    password: str = ""
    password_file: str = ""
    password_credential: str = ""
    tls_ca: str = ""
    timeout: Annotated[Seconds, msgspec.Meta(gt=0, le=3600)] = 30.0

    def __post_init__(self) -> None:
        given = [key for key in ("password", "password_file", "password_credential") if getattr(self, key)]
        if len(given) > 1:
            message = f"only one of password, password_file and password_credential may be given, got {given}"
            raise ConfigError(message)
        if "/" in self.password_credential:
            message = f"password_credential must be a name without '/', got {self.password_credential!r}"
            raise ConfigError(message)

    @property
    def place(self) -> str:
        """Where the server is, for people."""
        if self.unix_socket:
            return self.unix_socket
        return f"{self.host}:{self.port}" if self.port else self.host


C = TypeVar("C", bound=ServerStoreConfig)


def config_of(place: StorePlace, config_type: type[C]) -> C:
    """Return the TOML of a store whose data is to be read.

    Raises:
        StoreError: Nobody has given it.
    """
    if not isinstance(place.config, config_type):
        message = "only its TOML says where the server is: give the directory of TOML files"
        raise StoreError(message)
    return place.config


def read_password(config: ServerStoreConfig) -> str:
    """Return the password; read anew at each connection, so that a changed file counts.

    Raises:
        ConfigError: It cannot be read; the message does not tell it.
    """
    if config.password_credential:
        directory = os.environ.get(_CREDENTIALS)
        if not directory:
            message = (
                f"password_credential is {config.password_credential!r}, but none were passed here: "
                f"LoadCredential={config.password_credential}:FILE in the unit does it"
            )
            raise ConfigError(message)
        path = Path(directory) / config.password_credential
    elif config.password_file:
        path = Path(config.password_file)
    else:
        return config.password
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        message = f"the password cannot be read from {path}: {reason}"
        raise ConfigError(message) from e
