"""Keys: who a node is and who the aggregator is, as files, as the line that joins them, and on sockets.

Each side has one CURVE key pair, for ever; the node's never leaves the node. A key is written as libzmq does:
Z85, 40 characters for 32 bytes.

A node's *enrolment* is what ``join`` left: ``enrolment.key`` in the directory of the TOMLs, or what systemd
hands over as credential ``edgedaq-enrolment``. The aggregator's own key is ``aggregator.key`` in its state
directory, or credential ``edgedaq-aggregator-key``. Both are TOML, mode 0600::

    node = "node1"                           secret_key = "<Z85>"
    aggregator = "tcp://10.0.0.1:7770"
    aggregator_key = "<Z85>"
    secret_key = "<Z85>"

The *token* of an invitation is what a person carries from the aggregator to the node::

    <node> "." <base64url of 52 bytes, without padding, 70 characters>

    offset  size  field
         0    32  public key of the aggregator: the node talks to nobody else
        32    16  secret, random, for one use: the aggregator hears nobody else
        48     4  check, first bytes of SHA-256 of the node's name and bytes 0 .. 48: typing errors

A secret is compared, and kept by the aggregator, as its SHA-256.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.utils import z85

from edgedaq.errors import ConfigError
from edgedaq.names import check_name
from edgedaq.transport import check_address
from edgedaq.typed_toml import build, read_toml

__all__ = [
    "AGGREGATOR_KEY_NAME",
    "ENROLMENT_NAME",
    "SECRET_BYTES",
    "Enrolment",
    "KeyPair",
    "Token",
    "aggregator_keys",
    "check_key",
    "digest_of",
    "enrolment_path",
    "new_key_pair",
    "pack_token",
    "read_enrolment",
    "set_client_keys",
    "set_server_keys",
    "unpack_token",
    "write_enrolment",
    "write_private",
]

ENROLMENT_NAME = "enrolment.key"
AGGREGATOR_KEY_NAME = "aggregator.key"
SECRET_BYTES = 16
ZAP_DOMAIN = b"edgedaq"
_ENROLMENT_CREDENTIAL = "edgedaq-enrolment"
_AGGREGATOR_CREDENTIAL = "edgedaq-aggregator-key"
_KEY_BYTES = 32
_CHECK_BYTES = 4
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")


class KeyPair(NamedTuple):
    """One side's keys, Z85."""

    public: str
    secret: str


class Token(NamedTuple):
    """What an invitation tells the node."""

    node: str
    aggregator_key: str
    secret: bytes


class Enrolment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a node is, and whom it talks to."""

    node: str
    aggregator: str
    aggregator_key: str
    secret_key: str

    def __post_init__(self) -> None:
        check_name("node", self.node)
        check_address("aggregator", self.aggregator, has_keys=True)
        check_key("aggregator_key", self.aggregator_key)
        check_key("secret_key", self.secret_key, is_secret=True)

    @property
    def keys(self) -> KeyPair:
        """The node's own keys."""
        return _pair_of(self.secret_key)


class _AggregatorKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    secret_key: str

    def __post_init__(self) -> None:
        check_key("secret_key", self.secret_key, is_secret=True)


def check_key(what: str, key: str, *, is_secret: bool = False) -> str:
    """Return a key if it is one in Z85; a secret one is not repeated in the message.

    Raises:
        ConfigError: It is none.
    """
    with contextlib.suppress(ValueError, KeyError):
        if _KEY.match(key) and len(z85.decode(key)) == _KEY_BYTES:
            return key
    got = f"{len(key)} characters" if is_secret else repr(key)
    message = f"{what} must be a key, 40 characters of Z85, got {got}"
    raise ConfigError(message)


def new_key_pair() -> KeyPair:
    """Return new random keys."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def digest_of(secret: bytes) -> str:
    """Return what is kept of an invitation's secret, in hex."""
    return hashlib.sha256(secret).hexdigest()


def pack_token(token: Token) -> str:
    """Return the token as a person types it."""
    raw = z85.decode(token.aggregator_key) + token.secret
    raw += _check_of(token.node, raw)
    return f"{token.node}.{base64.urlsafe_b64encode(raw).rstrip(b'=').decode('ascii')}"


def unpack_token(text: str) -> Token:
    """Return what a token says.

    Raises:
        ConfigError: It is none, or was not copied in full.
    """
    node, _, encoded = text.strip().partition(".")
    with contextlib.suppress(binascii.Error, ValueError, ConfigError):
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        held, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if len(held) == _KEY_BYTES + SECRET_BYTES and check == _check_of(check_name("node", node), held):
            key = z85.encode(held[:_KEY_BYTES]).decode("ascii")
            return Token(node, key, held[_KEY_BYTES:])
    message = (
        "the token is damaged: copy the whole of what `edgedaq-aggregator invite` printed, "
        f"one word of about 80 characters, got {len(text.strip())}"
    )
    raise ConfigError(message)


def enrolment_path(config_dir: Path) -> Path:
    """Return where a node's enrolment is, or is to be."""
    return _credential(_ENROLMENT_CREDENTIAL) or config_dir / ENROLMENT_NAME


def read_enrolment(path: Path) -> Enrolment | None:
    """Return a node's enrolment; None while it has not joined.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is damaged.
    """
    try:
        return build(Enrolment, _read_private(path), str(path))
    except FileNotFoundError:
        return None


def write_enrolment(path: Path, enrolment: Enrolment) -> None:
    """Write an enrolment, for its owner alone.

    Raises:
        ConfigError: The disk does not take it.
    """
    write_private(path, _toml(msgspec.structs.asdict(enrolment)))


def aggregator_keys(state_dir: Path) -> KeyPair:
    """Return the aggregator's keys; makes them the first time.

    Raises:
        ConfigError: They cannot be read or written, or others can read them.
    """
    path = _credential(_AGGREGATOR_CREDENTIAL) or state_dir / AGGREGATOR_KEY_NAME
    for _ in range(2):
        try:
            return _pair_of(build(_AggregatorKey, _read_private(path), str(path)).secret_key)
        except FileNotFoundError:
            pair = new_key_pair()
            # Two may do so at once: the first one's key counts.
            write_private(path, _toml({"secret_key": pair.secret}), replaces=False)
    message = f"{path}: cannot be read back"
    raise ConfigError(message)


def write_private(path: Path, text: str, *, replaces: bool = True) -> None:
    """Write a file durably and in one step, mode 0600; root gives it to whom the directory belongs.

    Args:
        replaces: Whether a file that is there already is replaced; if not, it stays as it is.

    Raises:
        ConfigError: The disk does not take it.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123  # of a descriptor
                if os.geteuid() == 0:
                    owner = path.parent.stat()
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                file.write(text.encode())
                file.flush()
                os.fsync(fd)
            if replaces:
                beside.rename(path)
            else:
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(beside)
            directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as e:
        message = f"{path}: cannot be written: {e.strerror}"
        raise ConfigError(message) from e


def set_client_keys(socket: zmq.Socket[Any], keys: KeyPair, aggregator_key: str) -> None:
    """Let a socket that will connect encrypt, and talk to that aggregator alone."""
    socket.curve_serverkey = aggregator_key.encode("ascii")
    socket.curve_publickey = keys.public.encode("ascii")
    socket.curve_secretkey = keys.secret.encode("ascii")


def set_server_keys(socket: zmq.Socket[Any], secret: str) -> None:
    """Let a socket that will be bound take only keys that its context's ZAP handler allows.

    Without such a handler it takes nobody.
    """
    socket.curve_server = True
    socket.curve_secretkey = secret.encode("ascii")
    socket.zap_domain = ZAP_DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def _read_private(path: Path) -> dict[str, Any]:
    """Return what a TOML file says that nobody else may read; systemd's own rules hold for credentials.

    Raises:
        FileNotFoundError: There is none.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as e:
        message = f"{path}: cannot be read: {e.strerror}"
        raise ConfigError(message) from e
    if mode & 0o077 and path.parent != _credentials_dir():
        message = f"{path}: must be readable by its owner alone, mode 0600, got {stat.S_IMODE(mode):04o}"
        raise ConfigError(message)
    return read_toml(path)


def _credentials_dir() -> Path | None:
    given = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return Path(given) if given else None


def _credential(name: str) -> Path | None:
    directory = _credentials_dir()
    path = None if directory is None else directory / name
    return path if path is not None and path.exists() else None


def _pair_of(secret: str) -> KeyPair:
    return KeyPair(zmq.curve_public(secret.encode("ascii")).decode("ascii"), secret)


def _check_of(node: str, raw: bytes) -> bytes:
    return hashlib.sha256(node.encode() + raw).digest()[:_CHECK_BYTES]


def _toml(values: Mapping[str, str]) -> str:
    # A JSON text is a TOML text as far as what is checked above can hold.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
