"""Checkpoints that are written while training goes on: what is complete, what fails, and what a kill leaves behind."""

import asyncio
import errno
import functools
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from msjax.runs import checkpoints as lib
from msjax.runs.checkpoints import Checkpoints
from msjax.runs.files import write_atomically, write_new


def tree(value):
    return {"w": jnp.full(300_000, value, jnp.float32), "n": jnp.int32(value)}


@pytest.fixture
def folder(tmp_path):
    it = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield it
    it.close()


def assert_is(checkpoints, step, value):
    state, progress = checkpoints.restore(step, tree(0))
    np.testing.assert_array_equal(state["w"], value)
    assert int(state["n"]) == value and progress == {"value": value}


def test_a_state_that_is_given_away_is_saved_as_it_was(folder):
    """As `train_steps` gives its state away, and the loop goes on changing its progress."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    state, progress = step(tree(0)), {"value": 1}
    folder.save(1, state, progress)
    for _ in range(20):
        state = step(state)
    progress["value"] = 21
    assert int(state["n"]) == 21
    folder.save(21, state, progress)
    assert_is(folder, 1, 1)
    assert_is(folder, 21, 21)


def test_what_is_being_written_does_not_count(folder, monkeypatch):
    """Neither for `steps` nor on disk, before all of it is there with its sums."""
    seen, write = [], lib.write_atomically

    def look(path, content):
        seen.append((folder.steps(), path.parent.name, sorted(p.name for p in path.parent.parent.iterdir())))
        write(path, content)

    monkeypatch.setattr(lib, "write_atomically", look)
    for step in (1, 2):
        folder.save(step, tree(step), {"value": step})
        folder.wait()
        assert folder.steps()[-1] == folder.latest() == step
    temporary = [f"{step}.orbax-checkpoint-tmp" for step in (1, 2)]
    assert seen == [([], temporary[0], [temporary[0]]), ([1], temporary[1], ["1", temporary[1]])]
    assert (folder._path / "2" / "checksums.json").exists()


def test_what_cannot_be_written_is_said_and_leaves_the_ones_before(folder, monkeypatch, caplog):
    for step in (1, 2):
        folder.save(step, tree(step), {"value": step})
    folder.wait()

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lib, "write_atomically", full)
        folder.save(3, tree(3))
        said = r"the checkpoint of step 3 in .* could not be written: .*No space left"
        with pytest.raises(OSError, match=said):
            while folder._writing:
                folder.check()
        folder.save(4, tree(4))
        with pytest.raises(OSError, match="No space left"):  # before the next is begun
            folder.save(5, tree(5))
    assert folder.steps() == [1, 2] and sorted(p.name for p in folder._path.iterdir()) == ["1", "2"]
    assert not [record for record in caplog.records if record.exc_info]  # said once, without a traceback
    assert_is(folder, 1, 1)  # which the next one that is written replaces
    folder.save(6, tree(6), {"value": 6})
    folder.wait()
    assert folder.steps() == [2, 6]
    assert_is(folder, 6, 6)


def test_where_no_folder_can_be_made_no_thread_waits_for_it(folder, monkeypatch):
    """Orbax's would, for twenty minutes, and keep the program from ending."""
    folder.save(1, tree(1))
    folder.wait()
    make = os.mkdir

    def refuse(path, *args, **options):
        if "orbax-checkpoint-tmp" in os.fspath(path):
            raise PermissionError(1, "Operation not permitted", os.fspath(path))
        make(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(OSError, match=r"the checkpoint of step 2 in .* could not be written: .*not permitted"):
            folder.save(2, tree(2))
            folder.wait()
    waiting = [thread for thread in threading.enumerate() if type(thread).__name__ == "_SignalingThread"]
    assert not waiting
    folder.save(3, tree(3))
    folder.wait()
    assert folder.steps() == [1, 3]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "x.json", "{}")
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'none' / 'x.json'}'"


def test_files_are_whole_and_others_are_left_alone(tmp_path, monkeypatch):
    mine, other = tmp_path / "x.txt", tmp_path / "x.txt.tmp"
    other.write_text("mine, too")
    write_atomically(mine, "old")
    write_new(tmp_path / "new", b"old")
    with pytest.raises(FileExistsError, match=r"'.*/new'"):
        write_new(tmp_path / "new", "other")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write, path in ((write_atomically, mine), (write_new, tmp_path / "newer")):
            with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
                write(path, "new")
    with monkeypatch.context() as patch:  # a file system that cannot say when it has written
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
        write_atomically(mine, "old")
    monkeypatch.setattr(os, "link", lambda *_: full(0))  # a file system without links
    write_new(tmp_path / "newest", "x" * 1000)
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "newest", "other")
    left, new = (tmp_path / f"x.txt.{n:08x}.tmp" for n in (1, 2))  # of a process that was killed, and of one at work
    left.touch()
    os.utime(left, (0, 0))
    new.touch()
    with monkeypatch.context() as patch:  # and of one that ends just now
        patch.setattr(pathlib.Path, "glob", lambda path, pattern: [left, new, path / "x.txt.ended000.tmp"])
        write_atomically(mine, "old")
    new.unlink()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"x.txt": "old", "x.txt.tmp": "mine, too", "new": "old", "newest": "x" * 1000}


def test_only_late_reports_of_a_failed_save_are_passed_over(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    lib._pass_over_late_reports.__wrapped__()
    loop = asyncio.new_event_loop()
    loop.close()
    try:
        loop.call_soon_threadsafe(print)
    except RuntimeError as error:
        late = error.__traceback__.tb_next  # a thread of tensorstore calls the loop itself
    own = types.SimpleNamespace(object=None, exc_traceback=late.tb_next)
    deleted = types.SimpleNamespace(object=print, exc_traceback=late)
    for unraisable in (types.SimpleNamespace(object=None, exc_traceback=late), own, deleted):
        sys.unraisablehook(unraisable)
    assert told == [own, deleted]


def test_only_what_orbax_has_left_behind_is_passed_over():
    def record(call):
        with pytest.raises(Exception) as caught:
            call()
        info = (caught.type, caught.value, caught.tb)
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, "never retrieved", (), info)

    assert not lib._is_not_of_orbax(record(lambda: ocp.CheckpointManager(None)))
    assert lib._is_not_of_orbax(record(lambda: json.loads("")))
    assert lib._is_not_of_orbax(logging.LogRecord("asyncio", logging.ERROR, "", 0, "slow", (), None))


KILLED = """
import sys, time
from msjax.runs import checkpoints as lib
from tests.test_checkpoints import tree
it = lib.Checkpoints(sys.argv[1], keep=1)
it.save(1, tree(1), {"value": 1})
it.wait()
def stop(path, content):
    print("in the middle", flush=True)
    time.sleep(600)
lib.write_atomically = stop
it.save(2, tree(2), {"value": 2})
it.wait()
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_never_loses_the_one_before(tmp_path):
    """All of the second is on disk, but for its name; keep=1, so that it would have replaced the first."""
    path = tmp_path / "checkpoints"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in the middle\n"
        with pytest.raises(ValueError, match=r"one process at a time may write to .*, and another one does"):
            Checkpoints(path).steps()
        assert Checkpoints(path, read_only=True).steps() == [1]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert sorted(p.name for p in path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    it = Checkpoints(path, keep=1)
    assert it.steps() == [1]
    assert_is(it, 1, 1)
    it.save(2, tree(2), {"value": 2})
    it.close()
    assert [p.name for p in path.iterdir()] == ["2"]


def test_checkpoints_of_one_program_are_begun_at_the_same_time(tmp_path):
    """As of parties that are threads: neither takes the other's signal that its folder is there for its own."""
    stores = [Checkpoints(tmp_path / name) for name in "ab"]
    barrier, failures = threading.Barrier(len(stores)), []

    def save(store):
        try:
            for step in range(1, 6):
                barrier.wait()
                store.save(step, {f"x{n}": np.full((64,), step, np.float32) for n in range(8)})
            store.wait()
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=save, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for store in stores:
        assert store.steps() == [1, 2, 3, 4, 5]
        store.close()
