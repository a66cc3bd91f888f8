"""A coverage-guided fuzzer of `wire.decode`: not a test that pytest runs, but one to leave running after a change.

    pip install atheris && python tests/fuzz_wire.py -runs=1000000 [FOLDER OF INPUTS]

Atheris (libFuzzer) needs Python 3.11 to 3.13 on Linux. It starts from the golden messages. Whatever the bytes are,
`WireError` may be the only exception; what is decoded must come back from `wire.encode`, and take no more memory than
it may.
"""

import json
import pathlib
import struct
import sys
import tempfile
import zlib

import atheris

with atheris.instrument_imports(include=["msjax.wire", "msjax.compress._parse"]):
    from msjax import wire

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "messages.json"
MAX_BYTES = 1 << 20
PREFIX = struct.Struct("<4sBI")
RAW, MENDED = 0, 1  # the first byte of an input, even or odd
accepted = 0


def one_input(data: bytes) -> None:
    """`data` but for its first byte is a message; where that is odd, its prefix is mended first."""
    global accepted
    kind, message = data[:1], data[1:]
    if kind and kind[0] % 2 == MENDED:
        version, body = (message[4] if len(message) > 4 else wire.VERSION), message[PREFIX.size :]
        message = PREFIX.pack(b"MSJX", version, zlib.crc32(body)) + body
    try:
        found = wire.decode(message, max_bytes=MAX_BYTES)
    except wire.WireError:
        return
    accepted += 1
    assert found.wire_bytes == len(message) and found.nominal_bytes <= MAX_BYTES
    again = wire.decode(wire.encode(found.payload, found.codec, found.like, compression="huffman"))
    assert (again.codec, again.like) == (found.codec, found.like)
    assert [np.asarray(a).tobytes() for a in again.payload] == [np.asarray(a).tobytes() for a in found.payload]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i, message in enumerate(json.loads(GOLDEN.read_text()).values()):
            for kind in (RAW, MENDED):
                (pathlib.Path(folder) / f"{i}-{kind}").write_bytes(bytes([kind]) + bytes.fromhex(message))
        atheris.Setup([*sys.argv, folder], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
