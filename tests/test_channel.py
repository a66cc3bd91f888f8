"""Lines in memory: what arrives, when, and in which order."""

import pytest

from msjax.distributed.channel import ConnectionLost, Lost, Received

from .memory_network import Clock, MemoryNetwork


class Ends:
    """A network and what has come out of it."""

    def __init__(self):
        self.clock = Clock()
        self.network = MemoryNetwork(self.clock)

    def at_server(self, seconds=0.0):
        """What arrives at the server within these seconds."""
        out, self.clock.now = [], self.clock.now + seconds
        while (arrived := self.network.deliver()) is not None:
            if isinstance(arrived, Lost):
                out.append("lost")
            elif isinstance(arrived, Received):
                out.append(arrived.message)
        return out


def test_messages_arrive_in_order_and_not_before_their_time():
    it = Ends()
    channel = it.network.connect(3)
    delays = iter([(1.0,), (0.0,), (), (0.0, 2.0)])
    it.network.faults = lambda direction, client, message: next(delays)
    for message in ("slow", "behind it", "lost", "twice"):
        channel.send(message)
    assert it.at_server(0.9) == []
    assert it.network.next_arrival == 1.0
    assert it.at_server(0.1) == ["slow", "behind it", "twice"]
    assert it.at_server(9.0) == ["twice"] and it.network.next_arrival is None


def test_a_cut_loses_what_is_under_way_and_each_end_notices_in_its_time():
    it = Ends()
    channel = it.network.connect(3)
    channel.send("never arrives")
    it.network.send(channel.session, "nor this")
    it.network.cut(3, server_notices_after=30.0)
    assert it.at_server() == [] and channel.has_news
    with pytest.raises(ConnectionLost, match="the connection is cut"):
        channel.receive()
    channel.send("into the void"), it.network.send(channel.session, "into the void")
    assert it.at_server(29.0) == [] and it.at_server(1.0) == ["lost"]


def test_an_old_copy_comes_over_the_newest_connection():
    it = Ends()
    it.network.connect(3).send("one")
    it.network.cut(3)
    newest = it.network.connect(3)
    newest.send("two")
    it.network.inject(3, "one")
    it.network.inject(4, "of nobody")
    assert it.at_server() == ["lost", "two", "one"]


def test_who_closes_is_heard_after_what_was_sent():
    it = Ends()
    channel, other = it.network.connect(3), it.network.connect(4)
    channel.send("the last word")
    channel.close()
    assert it.at_server() == ["the last word", "lost"]
    it.network.send(other.session, "an answer")
    it.network.close(other.session, ConnectionLost("go away", final=True))
    other.send("too late")
    assert it.at_server() == [] and other.receive() == "an answer"
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="go away") as lost:
            other.receive()
        assert lost.value.final
    with pytest.raises(ConnectionLost, match="no message is there"):
        it.network.connect(5).receive()


def test_without_a_server_connections_are_lost_at_once():
    it = Ends()
    channel = it.network.connect(3)
    it.network.take_down()
    assert it.at_server() == [] and channel.has_news
    assert it.network.connect(3).has_news
    it.network.down = False
    assert not it.network.connect(3).has_news
