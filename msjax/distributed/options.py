"""What a network's ends are told: where to listen or connect, whom to trust, how long to wait."""

import dataclasses
import json
import logging
import pathlib
import time
from typing import Any, ClassVar, Literal

import tyro

from msjax.checks import integer
from msjax.distributed.membership import Policy
from msjax.distributed.rpc.addresses import check_port, parse_address
from msjax.distributed.rpc.admission import Certificates, WrongTokens
from msjax.distributed.rpc.security import TlsFiles, Tokens, check_plaintext, read_token
from msjax.distributed.sizes import MOST_MEGABYTES
from msjax.paths import existing_weights, expand, folder_to_be
from msjax.runs import write_atomically

log = logging.getLogger("msjax")


def check_positive(options: object, *names: str) -> None:
    """Raises ValueError where a field is not above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(options, name)}")


@dataclasses.dataclass(frozen=True)
class ListenOptions:
    """Where a server listens, and whom it lets in."""

    most_megabytes: ClassVar[int] = 2047
    """What `max_megabytes` may be: gRPC counts a message's bytes in 32 bits, with a sign."""

    listen: str = "localhost:50051"
    """host:port to listen on; port 0 for one that is free."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    tokens: str | None = None
    """A file of lines `NUMBER TOKEN`, one a client (or `NUMBER sha256:HEX`)."""
    max_wrong_tokens: int = 10
    """After so many wrong tokens within a minute an address is refused for a minute; 0 for no limit. Clients behind one
    NAT or proxy have one address, and are refused together."""
    certificates: str | None = None
    """With TLS: a file of lines `NUMBER NAME`, one a client, where NAME is in its certificate: an alternative name or,
    where it has none, its common name (or `NUMBER sha256:FINGERPRINT`). By default any certificate of the authority
    will do for any client."""
    insecure: bool = False
    """Listen in the open on an address that is not this machine's own."""
    compression: Literal["huffman", "all"] | None = None
    """Lossless coding of what is sent, beside the codec: of codes, or of all, floats too. See msjax.wire."""
    metrics_port: int | None = None
    """Port of Prometheus metrics, on this machine alone; 0 for one that is free."""
    max_megabytes: int = 1024
    """Of a message that is received, and of the features in it. A run whose messages can become larger is refused."""
    max_messages_per_second: float = 1000.0
    """Of each client; one that sends more is read more slowly."""

    def admission(self) -> dict[str, Any]:
        """Returns what a servicer is to ask of callers beside their tokens, by the names of its arguments."""
        return {
            "certificates": Certificates(self.certificates),
            "wrong_tokens": WrongTokens(self.max_wrong_tokens),
        }

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        check_plaintext(parse_address("listen", self.listen, any_port=True), self.tls, self.insecure)
        if self.tls:
            self.tls.server()
        Tokens(self.tokens)
        Certificates(self.certificates)
        if self.certificates is not None and not self.tls:
            raise ValueError(f"certificates must go with tls, got {self.certificates!r} without it")
        integer("max_wrong_tokens", self.max_wrong_tokens, 0)
        check_positive(self, "max_messages_per_second")
        if not 1 <= self.max_megabytes <= self.most_megabytes:
            raise ValueError(f"max_megabytes must be in 1..{self.most_megabytes}, got {self.max_megabytes}")
        if self.metrics_port is not None:
            check_port("metrics_port", self.metrics_port)


@dataclasses.dataclass(frozen=True)
class PartOptions(ListenOptions):
    """Of a server that answers with a trained part: also what the texts under way may take of it."""

    max_sessions: int = 32
    """Of a decoder: texts under way at once, whose keys and values are kept. One that begins beyond them ends one
    of the client that has most; it is told."""
    max_cache_megabytes: int = 1024
    """Of a decoder: what these keys and values may take in all, likewise."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        super().check()
        integer("max_sessions", self.max_sessions, 1, MOST_SESSIONS)
        integer("max_cache_megabytes", self.max_cache_megabytes, 1)


MOST_SESSIONS = 64
"""Streams that a server with a trained part has at once."""


@dataclasses.dataclass(frozen=True)
class ServeOptions(ListenOptions):
    """Of a server that trains: also what it does about late clients."""

    most_megabytes: ClassVar[int] = MOST_MEGABYTES
    """A large message is sent in chunks."""

    policy: Policy = dataclasses.field(default_factory=Policy)
    checkpoint_steps: int = 100
    """Steps between two checkpoints, also of the clients; a run that is interrupted goes back to the last."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        super().check()
        if self.checkpoint_steps < 1:
            raise ValueError(f"checkpoint_steps must be at least 1, got {self.checkpoint_steps}")

    def write(self, path: pathlib.Path) -> None:
        """Writes them as JSON: whole paths of files, and nothing of what is in these."""
        known = dataclasses.asdict(self)
        for section, names in ((known, ("tokens", "certificates")), (known["tls"], tuple(known["tls"]))):
            section |= {
                name: str(expand(name, section[name]).absolute()) for name in names if section[name] is not None
            }
        write_atomically(path, json.dumps(known, indent=2) + "\n")

    @classmethod
    def read(cls, path: pathlib.Path) -> "ServeOptions":
        """Returns what `write` has written; the defaults, where nothing was.

        Raises:
          ValueError: the file is damaged.
        """
        if not path.exists():
            return cls()
        try:
            known = json.loads(path.read_bytes())
            nested = {"tls": TlsFiles(**known.pop("tls")), "policy": Policy(**known.pop("policy"))}
            return cls(**known, **nested)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must be options of msjax serve, but it is damaged: {error}") from None


@dataclasses.dataclass(frozen=True)
class LinkOptions:
    """Where the server is, and who asks."""

    server: str = "localhost:50051"
    """host:port of the server."""
    tls: TlsFiles = dataclasses.field(default_factory=TlsFiles)
    token_file: str | None = None
    """File with this client's token."""
    insecure: bool = False
    """Send in the open to an address that is not this machine's own."""
    compression: Literal["huffman", "all"] | None = None
    """Lossless coding of what is sent, beside the codec: of codes, or of all, floats too. See msjax.wire."""

    def token(self) -> str | None:
        """Returns the token, once it is sure that it is not sent in the open unasked, and the files of TLS fit."""
        check_plaintext(parse_address("server", self.server), self.tls, self.insecure)
        if self.tls:
            self.tls.client()
            if warning := self.tls.warning("client", time.time()):
                log.warning("%s", warning)
        return self.read_token()

    def read_token(self) -> str | None:
        """Returns the token as it stands in its file now."""
        return None if self.token_file is None else read_token("token_file", self.token_file)


@dataclasses.dataclass(frozen=True)
class ConnectOptions(LinkOptions):
    """Of a client with data: also where these are, and what encodes what is sent."""

    encoder: Literal["jax", "numpy"] = "jax"
    """What encodes what is sent, to the same bytes: numpy takes it off the device and out of JAX. Not for random
    codecs."""
    data_dir: str | None = None
    """Where the data set is on this machine, as `--data.data-dir` of `msjax train`; of a run on a file or a folder of
    images of its user's, the folder in which this machine has one of that name. By default it is looked for where the
    program runs."""
    tokenizer: str | None = None
    """Of a run on texts with a tokenizer.json: this machine's copy of it, or a folder that has one. By default it is
    looked for in `weights`, where that is a folder."""
    cache_dir: str | None = None
    """Where this machine keeps decoded arrays; by default ~/.cache/msjax."""
    workers: int | None = None
    """Processes that read data that are streamed; 0 for threads. By default one fewer than this machine has cores, and
    threads where it has two or there is little to read. Of several clients on one machine each has its own."""

    def check_workers(self) -> None:
        """Raises ValueError for a number of workers that there cannot be."""
        if self.workers is not None:
            integer("workers", self.workers, 0)


@dataclasses.dataclass(frozen=True)
class ClientOptions(ConnectOptions):
    """Of a client that takes part in training."""

    client_id: int = tyro.MISSING
    """Number of this client, from 0."""
    state: str | None = None
    """Folder for this client's checkpoints and its part at the end; by default clientNUMBER."""
    own_data: bool = False
    """Train and test on all of the data set that is here; by default on this client's share, as a simulation does."""
    keep_labels: bool = False
    """Take part only if this client's labels stay here, which is in U-shaped runs; others are refused."""
    weights: str | None = None
    """This client's copy of the file or folder that the run's weights start from, where it starts from one."""
    retry_seconds: float = 600.0
    """For how long the server is tried again without a new answer from it, be it away or cutting connections."""
    answer_seconds: float = 600.0
    """After how long an answer counts as lost, and the request is repeated."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        if self.client_id < 0:
            raise ValueError(f"client_id must be at least 0, got {self.client_id}")
        check_positive(self, "retry_seconds", "answer_seconds")
        self.check_workers()
        folder_to_be("state", self.folder())
        if self.weights is not None:
            existing_weights("weights", self.weights)

    def folder(self) -> pathlib.Path:
        """Returns where this client's files are."""
        return pathlib.Path(f"client{self.client_id}") if self.state is None else expand("state", self.state)
