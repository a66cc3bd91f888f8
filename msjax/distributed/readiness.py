"""What a run's clients have said before its first step: of their samples, and of the run that they have built."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from msjax import config
from msjax.build import identity
from msjax.distributed import agreement, messages, sizes
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.frames import DESCRIPTION_BYTES
from msjax.split.spec import RunSpec
from msjax.split.state import PartState

log = logging.getLogger("msjax.server")

Build = Callable[[int, int, dict[str, Any]], tuple[RunSpec, Callable[[], PartState]]]
"""From (samples, test_samples, description) to the run's description, and what makes the server's part as it is before
the first step."""


class Readies:
    """The Ready messages of a run, each checked against this server's run and against another client's.

    Args:
      build: called for each description that clients give, see `agreement.parse`, and again by `built`.
      max_message_bytes: that the server takes of a message.
      brings_part: whether a client may be asked for its part, which then has to fit into a message, too.
      samples: those to train and to test on, where the run was built before.
    """

    def __init__(
        self,
        cfg: config.Config,
        build: Build,
        *,
        max_message_bytes: int,
        brings_part: bool,
        samples: tuple[int, int] | None = None,
    ):
        self._cfg, self._build, self._max_bytes, self._brings_part = cfg, build, max_message_bytes, brings_part
        self._by_client: dict[int, pb.Ready] = {}
        self._samples = samples
        self._test_samples = 0 if samples is None else samples[1]  # of the run, once it is built
        self._agreed: set[str] = set()  # descriptions that are as this server's

    def check(self, ready: pb.Ready, others: Iterable[int]) -> None:
        """Checks what a client says against the server's run and against what one of these others has said, if any has.

        Raises:
          ProtocolError: it has no samples, fewer to test on than a run has that is built, or has built another run.
          MessageTooLargeError: a message of this run can be larger than the server takes.
        """
        if not ready.samples:
            raise messages.ProtocolError("a client must have at least one sample to train on, got 0")
        if max(ready.samples, ready.test_samples) >= 2**31:
            raise messages.ProtocolError(
                f"a client must have fewer than 2^31 samples, got {ready.samples} and {ready.test_samples} to test on"
            )
        if (nbytes := len(ready.description.encode())) > DESCRIPTION_BYTES:
            raise messages.ProtocolError(f"description must have at most {DESCRIPTION_BYTES:,} bytes, got {nbytes:,}")
        if ready.test_samples < self._test_samples:
            raise messages.ProtocolError(
                f"a client that comes once training has begun must have at least {self._test_samples} test samples, as "
                f"many as the run tests on, got {ready.test_samples}"
            )
        try:
            description = agreement.parse(ready.description)
            other = next((number for number in others if number in self._by_client), None)
            theirs = None if other is None else agreement.parse(self._by_client[other].description)
            if theirs is not None and (differing := agreement.differences(theirs, description)):
                raise ValueError(
                    f'all clients must have the same run, but where client {other}, which came before, is "here" '
                    f'and this client "there", {differing}'
                )
            if ready.description not in self._agreed:
                self._compare(ready, description)
        except sizes.MessageTooLargeError:
            raise
        except ValueError as error:
            raise messages.ProtocolError(str(error)) from None

    def _compare(self, ready, description):
        """Raises ValueError where a client has built another run than the server; once for equal descriptions."""
        spec, _ = self._build(ready.samples, ready.test_samples, description)
        mine = {"data": description["data"], "run": agreement.of_run(spec, identity(self._cfg))}
        if differing := agreement.differences(mine, description):
            raise ValueError(f"server and client must have the same run, but {differing}")
        sizes.check_sizes(spec, max_bytes=self._max_bytes, brings_part=self._brings_part)
        self._agreed.add(ready.description)

    def keep(self, client: int, ready: pb.Ready) -> None:
        """Remembers what a client has said."""
        self._by_client[client] = ready

    def built(self, clients: Iterable[int]) -> tuple[RunSpec, Callable[[], PartState]]:
        """Returns what `build` makes of what these clients have said: all draw as many samples as the least has.

        A run that was built before keeps its samples, whoever is here now: its steps and epochs follow from them.
        """
        # Others may have left before the start: what they said binds nobody.
        self._by_client = readies = {client: self._by_client[client] for client in clients}
        if self._samples is None:
            counts = [(ready.samples, client) for client, ready in readies.items()]
            (samples, least), (most_samples, most) = min(counts), max(counts)
            if 2 * samples <= most_samples:
                said = "each client uses only %d samples an epoch, as many as client %d has; client %d has %d"
                log.warning(said, samples, least, most, most_samples)
            tests = [ready.test_samples for ready in readies.values()]
            if min(tests) < max(tests):
                said = "clients have %d to %d test samples: %s"
                what = f"those that test use {min(tests)}" if min(tests) else "one has none, so nothing is tested"
                log.warning(said, min(tests), max(tests), what)
            self._samples = samples, min(tests)
        samples, self._test_samples = self._samples
        return self._build(samples, self._test_samples, agreement.parse(next(iter(readies.values())).description))
