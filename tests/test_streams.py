"""Streams that say nothing do not keep those out that do: the server's end of gRPC, without a socket."""

import asyncio
import queue
import threading
import time

import grpc
import pytest

from msjax.distributed.channel import Close, Handled, Lost, Received, Send
from msjax.distributed.metrics import Metrics
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc import training
from msjax.distributed.rpc.event_loop import event_loop
from msjax.distributed.rpc.security import Rate, Rates, Tokens
from msjax.distributed.rpc.training import TrainServicer


def hello(client):
    return pb.FromClient(hello=pb.Hello(protocol=5, client=client))


HELLO = hello(0)
WELCOME = pb.FromServer(welcome=pb.Welcome(protocol=5))


class Aborted(Exception):
    """What `abort` raises."""


class Stream:
    """A client's stream, and the context of its call; it runs where gRPC's would. `said` comes with the call."""

    def __init__(self, servicer, *said):
        self.answers, self.closed, self._requests = queue.Queue(), queue.Queue(), asyncio.Queue()
        self._when_done = []
        for message in said:
            self._requests.put_nowait(message.SerializeToString())
        asyncio.run_coroutine_threadsafe(self._run(servicer), event_loop())

    async def _run(self, servicer):
        try:
            await servicer.Train(None, self)
            self.closed.put((None, ""))
        except Aborted as error:
            self.closed.put(error.args)
        finally:
            for call in self._when_done:
                call(self)

    def add_done_callback(self, call):
        self._when_done.append(call)

    def say(self, frame):
        """What the client sends, as bytes or a message."""
        frame = frame if isinstance(frame, bytes) else frame.SerializeToString()
        event_loop().call_soon_threadsafe(lambda: self._requests.put_nowait(frame))

    def leave(self):
        """The client ends it; returns once it has ended."""
        event_loop().call_soon_threadsafe(lambda: self._requests.put_nowait(grpc.aio.EOF))
        assert self.closed.get(timeout=30) == (None, "")

    async def read(self):
        return await self._requests.get()

    async def write(self, frame):
        self.answers.put(pb.FromServer.FromString(frame))

    def invocation_metadata(self):
        return ()

    def peer(self):
        return "somebody"

    async def abort(self, code, reason):
        raise Aborted(code, reason)


@pytest.fixture
def servicer():
    it = TrainServicer(Tokens(None), Metrics(), hello_seconds=60.0)
    yield it
    it.close()


def heard(servicer):
    """What is said next, by whomever."""
    while not isinstance(event := servicer.inbox.get(timeout=30), Received):
        pass
    return event


def greet(servicer, client=0, kind=Stream):
    """A stream that has said Hello and was answered."""
    stream = kind(servicer)
    stream.say(hello(client))
    received = heard(servicer)
    servicer.carry(Send(received.session, WELCOME))
    assert stream.answers.get(timeout=30) == WELCOME
    return stream


def test_the_oldest_silent_stream_makes_room(servicer):
    first = Stream(servicer)
    deadline = time.monotonic() + 30
    while not servicer._silent:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    others = [Stream(servicer) for _ in range(20)]
    code, said = first.closed.get(timeout=30)
    assert code is grpc.StatusCode.UNAVAILABLE and "Hello must come before" in said
    assert greet(servicer).closed.empty()
    assert len(servicer._silent) <= 6
    deadline = time.monotonic() + 30
    while sum(other.closed.empty() for other in others) > 6:
        assert time.monotonic() < deadline


def test_streams_that_have_said_hello_stay(servicer):
    known = greet(servicer)
    strangers = [Stream(servicer) for _ in range(20)]
    assert strangers[0].closed.get(timeout=30)
    assert known.closed.empty()


def test_hello_has_a_deadline():
    servicer = TrainServicer(Tokens(None), Metrics(), hello_seconds=0.05)
    code, said = Stream(servicer).closed.get(timeout=30)
    assert code is grpc.StatusCode.UNAVAILABLE and said == "Hello must come within 0.05 s"
    # Who has said it is waited for, however long the server takes to answer.
    stream = Stream(servicer, HELLO)
    received = heard(servicer)
    with pytest.raises(queue.Empty):
        stream.closed.get(timeout=0.2)
    servicer.carry(Send(received.session, WELCOME))
    assert stream.answers.get(timeout=30) == WELCOME
    servicer.close()


def test_what_is_no_message_ends_its_stream_alone(servicer):
    known, stranger = greet(servicer), Stream(servicer)
    stranger.say(b"\xff" * 100)
    code, said = stranger.closed.get(timeout=30)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and said == "a frame must be a message of this protocol"
    assert known.closed.empty()


def test_the_loop_goes_on_while_the_coordinator_computes():
    """Nobody takes what is said: streams are opened, read and answered all the same."""
    servicer = TrainServicer(Tokens(None), Metrics(), most_silent=50)  # as many as come at once after a restart
    streams = [Stream(servicer) for _ in range(50)]
    for client, stream in enumerate(streams):
        stream.say(hello(client))
    received = [heard(servicer) for _ in streams]
    assert len({event.session for event in received}) == 50
    for event in received:
        servicer.carry(Send(event.session, WELCOME))
    for stream in streams:
        assert stream.answers.get(timeout=30) == WELCOME
    servicer.close()


def test_a_stranger_fills_no_memory_with_chunks(servicer, monkeypatch):
    monkeypatch.setattr(training, "_HELLO_BYTES", 1000)
    stranger = Stream(servicer)
    for _ in range(3):
        stranger.say(pb.FromClient(chunk=pb.Chunk(field=1, data=bytes(400), more=True)))
    code, said = stranger.closed.get(timeout=30)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "at most 1,000 bytes" in said
    # After Hello a message may be longer.
    known = Stream(servicer)
    known.say(HELLO)
    heard(servicer)
    known.say(pb.FromClient(ready=pb.Ready(samples=1, description="x" * 2000)))
    assert heard(servicer).nbytes > 2000 and known.closed.empty()


@pytest.mark.parametrize("client", [0, 1])
def test_hello_is_said_once_and_first(servicer, client):
    """A token or certificate is asked for whom it says; what follows is not to say another."""
    known = greet(servicer)
    again = pb.FromClient(hello=pb.Hello(protocol=5, client=client))
    known.say(again)
    known.say(again)
    code, said = known.closed.get(timeout=30)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and said == "the first message must be Hello, and no other may"
    assert isinstance(servicer.inbox.get(timeout=30), Lost)
    stranger = Stream(servicer)
    stranger.say(pb.FromClient(goodbye=pb.Goodbye()))
    stranger.say(again)
    assert stranger.closed.get(timeout=30) == (code, said)
    assert isinstance(servicer.inbox.get(timeout=30), Lost)


class Unread(Stream):
    """A stream whose client reads nothing after the first answer, until it `reads`: nor does an end get through."""

    def __init__(self, servicer):
        self._reads, self._written, self.waits = asyncio.Event(), 0, threading.Event()
        super().__init__(servicer)

    def reads(self):
        event_loop().call_soon_threadsafe(self._reads.set)

    async def write(self, frame):
        self._written += 1
        if self._written > 1:
            self.waits.set()
            await self._reads.wait()
        await super().write(frame)


def ended(servicer):
    """The session of the next stream that has ended."""
    while not isinstance(event := servicer.inbox.get(timeout=30), Lost):
        pass
    return event.session


def test_who_asks_and_does_not_read_is_closed(servicer):
    stream = Unread(servicer)
    stream.say(HELLO)
    session = heard(servicer).session
    for _ in range(2):
        servicer.carry(Send(session, WELCOME))
    assert stream.waits.wait(30)
    for _ in range(80):
        servicer.carry(Send(session, WELCOME))
    assert ended(servicer) == session and not servicer._streams
    servicer.carry(Send(session, WELCOME))  # to nobody
    assert greet(servicer).closed.empty()
    # gRPC ends no call beside a write that waits.
    assert stream.closed.empty()
    stream.reads()
    code, said = stream.closed.get(timeout=30)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and said == "answers must be read, but more than 16 wait"
    assert stream.answers.qsize() == 2  # what waited is gone


def test_streams_that_do_not_end_are_counted_for_their_client(servicer):
    """One that comes again and again and reads nothing is not to hold all calls that there are."""
    stuck = []
    for _ in range(2):
        stuck.append(greet(servicer, kind=Unread))
        session = max(servicer._streams)
        servicer.carry(Send(session, WELCOME))
        servicer.carry(Close(session))  # as another stream takes its place
        assert ended(servicer) == session
    assert not servicer._streams and all(it.closed.empty() for it in stuck)
    third = Stream(servicer)
    third.say(HELLO)
    code, said = third.closed.get(timeout=30)
    assert code is grpc.StatusCode.UNAVAILABLE and said == "a client must have at most 2 streams that have not ended"
    assert greet(servicer, client=1).closed.empty()
    for it in stuck:
        it.reads()
        assert it.closed.get(timeout=30) == (None, "")
    assert greet(servicer).closed.empty()


def test_no_more_is_read_than_the_coordinator_handles(servicer):
    stream = Stream(servicer)
    for message in (HELLO, *(pb.FromClient(ready=pb.Ready(samples=n)) for n in range(1, 5))):
        stream.say(message)
    session = heard(servicer).session
    assert heard(servicer).message.ready.samples == 1
    assert greet(servicer, client=1).closed.empty()  # others are read meanwhile
    assert servicer.inbox.empty() and stream._requests.qsize() == 3
    for left in (2, 1):
        servicer.carry(Handled(session))
        assert heard(servicer).message.ready.samples == 4 - left
    assert servicer.inbox.empty() and stream._requests.qsize() == 1
    servicer.carry(Close(session))  # ends it all the same
    assert stream.closed.get(timeout=30) == (None, "") and ended(servicer) == session


def test_a_clients_rate_goes_on_over_its_streams(monkeypatch):
    delays = []

    async def hold(rate):
        delays.append(rate.delay())

    monkeypatch.setattr(training, "_hold", hold)
    servicer = TrainServicer(Tokens(None), Metrics(), 1e-3)  # one message, and the next 1000 s later
    greet(servicer).leave()
    assert delays == [0.0, 0.0]  # as a stranger, and as this client
    greet(servicer).leave()
    assert delays[2] == 0.0 and delays[3] == pytest.approx(1000, rel=0.1)
    greet(servicer, client=1).leave()
    assert delays[4:] == [0.0, 0.0] and len(servicer._rates) == 2
    servicer.close()


def test_clients_that_say_little_are_forgotten_once_they_are_gone():
    servicer = TrainServicer(Tokens(None), Metrics(), 1e9)
    stays = greet(servicer, client=100)
    for client in range(20):
        greet(servicer, client).leave()
    assert len(servicer._rates) <= 2 and stays.closed.empty()
    servicer.close()


@pytest.mark.parametrize("per_second", [0.05, 1.0, 4.0])
def test_a_rate_takes_the_first_message_at_once_and_then_so_many_a_second(per_second):
    now = [100.0]
    rate = Rate(per_second, clock=lambda: now[0])
    burst = max(1, int(per_second))
    assert [rate.delay() for _ in range(burst)] == [0.0] * burst
    for _ in range(3):
        delay = rate.delay()
        assert delay == pytest.approx(1 / per_second)
        now[0] += delay


def test_who_goes_away_while_it_waits_has_sent_nothing():
    now, ended = [100.0], threading.Event()
    rate = Rate(2.0, clock=lambda: now[0])
    assert [rate.delay() for _ in range(2)] == [0.0, 0.0]
    ended.set()
    for _ in range(10):
        rate.wait(ended)
    assert rate.delay() == pytest.approx(0.5)


def test_callers_without_streams_are_forgotten_once_their_rate_is_as_a_new_one():
    now = [100.0]
    rates = Rates(4.0, clock=lambda: now[0])
    first = rates.open("a")
    assert rates.open("a") is first and rates.streams("a") == 2
    first.delay()
    for _ in range(2):
        rates.close("a")
    rates.open("b")
    assert len(rates) == 2 and rates.open("a") is first
    rates.close("a")
    now[0] += 0.25
    rates.open("b")
    assert len(rates) == 1 and rates.streams("a") == 0


def test_a_rate_is_full_when_its_burst_is_there_again():
    now = [100.0]
    rate = Rate(4.0, clock=lambda: now[0])
    assert rate.is_full
    rate.delay()
    assert not rate.is_full
    now[0] += 0.25
    assert rate.is_full
