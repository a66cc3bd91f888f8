"""Files of a run that are not as they were written: named, and never used as they are."""

import numpy as np
import pytest

from msjax import models, parts
from msjax.distributed.stores import ClientStore
from msjax.runs.checkpoints import Checkpoints, DamagedError

TREE = {"w": np.arange(3000, dtype=np.float32), "n": np.arange(7)}


def flip(path, at=-9):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(bytes(data))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        checkpoints.save(step, TREE, {"step": step})
    checkpoints.wait()
    yield tmp_path / "checkpoints", checkpoints
    checkpoints.close()


def test_a_flipped_bit_is_found_and_the_intact_checkpoint_named(saved):
    folder, checkpoints = saved
    state, progress = checkpoints.restore(20, TREE)
    np.testing.assert_array_equal(state["w"], TREE["w"])
    assert progress == {"step": 20}
    flip(largest(folder / "20"))
    with pytest.raises(
        DamagedError, match=r"step 20 is damaged \(.*\): that of step 10 is intact; delete .*/20 to go on"
    ):
        checkpoints.restore(20, TREE)
    assert checkpoints.restore(10, TREE)[1] == {"step": 10}
    flip(largest(folder / "10"))
    with pytest.raises(DamagedError, match=r"step 10 is damaged .*: there is no intact one before it"):
        checkpoints.restore(10, TREE)


def test_a_client_is_not_told_that_an_older_checkpoint_would_help(tmp_path):
    store = ClientStore(tmp_path / "checkpoints")
    store.save(10, TREE)
    store.wait()
    flip(largest(tmp_path / "checkpoints" / "10"))
    with pytest.raises(DamagedError, match=r"step 10 is damaged .*: put .*/10 back from a backup; or give msjax serve"):
        store.restore(10, TREE)
    store.close()


def test_a_file_that_is_gone_or_of_no_use(saved):
    folder, checkpoints = saved
    largest(folder / "20").unlink()
    with pytest.raises(DamagedError, match="step 20 is damaged"):
        checkpoints.restore(20, TREE)
    for damaged in ("{", "[]"):
        (folder / "10" / "checksums.json").write_text(damaged)
        with pytest.raises(DamagedError, match=r"step 10 is damaged \(checksums.json\)"):
            checkpoints.restore(10, TREE)
    (folder / "10" / "checksums.json").unlink()  # as of a run of before there were any
    assert checkpoints.restore(10, TREE)[1] == {"step": 10}


def test_a_flipped_bit_of_a_trained_part(tmp_path):
    path = tmp_path / "client.safetensors"
    parts.save_part(path, "client", models.ModelPart(None, {"w": np.ones((20, 20), np.float32)}, {}))
    np.testing.assert_array_equal(parts.load_part(path).params["w"], 1)
    flip(path)
    with pytest.raises(ValueError, match=r"client.safetensors is damaged"):
        parts.load_part(path)
