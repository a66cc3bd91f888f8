"""Addresses: host:port, checked before anything is opened. gRPC takes a port of 99999 for another one."""

import ipaddress
import re
from typing import NamedTuple


class Address(NamedTuple):
    """Where a server is."""

    host: str
    """A name, or an IP address; IPv6 without brackets."""
    port: int

    def __str__(self):
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it stays on this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(name: str, text: str, *, any_port: bool = False) -> Address:
    """Returns the host and the port of an address as "host:port", or as "[IPv6]:port".

    Args:
      name: what errors call it.
      any_port: whether the port may be 0, for one that is free.

    Raises:
      ValueError: it is no such address.
    """
    least = 0 if any_port else 1
    rule = f"{name} must be host:port with a port in {least}..65535"
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        brackets = ", and an IPv6 address in brackets" if ":" in host else ""
        raise ValueError(f"{rule}{brackets}, got {text!r}")
    if not re.fullmatch("[0-9]{1,5}", port) or not least <= int(port) <= 65535:
        raise ValueError(f"{rule}, got {text!r}")
    host = host[1:-1] if bracketed else host
    if bracketed or re.fullmatch(r"[0-9][0-9.]*", host):
        try:
            version = ipaddress.ip_address(host).version
        except ValueError:
            version = 0
        if version != (6 if bracketed else 4):
            kind = "an IPv6 address in the brackets" if bracketed else "a whole IP address"
            raise ValueError(f"{name} must have {kind}, got {text!r}")
    elif not re.fullmatch(r"\w([\w.-]*\w)?\.?", host):
        raise ValueError(f"{rule}, and a host's name or IP address alone before it, got {text!r}")
    return Address(host, int(port))


def check_port(name: str, port: int) -> None:
    """Raises ValueError for what is no port to listen on; 0 is one that is free."""
    if not 0 <= port <= 65535:
        raise ValueError(f"{name} must be in 0..65535, got {port}")
