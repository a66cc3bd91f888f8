"""A client's side of a run, without I/O: what the server says goes in, what the client says comes out.

`ClientSession` outlives connections. Who carries messages connects it, tells it what arrives, and connects it again:

    session = ClientSession(…)
    while not session.done:
        wait until session.next_deadline; connect; send session.on_connected()
        for every message that is received before session.next_deadline: send session.on_message(message)
        session.on_lost(why)
"""

import json
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msjax
from msjax import config
from msjax.distributed import messages, sizes
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.client_run import ClientRun, Interrupted, Refused
from msjax.distributed.patience import Patience
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.frames import nbytes_of
from msjax.logs import shorten
from msjax.split.parties import Client
from msjax.split.schedule import Exchange

log = logging.getLogger("msjax.client")

_FAILED = {
    "welcome": "it cannot open its folder, load its data or build the run",
    "start": "it cannot begin where the run is",
    "finished": "it cannot keep its part",
}


class Own(NamedTuple):
    """What a client says of itself when it is ready.

    Attributes:
      samples: how many it draws in an epoch.
      test_samples: how many it has to test on.
      description: of its data and of the run that it has built; see `agreement.describe`.
    """

    samples: int
    test_samples: int
    description: str


class ClientSession:
    """Takes one client through a run: repeats what was lost, and goes back where it is told to.

    Args:
      client_id: in 0 … K − 1.
      load: from the run's config to the client's `Own`.
      build: from (config, samples, test_samples) to the `Client`, as it is before the first step.
      open_store: from the run's name to its store of checkpoints; see `ClientRun`.
      compression: of the requests' bytes, as `msjax.wire` takes it.
      answer_seconds: after which an answer counts as lost, and the request is repeated over a new connection.
      retry_seconds: for how long a lost connection is tried again without getting on, which is: a new answer, or a
        connection that stands, over which the server says that it has the request and waits for others, or does not yet
        let this client ask. That the server takes the connection, and says where the run is, does not count.
      on_exchange: called after each exchange of this client.
      on_end: called at the end of training with the client as it then is; again where all had to go back from there.
      preset: this client's own, whose codecs' classes the run's config may name; see `config.from_json`.
      instance: names this process; drawn by default.
      draw: a factor for the time to the next try, so that not all clients try at once.
    """

    def __init__(
        self,
        client_id: int,
        load: Callable[[config.Config], Own],
        build: Callable[..., Client],
        open_store: Callable[[str], Any],
        *,
        compression: str | None = None,
        answer_seconds: float = 600.0,
        retry_seconds: float = 600.0,
        on_exchange: Callable[[Exchange], None] = lambda exchange: None,
        on_end: Callable[[Client], None] = lambda party: None,
        preset: config.Config | None = None,
        clock: Callable[[], float] = time.monotonic,
        instance: str | None = None,
        draw: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ):
        self.client_id = client_id
        self._load, self._build, self._open_store = load, build, open_store
        self._compression, self._on_exchange, self._on_end, self._clock = compression, on_exchange, on_end, clock
        self._patience = Patience(answer_seconds, retry_seconds, clock, draw)
        self._instance, self._preset = uuid.uuid4().hex if instance is None else instance, preset
        self.config: config.Config | None = None
        """Of the run, once the server has told it."""
        self.name = ""
        """Of the run."""
        self.run: ClientRun | None = None
        """Once the server has told this client to start."""
        self.done = False
        """Whether training has ended, and there is nothing left to say."""
        self._store: Any = None
        self._data: Own | None = None
        self._checkpoint_steps = 0
        self._kept = 0  # the generation of whose end this client has kept its part
        self.sent_bytes = self.received_bytes = 0
        """Of all messages so far, as serialized, with those that were repeated."""
        self._said: pb.FromClient | None = None  # the last request, until it is answered
        self._said_at: float | None = None  # when, if it stands for the link's speed

    @property
    def next_deadline(self) -> float | None:
        """Connected: when to give the connection up, None for never. Not connected: when to connect."""
        return self._patience.next_deadline

    @property
    def party(self) -> Client | None:
        """The client's part and data, once it has been told to start."""
        return self.run and self.run.party

    def close(self) -> None:
        """Lets go of its data and checkpoints, whatever has become of it."""
        if self.party is not None:
            self.party.close()
        if self._store is not None:
            try:
                self._store.close()
            except OSError as error:
                log.error("no checkpoint: %s", error)

    def on_connected(self) -> Iterator[pb.FromClient]:
        """There is a connection: yields what to send. Take all of it, and send each before taking the next."""
        return self._counted(self._greet())

    def _counted(self, messages_: Iterator[pb.FromClient]) -> Iterator[pb.FromClient]:
        for message in messages_:
            self.sent_bytes += nbytes_of(message)
            yield message

    def _greet(self):
        self._patience.connected()
        generation = 0 if self.run is None else self.run.generation
        hello = {"client": self.client_id, "run": self.name, "generation": generation, "instance": self._instance}
        yield pb.FromClient(hello=pb.Hello(protocol=messages.PROTOCOL, version=msjax.__version__, **hello))
        self._patience.wait(has_request=self._has_request)

    def on_message(self, message: pb.FromServer, at: float | None = None) -> Iterator[pb.FromClient]:
        """Something has come: yields what to send, as `on_connected` does.

        Args:
          at: when it had come, on the clock; by default now.

        Raises:
          Interrupted: the run has ended before its time, and may go on.
          Refused: it cannot go on, or cannot be this client's.
          ProtocolError: it makes no sense.
          MessageTooLargeError: a message of the run can become larger than gRPC carries.
        """
        return self._counted(self._take_or_leave(message, self._clock() if at is None else at))

    def _take_or_leave(self, message, at):
        kind = message.WhichOneof("kind")
        try:
            yield from self._take(message, at)
        except Exception as error:
            if not (kind == "finished" and isinstance(error, Refused)):  # of which the server itself has told it
                what = _FAILED.get(kind, "it cannot go on")  # in short: details may be of its data
                yield pb.FromClient(goodbye=pb.Goodbye(error=f"{what} ({type(error).__name__})"))
            raise

    def _take(self, message, at):
        self.received_bytes += nbytes_of(message)
        self._patience.heard()
        match message.WhichOneof("kind"):
            case "welcome":
                yield self._welcome(message.welcome)
            case "start":
                self._start(message.start)
                yield from self._requests()
            case "received":
                self._patience.received()
            case "answer":
                exchange = None if self.run is None else self.run.take(message.answer, self._link_speed(message, at))
                if exchange is not None:
                    self._said = None
                    self._patience.answered()
                    self._on_exchange(exchange)
                    yield from self._requests()
            case "finished":
                yield from self._finished(message.finished)
        self._patience.wait(has_request=self._has_request)

    def on_lost(self, lost: ConnectionLost) -> None:
        """The connection is lost, was not to be had, or `next_deadline` has passed.

        Raises:
          Refused: the server turned this client away.
          ConnectionError: this client has not got on for too long, with steps left to do.
        """
        if self.done:
            return
        if lost.final:
            if self._has_trained_part:
                self._keep()
                return self._leave(lost)
            raise Refused(str(lost))
        if (given_up := self._patience.lost(str(lost))) is None:
            return
        if not self._has_trained_part:
            raise ConnectionError(given_up)
        self._keep()
        self._leave(lost)

    @property
    def _has_request(self):
        return self.run is not None and self.run.request is not None

    def _welcome(self, welcome):
        if welcome.protocol != messages.PROTOCOL:
            raise Refused(
                f"the server's protocol is {welcome.protocol}, this client's {messages.PROTOCOL}, that of msjax "
                f"{msjax.__version__}: server and clients need versions of msjax with the same protocol"
            )
        if self.name and welcome.run != self.name and self._has_trained_part:
            self._keep()
            self._leave("the server now serves another run")
            return pb.FromClient(goodbye=pb.Goodbye(error="it was in another run, which has ended"))
        if self.name and welcome.run != self.name:
            raise Interrupted("the server now serves another run, for which this client must be started anew")
        if self._store is None:
            if welcome.version not in ("", msjax.__version__):
                said = "the server has msjax %s, and this client %s; best all have the same version"
                log.warning(said, shorten(welcome.version, 40), msjax.__version__)
            # It becomes a folder's name.
            if not re.fullmatch("[0-9a-f]{32}", welcome.run):
                raise Refused(f"the run's name must be 32 hexadecimal digits, got {welcome.run!r}")
            self.name, self._store = welcome.run, self._open_store(welcome.run)
        self._checkpoint_steps = welcome.checkpoint_steps  # that of a server that was started anew may be another
        if self.run is not None:
            self.run.checkpoint_steps = self._checkpoint_steps
        cfg = config.from_json(json.loads(welcome.config), preset=self._preset)
        if self._data is None:
            self.config, self._data = cfg, self._load(cfg)
            self._patience.got_on()
        elif cfg != self.config:
            raise Interrupted("the run's config was changed, as to more epochs, so this client must be started anew")
        return pb.FromClient(ready=pb.Ready(**self._data._asdict(), saved_step=max(self._store.steps(), default=0)))

    def _start(self, start):
        if self.run is None:
            party = self._build(self.config, start.samples, start.test_samples)
            sizes.check_sizes(party.spec)  # the server does, too, before it lets anyone start
            self.run = ClientRun(party, self._store, self._compression)
            self.run.checkpoint_steps = self._checkpoint_steps
        schedule = self.party.schedule
        if (built := (schedule.samples, schedule.test_samples)) != (start.samples, start.test_samples):
            raise Interrupted(
                f"the server has begun the run anew with {start.samples} samples to train and {start.test_samples} to "
                f"test on, and this client with {built[0]} and {built[1]}: start it again"
            )
        self.run.start(start)

    def _requests(self):
        """The request that it is at, if any; what is behind it is prepared once this is sent."""
        self._patience.asked(nbytes_of(self.run.request) if self._has_request else None)
        if self._has_request:
            # What follows a request without an answer may be behind that on the line, or be answered for it.
            self._said_at = self._clock() if self._said is None else None
            self._said = self.run.request
            yield self.run.request
            self.run.prepare()

    def _link_speed(self, message, at):
        """Of the link in bytes a second, by a request and its answer, less what the server took; None if unknown."""
        if self._said_at is None or self.party.spec.cut_seconds is None:
            return None
        seconds = at - self._said_at - message.answer.server_seconds
        return (nbytes_of(self._said) + nbytes_of(message)) / seconds if seconds > 0 else None

    def _finished(self, finished):
        if finished.error:
            raise (Refused if finished.failed else Interrupted)(f"the server stopped: {finished.error}")
        if self.run is not None:
            if finished.keeps and self.run.lacks_part:
                raise Refused("training ended while this client was away; its part is not the trained one")
            if finished.keeps or self.run.done:  # the server knows who had the last turn
                self.party.keeps_result = finished.keeps
        if finished.dropped and finished.keeps and self.run is not None and self.run.done:
            # Nobody is dropped that has all its answers.
            raise Refused("all have gone back since, and training ended without this client; its part is of before")
        if self.run is not None and self.run.done:
            self._keep()
            if finished.over:
                self.done = True
            else:
                saved_step = max(self._store.steps(), default=0)
                yield pb.FromClient(goodbye=pb.Goodbye(generation=self.run.generation, saved_step=saved_step))
        elif finished.dropped or finished.over:
            self._end_apart()
        elif self.run is not None:
            yield from self._requests()  # the last answer was lost

    @property
    def _has_trained_part(self):
        """One whose turns are over has no more steps, but the run may have: it has the part if it is told so."""
        if self.run is None or not self.run.done:
            return False
        return self._kept == self.run.generation or self.party.keeps_result

    def _leave(self, why):
        log.warning("all steps are done, but the server did not say that all clients have their parts: %s", why)
        self.done = True

    def _keep(self):
        """Once in each generation: should another client have died before it could, all go back and end again."""
        if self._kept != self.run.generation:
            self._on_end(self.party)
            self._kept = self.run.generation
            log.info("all steps are done; this client stays until the others have kept their parts, too")

    def _end_apart(self):
        """The run has ended without this client."""
        if self.run is not None and not self.party.keeps_result:
            log.warning("training ended while this client was away")
        elif self.run is None or not self.run.has_trained():
            raise Refused("training ended while this client was away; its part is not the trained one")
        self._on_end(self.party)
        self.done = True
