"""What is wrong with certificates, in words: of the files of one end, and of a connection that is not to be had.

gRPC says "Socket closed" where the other end has refused a certificate, and tries again. So the files are loaded by
`ssl` first, and a connection that failed is tried once more by `ssl`, which says why.
"""

import contextlib
import os
import socket
import ssl
import time
from typing import Literal, NamedTuple

from msjax.distributed.rpc.addresses import parse_address
from msjax.paths import existing_file

Role = Literal["server", "client"]


def check_files(certificate: str | None, key: str | None, authority: str | None) -> None:
    """Raises ValueError for files in which there is no certificate or key, or that do not belong together."""
    for name, path in (("certificate", certificate), ("authority", authority)):
        if path is not None:
            try:
                _context("client").load_verify_locations(existing_file(f"tls.{name}", path))
            except ssl.SSLError as error:
                raise ValueError(
                    f"tls.{name} must be certificates in PEM format, got {path!r}: {_why(error)}"
                ) from None
    if certificate is not None and key is not None:
        _load_pair(_context("client"), certificate, key)


def _load_pair(context, certificate, key):
    # Without a password, so that nobody is asked for one: gRPC takes none.
    files = existing_file("tls.certificate", certificate), existing_file("tls.key", key)
    try:
        context.load_cert_chain(*files, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"tls.key must be the key of tls.certificate {certificate!r}, got {key!r}") from None
        raise ValueError(
            f"tls.key must be a private key in PEM format, without a password, got {key!r}: {_why(error)}"
        ) from None


class OwnCertificate(NamedTuple):
    """What anybody would find of this end's certificate, whatever authority they trust.

    Attributes:
      fault: what is wrong with it; None where nothing is.
      expires_at: when it does, in seconds since the epoch; None where something is wrong.
    """

    fault: str | None = None
    expires_at: float | None = None


def own_certificate(role: Role, certificate: str, key: str) -> OwnCertificate:
    """Returns what this end's certificate is good for, by a handshake within this program."""
    other: Role = "client" if role == "server" else "server"
    ends = {name: _context(name) for name in (role, other)}
    for context in ends.values():  # a server has to have one; only what `other` is shown matters
        _load_pair(context, certificate, key)
    ends[other].load_verify_locations(existing_file("tls.certificate", certificate))
    ends[other].verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trusted as it is
    ends[other].verify_mode = ssl.CERT_REQUIRED
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    lines = ends["client"].wrap_bio(down, up), ends["server"].wrap_bio(up, down, server_side=True)
    for line in lines * 3:
        try:
            line.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            return OwnCertificate(f"tls.certificate {certificate!r}: {error.verify_message}")
        except ssl.SSLError:
            return OwnCertificate()
    shown = lines[0 if role == "server" else 1].getpeercert() or {}
    return OwnCertificate(None, float(ssl.cert_time_to_seconds(shown["notAfter"])) if "notAfter" in shown else None)


def fault_of_connection(
    address: str, certificate: str | None, key: str | None, authority: str | None, *, seconds: float = 5.0
) -> str | None:
    """Returns what TLS makes fail between this client and a server that is there; None where it is something else."""
    for last in (False, True):
        with contextlib.suppress(OSError, ValueError):
            try:
                if _greets(address, certificate, key, authority, seconds):
                    return None
            except ssl.SSLCertVerificationError as error:
                why = ""
                if error.verify_code in _NO_ISSUER:
                    why = f": tls.authority {authority!r} is another, or the server sends no certificates between"
                return f"the server's certificate: {error.verify_message}{why}"
            except ssl.SSLError as error:
                return "the server does not speak TLS" if error.reason in _NO_TLS else None
            except _SpeaksTls:
                return "the server speaks TLS: give tls its certificate, key and authority"
            except _Ended:
                # gRPC does not say why. It may be going down, but then it is not there a little later.
                if last and certificate is None:
                    return "the server wants a certificate: give tls.certificate and tls.key"
                if last:
                    fault = own_certificate("client", certificate, key).fault
                    other = f"tls.certificate {certificate!r}: it is of no authority that the server trusts"
                    return f"the server does not take this end's {fault or other}"
                time.sleep(0.3)
                continue
        return None
    return None


_NO_ISSUER = (18, 19, 20, 21)
"""OpenSSL's codes of a certificate whose issuer is not among those that are trusted."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")


class _SpeaksTls(Exception):
    """The server began a handshake with a client that has no files."""


class _Ended(Exception):
    """The server ended the connection right after the handshake, by when it has seen this end's certificate."""


def _greets(address, certificate, key, authority, seconds):
    """Whether the server begins to speak HTTP/2, over TLS where this end has files for it."""
    where, context = parse_address("server", address), _context("client")
    context.set_alpn_protocols(["h2"])
    if tls := any((certificate, key, authority)):
        context.verify_mode, context.check_hostname = ssl.CERT_REQUIRED, True
        if authority is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(existing_file("tls.authority", authority))
        if certificate is not None:
            _load_pair(context, certificate, key)
    with socket.create_connection(where, timeout=seconds) as line:
        if not tls:
            with contextlib.suppress(ssl.SSLError), context.wrap_socket(line):
                raise _SpeaksTls
            return True
        with context.wrap_socket(line, server_hostname=where.host) as line:
            try:
                heard = line.recv(1)
            except TimeoutError:
                return True
            except OSError:
                heard = b""
            if not heard:
                raise _Ended
            return True


def _context(role):
    """Of one end: without certificates, and it takes any of the other end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _why(error):
    """OpenSSL's reason in plain words."""
    reason = error.reason or str(error) or os.strerror(error.errno or 0)
    return reason.replace("_", " ").lower()
