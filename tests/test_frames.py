"""Messages in frames: large ones in chunks, with small chunks here."""

import pytest

from msjax.distributed.rpc import frames
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.frames import FrameError, Joiner, nbytes_of, to_frames

POSITION = pb.Position(step=3, phase=2)
MESSAGES = {
    "request": pb.FromClient(
        request=pb.Request(
            generation=7,
            position=POSITION,
            payload=[bytes(range(200)), b"", b"x" * 64],
            labels=[b"y" * 65],
            metrics=pb.MetricSums(loss=1.5, samples=4, values=[1.0, 2.0]),
            saved=True,
            part=b"z" * 130,
            grad_bits=0.5,
        )
    ),
    "answer": pb.FromServer(answer=pb.Answer(generation=7, position=POSITION, payload=[b"a" * 129], send_part=True)),
    "start": pb.FromServer(start=pb.Start(generation=1, step=4, part=b"p" * 100)),
    "welcome": pb.FromServer(welcome=pb.Welcome(protocol=5, config="c" * 500)),
    "hello": pb.FromClient(hello=pb.Hello(protocol=5)),
}


@pytest.mark.parametrize("frame_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize("name", MESSAGES)
def test_what_was_put_in_frames_comes_out(name, frame_bytes):
    message = MESSAGES[name]
    sent = list(to_frames(message, frame_bytes))
    chunks = name in ("request", "answer", "start") and frame_bytes <= 64
    assert (len(sent) > 1) == chunks
    assert all(len(frame) <= frame_bytes + 64 for frame in sent[:-1])
    joiner = Joiner(type(message))
    for _ in range(2):  # one message after the other
        found = [joiner.add(frame) for frame in sent]
        assert found[:-1] == [None] * (len(sent) - 1) and found[-1] == message
        assert joiner.nbytes == sum(map(len, sent))
    assert nbytes_of(message) == message.ByteSize()


def test_a_small_message_is_what_it_was_before_there_were_frames():
    for message in MESSAGES.values():
        assert list(to_frames(message)) == [message.SerializeToString()]


def test_the_limit_counts_over_all_frames():
    sent = list(to_frames(MESSAGES["request"], 64))
    most = sum(map(len, sent))
    joiner = Joiner(pb.FromClient, most)
    for _ in range(3):
        assert [joiner.add(frame) for frame in sent][-1] is not None
    joiner = Joiner(pb.FromClient, most - 1)
    with pytest.raises(FrameError, match=rf"a message must have at most {most - 1} bytes in all its frames"):
        for frame in sent:
            joiner.add(frame)


def chunk(**fields):
    return pb.FromClient(chunk=pb.Chunk(**fields)).SerializeToString()


@pytest.mark.parametrize(
    "sent",
    [
        [chunk(field=3, data=b"a", more=True), MESSAGES["request"].SerializeToString()],  # not whole
        [chunk(field=2, data=b"a"), MESSAGES["request"].SerializeToString()],  # the position is no field of bytes
        [chunk(field=3, data=b"a"), MESSAGES["hello"].SerializeToString()],  # of a message that has none
    ],
)
def test_chunks_that_belong_to_nothing(sent):
    joiner = Joiner(pb.FromClient)
    joiner.add(sent[0])
    with pytest.raises(FrameError, match="chunks must be whole, and of fields of the message behind them, which is"):
        joiner.add(sent[1])


def test_a_frame_is_below_what_grpc_counts():
    assert frames.FRAME_BYTES + frames.BESIDE_BYTES < (1 << 31) - 1


def test_what_is_too_long_is_not_parsed():
    """Parsed, a frame of empty elements takes many times its bytes."""

    class Kind:
        def FromString(self, frame):
            raise AssertionError("it was parsed")

    with pytest.raises(FrameError, match="at most 1,000 bytes"):
        Joiner(Kind(), 1000).add(bytes(1001))
