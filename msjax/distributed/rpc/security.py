"""Who may talk to whom: TLS, tokens, and what addresses may do without."""

import dataclasses
import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Callable, Hashable

import grpc

from msjax.distributed.rpc.addresses import Address
from msjax.distributed.rpc.certificates import OwnCertificate, Role, check_files, fault_of_connection, own_certificate
from msjax.distributed.rpc.reread import Reread
from msjax.paths import read_file

log = logging.getLogger("msjax.server")


_DAY = 86_400.0
_DAYS_TO_RENEW = 30


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end: its certificate and private key, and the authority the other end is checked against."""

    certificate: str | None = None
    """This end's certificate."""
    key: str | None = None
    """Its private key."""
    authority: str | None = None
    """The certificate of the authority that has signed the other end's."""

    def _read(self, name):
        path = getattr(self, name)
        return None if path is None else read_file(f"tls.{name}", path)

    def server(self) -> grpc.ServerCredentials:
        """Mutual TLS: a client without a certificate of the authority is turned away.

        The files are read anew where they were changed before a connection, so a server need not end for that.

        Raises:
          ValueError: a file lacks, or does not fit.
        """
        files = [self.key, self.certificate, self.authority]
        if None in files:
            raise ValueError(
                "tls needs a certificate, a key and an authority: a server checks its clients' certificates"
            )
        configuration = Reread("tls", files, self._configuration)

        def changed():  # None where it was not
            version = configuration.version
            found = configuration()
            return None if configuration.version == version else found

        options = {"require_client_authentication": True}
        return grpc.dynamic_ssl_server_credentials(configuration(), changed, **options)

    def _configuration(self):
        check_files(self.certificate, self.key, self.authority)
        pair = (self._read("key"), self._read("certificate"))
        return grpc.ssl_server_certificate_configuration([pair], self._read("authority"))

    def client(self) -> grpc.ChannelCredentials:
        """Returns a client's credentials; raises ValueError for a file that lacks or does not fit."""
        if (self.key is None) != (self.certificate is None):
            raise ValueError("tls needs a certificate and its key together")
        check_files(self.certificate, self.key, self.authority)
        return grpc.ssl_channel_credentials(self._read("authority"), self._read("key"), self._read("certificate"))

    def own(self, role: Role) -> OwnCertificate:
        """Returns what this end's certificate is good for; nothing is known where it has none."""
        if not (self.certificate and self.key):
            return OwnCertificate()
        return own_certificate(role, self.certificate, self.key)

    def warning(self, role: Role, now: float) -> str | None:
        """Returns what should be done about this end's certificate: it does not work, or not for long any more.

        Args:
          now: in seconds since the epoch.
        """
        fault, expires_at = self.own(role)
        if fault is not None:
            return f"{fault}; {'clients' if role == 'server' else 'the server'} will not take it"
        if expires_at is None or (left := expires_at - now) > _DAYS_TO_RENEW * _DAY:
            return None
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expires_at))
        return f"tls.certificate {self.certificate!r} expires on {date}, in {left / _DAY:.1f} days: put a new one there"

    def fault_with(self, address: str) -> str | None:
        """Returns what TLS makes fail between this client and the server at an address; None for something else."""
        return fault_of_connection(address, self.certificate, self.key, self.authority)

    def __bool__(self):
        return any((self.certificate, self.key, self.authority))


def check_plaintext(address: Address, tls: TlsFiles, insecure: bool) -> None:
    """Raises ValueError where features would cross a network in the open without having been asked to."""
    if not tls and not insecure and not address.is_loopback:
        raise ValueError(
            f"{address} is not this machine: give tls its certificate, key and authority, "
            "or insecure to send everything in the open"
        )


class Rate:
    """Holds a sender to `per_second` messages a second, after as many at once, or one: who is too fast has to wait.

    Who is not read from is held back by gRPC's flow control, so nothing piles up. From any thread.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic):
        self._per_second, self._most, self._clock = per_second, max(1.0, per_second), clock
        self._left, self._last, self._lock = self._most, clock(), threading.Lock()

    def delay(self) -> float:
        """Returns for how many seconds the message that has come must wait; to be asked once a message."""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._last) * self._per_second) - 1
            self._last = now
            return max(0.0, -self._left / self._per_second)

    @property
    def is_full(self) -> bool:
        """Whether it is as a new one."""
        return self._left + (self._clock() - self._last) * self._per_second >= self._most

    def wait(self, ended: threading.Event) -> None:
        """Waits until the next message may be taken, or its stream has ended, which then has not sent it."""
        if (seconds := self.delay()) and ended.wait(seconds):
            with self._lock:
                self._left += 1


@dataclasses.dataclass
class _Caller:
    rate: Rate
    streams: int = 0


class Rates:
    """The `Rate` of each caller, which all its streams share; from any thread.

    A caller without streams is forgotten once its rate is as a new one.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic):
        self._per_second, self._clock, self._lock = per_second, clock, threading.Lock()
        self._callers: dict[Hashable, _Caller] = {}

    def open(self, caller: Hashable) -> Rate:
        """Counts a stream of a caller, until `close`; returns the rate of them all."""
        with self._lock:
            for other in [c for c, it in self._callers.items() if not it.streams and it.rate.is_full]:
                del self._callers[other]
            mine = self._callers.setdefault(caller, _Caller(Rate(self._per_second, self._clock)))
            mine.streams += 1
            return mine.rate

    def close(self, caller: Hashable) -> None:
        """A stream of a caller has ended."""
        with self._lock:
            self._callers[caller].streams -= 1

    def streams(self, caller: Hashable) -> int:
        """Returns how many streams of a caller have not ended."""
        return self._callers[caller].streams if caller in self._callers else 0

    def __len__(self):
        return len(self._callers)


def check_token(what: str, token: str) -> None:
    """Raises ValueError for what gRPC does not carry as a token; `what` is what the error calls it."""
    if not re.fullmatch("[ -~]{1,1024}", token):  # HTTP/2 headers
        got = f"{len(token)} characters" if token.isascii() and token.isprintable() else "others"
        raise ValueError(f"{what} must be one line of 1..1024 printable ASCII characters, got {got}")


def read_token(name: str, path: str) -> str:
    """Returns the token in a file; raises ValueError where there is none, or more than one line."""
    token = _text(name, path).strip()
    if "\n" in token:
        raise ValueError(f"{name} must have one line, the token, got {path!r} with {len(token.splitlines())}")
    check_token(f"the token in {name} {path!r}", token)
    return token


def _text(name, path):
    try:
        return read_file(name, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} must be a file of text, got {path!r}") from None


def client_lines(
    name: str, path: str, what: str, read: Callable[[str, str], str], clients: int | None, least: int | None = None
) -> dict[int, str]:
    """Returns what each client has in a file of lines `NUMBER REST`; empty lines and those with # are none.

    Args:
      name: what an error calls the file.
      path: of the file.
      what: what an error calls the rest.
      read: from the rest and its place to what is kept; raises ValueError.
      clients: how many clients there are; None: any that are there.
      least: how many of these must have a line; by default all.

    Raises:
      ValueError: a line is none of a client's, or two clients have the same, or a client has two, or too few have one.
    """
    found: dict[int, str] = {}
    values: set[str] = set()
    for number, line in enumerate(_text(name, path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"line {number} of {path}"
        given, _, rest = line.strip().partition(" ")
        if not re.fullmatch("[0-9]{1,9}", given) or not rest.strip():
            raise ValueError(f"{name} must be lines of a client's number and {what}, got {where}")
        client, value = int(given), read(rest.strip(), where)
        if client in found:
            raise ValueError(f"{name} must have one line a client, got another of client {client}, {where}")
        if value in values:
            raise ValueError(f"{name} must be another for each client, got an earlier client's in {where}")
        found[client] = value
        values.add(value)
    clients = clients or 0
    lacking = [client for client in range(clients) if client not in found]
    of_whom = ", ".join(map(str, lacking[:5])) + ", …" * (len(lacking) > 5)
    if not found or clients - len(lacking) < (clients if least is None else least):
        some = f"none of client {of_whom}" if lacking else "none at all"
        whom = "every client, or of policy.start_clients of them" if clients else "a client"
        raise ValueError(f"{name} must have a line of {whom}, got {some} in {path}")
    if lacking:
        log.warning("%s: %s has no line of client %s, which cannot take part", name, path, of_whom)
    return found


def reread_client_lines(
    name: str, path: str, what: str, read: Callable[[str, str], str], clients: int | None, least: int | None
) -> Reread[dict[int, str]]:
    """As `client_lines`, from a file that may change later; then any clients may have lines.

    Raises:
      ValueError: see `client_lines`.
    """
    client_lines(name, path, what, read, clients, least)
    return Reread(name, [path], lambda: client_lines(name, path, what, read, None))


def hexadecimal(name: str, digits: str, where: str) -> str:
    """Returns the digits of a SHA-256 hash in lower case; raises ValueError where they are none."""
    if not re.fullmatch("[0-9a-f]{64}", digits.lower()):
        raise ValueError(f"{name}: sha256: needs 64 hexadecimal digits, in {where}")
    return digits.lower()


def _hashed(token, where):
    if token.startswith("sha256:"):
        return hexadecimal("tokens", token.removeprefix("sha256:"), where)
    check_token(f"tokens: the token in {where}", token)
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The clients' secrets, in a file of lines `NUMBER TOKEN`, read anew where it was changed; None for no tokens.

    Kept as SHA-256 hashes; a line may hold the hash itself as `NUMBER sha256:HEX`.

    Args:
      path: of the file.
      clients, least: see `client_lines`.

    Raises:
      ValueError: see `client_lines`.
    """

    def __init__(self, path: str | None, clients: int | None = None, least: int | None = None):
        args = "tokens", path, "its token", _hashed, clients, least
        self.lines = None if path is None else reread_client_lines(*args)

    def __bool__(self):
        return self.lines is not None

    def accept(self, client: int, token: str | None) -> bool:
        """Returns whether `token` is that of a client."""
        return self.lines is None or hmac.compare_digest(self.lines().get(client, ""), _digest(token))

    def accept_any(self, token: str | None) -> bool:
        """Whether `token` is that of any client."""
        if self.lines is None:
            return True
        given = _digest(token)  # once: there may be a thousand clients
        return any([hmac.compare_digest(known, given) for known in self.lines().values()])


def _digest(token):
    return hashlib.sha256((token or "").encode()).hexdigest()
