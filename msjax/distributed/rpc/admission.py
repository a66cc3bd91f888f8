"""Whom a server lets in: by token, by certificate, and not who guesses."""

import hashlib
import ipaddress
import logging
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote

import grpc

from msjax.distributed.rpc.security import Tokens, hexadecimal, reread_client_lines
from msjax.logs import shorten

log = logging.getLogger("msjax.server")

_MOST_ADDRESSES = 4096
"""Of which wrong tokens are remembered; beyond them the one is forgotten whose last is longest ago."""


def _wanted(name, where):
    """A certificate's name, or its fingerprint without colons."""
    if not name.startswith("sha256:"):
        return name
    return f"sha256:{hexadecimal('certificates', name.removeprefix('sha256:').replace(':', ''), where)}"


class Certificates:
    """Which certificate each client has, in a file of lines `NUMBER NAME`, read anew where it was changed.

    NAME is one of the certificate's alternative names or, where it has none, its common name; or
    `sha256:FINGERPRINT`, as `openssl x509 -noout -fingerprint -sha256` prints it.

    Args:
      path: of the file; None for any certificate of the authority.
      clients, least: see `client_lines`.

    Raises:
      ValueError: see `client_lines`.
    """

    def __init__(self, path: str | None, clients: int | None = None, least: int | None = None):
        args = "certificates", path, "the name in its certificate", _wanted, clients, least
        self.lines = None if path is None else reread_client_lines(*args)

    def __bool__(self):
        return self.lines is not None

    def refusal(self, found: "Identity", client: int | None) -> str | None:
        """Returns why a certificate is not that of a client, or of any where `client` is None; None where it is."""
        if self.lines is None:
            return None
        wanted = self.lines()
        # A name is chosen by whoever asked for the certificate: none is taken for a fingerprint.
        mine = {name for name in found.names if not name.startswith("sha256:")} | {f"sha256:{found.fingerprint}"}
        shown = shorten(", ".join(found.names) or found.fingerprint or "none", 200)
        if client is None:
            return None if mine & set(wanted.values()) else f"this certificate, of {shown}, is no client's"
        return None if wanted.get(client) in mine else f"this certificate, of {shown}, is not client {client}'s"


class Identity(NamedTuple):
    """Whose certificate a caller has shown: its names, and its fingerprint in hexadecimal."""

    names: tuple[str, ...] = ()
    fingerprint: str = ""

    @classmethod
    def of(cls, context: grpc.ServicerContext) -> "Identity":
        """Returns that of a call; an empty one of a caller without a certificate."""
        found = context.auth_context()
        # A common name beside alternative ones is not one, as authorities need not have checked it (RFC 6125).
        names = found.get("x509_subject_alternative_name") or found.get("x509_common_name") or ()
        pem = next(iter(found.get("x509_pem_cert", ())), b"")
        der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii")) if pem else b""
        texts = tuple(name.decode("utf-8", "replace") for name in names)
        return cls(texts, hashlib.sha256(der).hexdigest() if der else "")


class _Guesses:
    """Of one address."""

    def __init__(self, began: float):
        self.count, self.began, self.refused_until, self.refused = 0, began, 0.0, 0


class WrongTokens:
    """Refuses an address for `seconds` that has shown `most` wrong tokens within as long.

    Those behind one NAT or proxy have one address, and are refused together; of IPv6 those of one /64 count as one.

    Args:
      most: how many; 0 for no limit.
      clock: says the time in seconds.
      say: takes a line at the beginning of a refusal, and one at its end, when the next call comes.
    """

    def __init__(
        self,
        most: int = 10,
        seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = log.warning,
    ):
        self._most, self._seconds, self._clock, self._say = most, seconds, clock, say
        self._found: OrderedDict[str, _Guesses] = OrderedDict()
        self._refused: dict[str, _Guesses] = {}
        self._lock = threading.Lock()

    def refuses(self, address: str) -> bool:
        """Whether an address is refused at this time, so that its token need not be looked at."""
        said = []
        with self._lock:
            now = self._clock()
            for other, guesses in list(self._refused.items()):  # in the order of their ends
                if guesses.refused_until > now:
                    break
                del self._refused[other]
                self._found.pop(other, None)
                said.append(f"{other} may try tokens again; {guesses.refused} calls of it were refused meanwhile")
            if (guesses := self._refused.get(address)) is not None:
                guesses.refused += 1
        for line in said:
            self._say(line)
        return guesses is not None

    def count(self, address: str) -> None:
        """An address has shown a wrong token."""
        if not self._most:
            return
        with self._lock:
            now, guesses = self._clock(), self._found.get(address)
            if guesses is None or (now - guesses.began > self._seconds and address not in self._refused):
                guesses = self._found[address] = _Guesses(now)
            self._found.move_to_end(address)
            if len(self._found) > _MOST_ADDRESSES:
                forgotten, _ = self._found.popitem(last=False)
                self._refused.pop(forgotten, None)
            guesses.count += 1
            begins = guesses.count >= self._most and address not in self._refused
            if begins:
                guesses.refused_until = now + self._seconds
                self._refused[address] = guesses
        if begins:
            many = f"{self._most} wrong token{'' if self._most == 1 else 's'} within {self._seconds:g} s"
            self._say(f"{address}: {many}; it is refused for {self._seconds:g} s")


class Refusal(NamedTuple):
    """Why a call is not answered."""

    reason: str
    code: grpc.StatusCode
    is_told: bool
    """Whether it has been logged already."""


class Admission:
    """What a server asks of a call before it answers."""

    def __init__(
        self, tokens: Tokens, certificates: Certificates | None = None, wrong_tokens: WrongTokens | None = None
    ):
        self._tokens = tokens
        self._certificates = Certificates(None) if certificates is None else certificates
        self._wrong = WrongTokens() if wrong_tokens is None else wrong_tokens

    def caller_of(self, context: grpc.ServicerContext) -> str:
        """Returns what tells one caller from others: its certificate, else its token, else its address.

        Only a token that is checked is one: what a stranger writes in its place would make many callers of one.
        """
        token = token_of(context) if self._tokens else ""
        return Identity.of(context).fingerprint or (f"token {token}" if token else address_of(context.peer()))

    @property
    def version(self) -> int:
        """Another number once tokens or certificates were changed: who was let in may be let in no more."""
        found = 0
        for lines in (self._tokens.lines, self._certificates.lines):
            if lines is not None:
                lines()
                found += lines.version
        return found

    def refusal(
        self, context: grpc.ServicerContext, client: int | None = None, *, again: bool = False
    ) -> Refusal | None:
        """Returns why a call is refused, None where it is let in.

        Args:
          client: the number that the caller says it has; None before it has said any, when any client's will do.
          again: it was let in before, so its token is no guess.
        """
        address, token = address_of(context.peer()), token_of(context)
        if client is None and self._wrong.refuses(address):
            # Not for good: who is refused may be another behind the same NAT.
            reason = "too many wrong tokens have come from this address; it may try again later"
            return Refusal(reason, grpc.StatusCode.UNAVAILABLE, True)
        good = self._tokens.accept_any(token) if client is None else self._tokens.accept(client, token)
        if not good:
            if not again:
                self._wrong.count(address)
            reason = "no such token" + ("" if client is None else f" for client {client}")
            if not token:
                reason = "the server wants a token, and none has come: --token-file gives one"
            return Refusal(reason, grpc.StatusCode.UNAUTHENTICATED, False)
        if not self._certificates:
            return None
        if (reason := self._certificates.refusal(Identity.of(context), client)) is not None:
            return Refusal(reason, grpc.StatusCode.UNAUTHENTICATED, False)
        return None


def token_of(context: grpc.ServicerContext) -> str:
    """Returns the token that a call came with, or an empty one."""
    return dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer ")


def peer_of(context: grpc.ServicerContext) -> str:
    """Returns where a call comes from, for messages: "ipv6:[::1]:5000", which gRPC gives with %5B and %5D."""
    return unquote(context.peer())


def address_of(peer: str) -> str:
    """Returns the address in what gRPC calls a peer, as "ipv4:192.0.2.1:5000"; of IPv6 its /64."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind not in ("ipv4", "ipv6"):
        return peer
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
