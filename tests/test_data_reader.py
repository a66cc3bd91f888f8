"""Batches read ahead by worker processes and threads, in any order, and what ends them."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from msjax import data
from msjax.data import _reader

from .data_helpers import forbid

COUNT = 40


class Items:
    """A set of a user's: numbers, of which some cannot be had."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index == 37:
            raise KeyError("gone")
        if index == 38:
            os._exit(3)
        return np.full((2,), index, np.float32), int(os.environ.get("JAX_PLATFORMS") == "cpu")


class Locked(Items):
    """A set that cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()


def split_of(items, **options):
    return data.from_sequence(items, streamed=True, num_classes=2, **options).train


def reads_of(*batches):
    return [data.Read(np.array(batch), (0, n)) for n, batch in enumerate(batches)]


PLAIN = reads_of(*np.random.default_rng(0).integers(0, 36, (6, 2, 5)))


def expect(reader, n):
    x, _ = reader[n]
    np.testing.assert_array_equal(x, np.repeat(PLAIN[n].indices[..., None], 2, axis=-1))


def test_batches_come_by_their_number():
    with data.Reader({"train": split_of(Items())}, PLAIN, workers=0) as reader:
        for n in (0, 1, 2, 1, 4, 5, 0, 1):  # the last two can be had again; elsewhere it begins anew
            expect(reader, n)
        reader.close()
        expect(reader, 3)
        with pytest.raises(IndexError, match=r"n must be in 0\.\.5, got 6"):
            reader[6]


def test_what_is_read_again_is_not_fetched_again(monkeypatch):
    split = split_of(Items())
    fetched, fetch = [], split.fetch
    monkeypatch.setattr(split, "fetch", lambda indices, entropy: fetched.append(entropy) or fetch(indices, entropy))
    with data.Reader({"train": split}, PLAIN, workers=0, prefetch=0) as reader:
        for n in (2, 3, 2, 3):
            expect(reader, n)
    assert fetched == [(0, 2), (0, 3)]


@pytest.mark.parametrize("part", [1, 3, 64])
def test_a_read_is_cut_into_parts_of_any_size(monkeypatch, part):
    monkeypatch.setattr(_reader, "_PART", part)
    splits = {"train": split_of(Items()), "test": split_of(Items())}
    reads = [*PLAIN[:2], data.Read(np.array([7]), (), "test")]  # fewer examples than parts
    with data.Reader(splits, reads, workers=0) as reader:
        expect(reader, 0)
        expect(reader, 1)
        np.testing.assert_array_equal(reader[2][0], [[7, 7]])


def test_workers_give_the_same_and_say_what_they_cannot_read(monkeypatch):
    """Two processes, which see the CPU alone; the damaged item is named, and those before it come."""
    monkeypatch.setattr(_reader, "_PART", 4)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    reads = [*PLAIN, *reads_of([[3, 37], [4, 5]])]
    with data.Reader({"train": split_of(Items())}, reads, workers=2) as reader:
        for n in range(1, 6):
            expect(reader, n)
        np.testing.assert_array_equal(reader[5][1], np.ones((2, 5)))
        assert os.environ["JAX_PLATFORMS"] == ""
        with pytest.raises(data.DataError, match=r"^item 37 of sequence \(train\) cannot be read: KeyError: 'gone'"):
            reader[6]


def test_a_worker_that_dies_is_an_error():
    reads = reads_of([[1, 38]])
    with (
        data.Reader({"train": split_of(Items())}, reads, workers=1) as reader,
        pytest.raises(data.DataError, match=r"process that reads sequence died with exit code 3: .* workers=0 reads"),
    ):
        reader[0]


@pytest.mark.parametrize(("code", "why"), [(-9, "too little memory"), (-7, "/dev/shm"), (1, "__main__")])
def test_why_a_worker_may_have_died(code, why):
    assert why in _reader._of_death("photos", code)


def test_why_a_worker_may_have_died_on_windows(monkeypatch):
    monkeypatch.delattr(_reader.signal, "SIGKILL")
    monkeypatch.delattr(_reader.signal, "SIGBUS")
    assert "__main__" in _reader._of_death("photos", 1)


ORPHANS = """
    import multiprocessing, time
    import numpy as np
    from msjax import data
    from tests.test_data_reader import Items, split_of

    if __name__ == "__main__":
        reads = [data.Read(np.array([0]))] * 1000
        with data.Reader({"train": split_of(Items())}, reads, workers=1) as reader:
            reader[0]
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ORPHANS))
    root = pathlib.Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    ) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, 0)  # it lives
        os.kill(worker, signal.SIGINT)  # as from a terminal, which is for the parent alone
        process.kill()
        assert process.stdout.read() == ""  # whose other end the worker holds until it ends


def test_how_many_workers_by_default(monkeypatch):
    def workers(split, count=10_000, cores=16):
        monkeypatch.setattr(_reader, "count_cores", lambda: cores)
        return data.Reader({"train": split}, PLAIN)._count_workers(count)

    split = split_of(Items())
    assert (workers(split), workers(split, cores=2), workers(split, cores=100)) == (15, 0, 32)
    assert (workers(split, count=100), workers(split, count=10)) == (3, 0)  # each has something to do
    assert workers(split_of(Locked())) == 0  # nothing that a process could be sent
    assert workers(split_of(Items(), threads=1)) == 0
    monkeypatch.setattr(_reader, "_MOST_PICKLED_BYTES", 1000)
    assert workers(split_of([(np.zeros(1000, np.float32), 0)] * 3)) == 0


def test_a_set_that_cannot_be_sent_is_named():
    with (
        data.Reader({"train": split_of(Locked())}, PLAIN, workers=1) as reader,
        pytest.raises(data.DataError, match=r"sequence cannot be read by worker processes .*workers=0 reads in this"),
    ):
        reader[0]


def test_options(monkeypatch):
    for name in ("workers", "prefetch"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            data.Reader({"train": split_of(Items())}, PLAIN, **{name: -1})
    forbid(monkeypatch, "grain")
    with pytest.raises(data.DataError, match=r"needs grain, which cannot be imported .*: pip install 'msjax\[data\]'"):
        data.Reader({"train": split_of(Items())}, PLAIN)
    assert len(list(data.batches(data.load().train, np.zeros((2, 3), int)))) == 2  # what is in memory needs none


TINY = pathlib.Path(os.environ.get("MSJAX_TEST_DATA", "no_such_folder")) / "tfds" / "tiny_imagenet"


@pytest.mark.skipif(not TINY.is_dir(), reason="MSJAX_TEST_DATA names no folder with tfds/tiny_imagenet")
def test_tiny_imagenet_streamed_is_that_in_memory():
    options = {"data_dir": TINY.parent}
    whole, streamed = (data.load("tiny_imagenet", streamed=wanted, **options) for wanted in (False, True))
    assert whole.in_memory and not streamed.in_memory
    np.testing.assert_array_equal(whole.mean, streamed.mean)
    np.testing.assert_array_equal(whole.std, streamed.std)
    for name in ("train", "test"):
        split, other = getattr(whole, name), getattr(streamed, name)
        assert len(split) == len(other)
        reads = reads_of(*np.random.default_rng(0).integers(0, len(split), (2, 3, 50)))
        with data.Reader({"train": other}, reads, workers=2) as reader:
            for n, read in enumerate(reads):
                for leaf, array in zip(reader[n], (split.inputs, split.targets), strict=True):
                    np.testing.assert_array_equal(leaf, array[read.indices])
