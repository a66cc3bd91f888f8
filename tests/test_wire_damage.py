"""Messages that were cut, changed or made up: found by the checksum, and where that fits, read or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax import wire

from .helpers import SMALL, decode_or_refuse, flipped, refused, sealed


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation_and_every_flip_is_found(name):
    data = SMALL[name]
    assert decode_or_refuse(data) is not None
    for end in range(len(data)):
        refused(data[:end])
        if end >= 9:
            refused(sealed(data[:end]))
    for bit in range(8 * len(data)):
        refused(flipped(data, bit), "checksum" if bit >= 40 else "must be|must begin")


@pytest.mark.parametrize("name", SMALL)
def test_flips_with_their_checksum_are_read_or_refused(name):
    data = SMALL[name]
    expect = wire.decode(data)[:2]
    found = [decode_or_refuse(sealed(flipped(data, bit))) for bit in range(72, 8 * len(data))]
    assert 0 < sum(result is not None for result in found) < len(found)
    for bit in range(72, 8 * len(data)):
        result = decode_or_refuse(sealed(flipped(data, bit)), expect=expect)
        assert result is None or (result.codec, result.like) == expect


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(data, headed):
    refused(data)
    if headed:
        decode_or_refuse(sealed(b"MSJX\x01" + bytes(4) + data))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.integers(9, 200), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4),
    st.booleans(),
)
def test_changed_messages_are_read_or_refused(name, edits, expected):
    """Bytes replaced, put in and taken out, with the checksum that follows."""
    data = SMALL[name]
    expect = wire.decode(data)[:2] if expected else None
    for at, taken, put in edits:
        at = min(at, len(data))
        data = data[:at] + put + data[at + taken :]
    decode_or_refuse(sealed(data), expect=expect, max_bytes=1 << 24)
