"""Streams that say nothing do not keep those out that do: the server's end of gRPC, without a socket."""

import queue
import threading
import time

import grpc
import pytest

from msjax.distributed.channel import Received, Send
from msjax.distributed.metrics import Metrics
from msjax.distributed.rpc import server
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.security import Tokens

HELLO = pb.FromClient(hello=pb.Hello(protocol=4, client=0))
WELCOME = pb.FromServer(welcome=pb.Welcome(protocol=4))


class Aborted(Exception):
    """What `abort` raises."""


class Stream:
    """A client's stream, and the context of its call."""

    def __init__(self, servicer):
        self.requests, self.answers, self.closed = queue.Queue(), queue.Queue(), queue.Queue()
        threading.Thread(target=self._run, args=(servicer,), daemon=True).start()

    def _run(self, servicer):
        try:
            for answer in servicer.Train(iter(self.requests.get, None), self):
                self.answers.put(answer)
            self.closed.put((None, ""))
        except Aborted as error:
            self.closed.put(error.args)

    def invocation_metadata(self):
        return ()

    def peer(self):
        return "somebody"

    def add_callback(self, callback):
        pass

    def abort(self, code, reason):
        raise Aborted(code, reason)


@pytest.fixture
def servicer():
    it = server.TrainServicer(Tokens(None), Metrics(), hello_seconds=60.0)
    yield it
    it.close()


def heard(servicer):
    """What is said next, by whomever."""
    while not isinstance(event := servicer.inbox.get(timeout=30), Received):
        pass
    return event


def greet(servicer):
    """A stream that has said Hello and was answered."""
    stream = Stream(servicer)
    stream.requests.put(HELLO)
    received = heard(servicer)
    servicer.carry(Send(received.session, WELCOME))
    assert stream.answers.get(timeout=30) == WELCOME
    return stream


def test_the_oldest_silent_stream_makes_room(servicer):
    first = Stream(servicer)
    while not servicer._silent:
        pass
    others = [Stream(servicer) for _ in range(20)]
    code, said = first.closed.get(timeout=30)
    assert code is grpc.StatusCode.UNAVAILABLE and "Hello must come before" in said
    assert greet(servicer).closed.empty()
    assert len(servicer._silent) <= server._MOST_SILENT
    deadline = time.monotonic() + 30
    while sum(other.closed.empty() for other in others) > server._MOST_SILENT:
        assert time.monotonic() < deadline


def test_streams_that_have_said_hello_stay(servicer):
    known = greet(servicer)
    strangers = [Stream(servicer) for _ in range(20)]
    assert strangers[0].closed.get(timeout=30)
    assert known.closed.empty()


def test_hello_has_a_deadline():
    servicer = server.TrainServicer(Tokens(None), Metrics(), hello_seconds=0.05)
    code, said = Stream(servicer).closed.get(timeout=30)
    assert code is grpc.StatusCode.UNAVAILABLE and said == "Hello must come within 0.05 s"
    # Who has said it is waited for, however long the server takes to answer.
    stream = Stream(servicer)
    stream.requests.put(HELLO)
    received = heard(servicer)
    with pytest.raises(queue.Empty):
        stream.closed.get(timeout=0.2)
    servicer.carry(Send(received.session, WELCOME))
    assert stream.answers.get(timeout=30) == WELCOME
    servicer.close()
