"""Trained parts as files: what is loaded is what was saved, and what is no part is refused."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from msjax import build, config, models, parts
from msjax.split.trees import TreeSpec

CFG = config.Config(
    model=config.ModelConfig(width=0.5, cut="shallow"), data=config.DataConfig(data_dir="/secret"), seed=3
)
SUMMARY = build.DataSummary(
    TreeSpec.of(jax.ShapeDtypeStruct((8, 8, 1), jnp.uint8)),
    TreeSpec.of(jax.ShapeDtypeStruct((), jnp.int32)),
    10,
    (0.5,),
    (0.25,),
)


def save(path, cfg=CFG):
    client, server, *tail = build.make_parts(cfg, SUMMARY)
    mine = (
        models.ModelPart(client.apply, client.params | tail[0].params, client.stats | tail[0].stats) if tail else client
    )
    parts.save_trained(path / "client.safetensors", "client", mine, cfg, SUMMARY, run_id="r", step=7)
    parts.save_trained(path / "server.safetensors", "server", server, cfg, SUMMARY, run_id="r", step=7)
    return client, server, *tail


@pytest.mark.parametrize("tail_cut", [None, "last"])
def test_loaded_parts_compute_what_the_saved_did(tmp_path, tail_cut):
    cfg = dataclasses.replace(CFG, mode=config.ModeConfig(tail_cut=tail_cut))
    x = y = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    for part in save(tmp_path, cfg):
        x, _ = part.apply(part.params, part.stats, x, train=False)
    client, server = (parts.load_part(tmp_path / f"{name}.safetensors") for name in ("client", "server"))
    for part in (client, server):
        y, _ = part.apply(part.params, part.stats, y, train=False)
    assert (client.tail is not None) == (tail_cut is not None) and server.tail is None
    if client.tail is not None:
        y, _ = client.tail(client.params, client.stats, y, train=False)
    np.testing.assert_array_equal(x, y)
    assert (client.part, server.part, client.run_id, client.step) == ("client", "server", "r", 7)
    assert client.summary == SUMMARY
    assert client.config == dataclasses.replace(cfg, data=config.DataConfig())


def test_a_loaded_part_says_what_it_takes_where_it_is_given_something_else(tmp_path):
    """Inside `jit`, too. What its layers take as well, as larger images, they are given."""
    cfg = dataclasses.replace(CFG, mode=config.ModeConfig(tail_cut="last"))
    save(tmp_path, cfg)
    client, server = (parts.load_part(tmp_path / f"{name}.safetensors") for name in ("client", "server"))
    images = jax.ShapeDtypeStruct((3, 8, 8, 1), "float32")

    def apply(part, x, function=None):
        function = functools.partial(function or part.apply, train=False)
        return jax.eval_shape(function, part.params, part.stats, x)[0]

    for wrong, shown in (((3, 8, 8, 5), "float32[B, 8, 8, 5]"), ((3,), "float32[B]")):
        told = f"x must be what the client's part takes, float32[B, 8, 8, 1], got {shown}"
        with pytest.raises(ValueError, match=re.escape(told)):
            apply(client, jax.ShapeDtypeStruct(wrong, "float32"))
    features = apply(client, images)
    with pytest.raises(ValueError, match=re.escape(f"server's part takes, float32[B, {features.shape[1]}, ")):
        apply(server, images)
    logits = apply(server, features)
    with pytest.raises(ValueError, match=re.escape(f"tail's part takes, float32[B, {logits.shape[1]}")):
        apply(client, images, client.tail)
    assert client.apply == parts.load_part(tmp_path / "client.safetensors").apply  # so that `jit` need not trace anew


def test_nothing_of_the_machine_is_in_the_file(tmp_path):
    save(tmp_path)
    assert b"/secret" not in (tmp_path / "client.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["client.safetensors", "server.safetensors"]


def test_what_a_part_of_ones_own_is_saved_with_comes_back(tmp_path):
    part, path = models.ModelPart(None, {"w": np.ones(2)}, {}), tmp_path / "client.safetensors"
    parts.save_part(path, "client", part, description={"cut": 2}, step=3, up_bits=2.5)
    found = parts.load_part(path)
    assert (found.part, found.step, found.up_bits, found.description) == ("client", 3, 2.5, {"cut": 2})
    for name, up_bits in (("server", 2.0), ("client", 0.0), ("client", 65.0), ("client", float("nan"))):
        with pytest.raises(ValueError, match="up_bits must be above 0 and at most 64, and only of a client, got "):
            parts.save_part(path, name, part, up_bits=up_bits)
    with pytest.raises(TypeError, match="trained must have params and stats, as what as_part returns, got dict"):
        parts.save_part(path, "client", {})
    with pytest.raises(IsADirectoryError, match="path must be a file of a part, got the folder"):
        parts.load_part(tmp_path)
    assert parts.load_part(path).step == 3


def test_arrays_in_any_order_are_written_as_they_are(tmp_path):
    """Transposed, as of a PyTorch layer, with steps, and with the bytes of another machine."""
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"t": w.T, "s": w[:, ::2], "b": w.astype(">f4"), "n": np.float32(2)}
    parts.save_part(tmp_path / "p.safetensors", "client", models.ModelPart(None, arrays, {}))
    found = parts.load_part(tmp_path / "p.safetensors").params
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.shape(found[name]) == np.shape(array)


def test_the_same_part_makes_the_same_file(tmp_path):
    """For those who compare files; safetensors writes metadata in another order each time."""
    save(tmp_path)
    first = (tmp_path / "client.safetensors").read_bytes()
    for _ in range(3):
        save(tmp_path)
        assert (tmp_path / "client.safetensors").read_bytes() == first
    end = 8 + int.from_bytes(first[:8], "little")
    metadata = json.loads(first[8:end])["__metadata__"]
    assert list(metadata) == sorted(metadata) and end % 8 == 0


def test_files_of_the_first_version_are_read(tmp_path):
    """Their summary of the data had a shape and no dtypes, and their config the first field names."""
    save(tmp_path)
    path = tmp_path / "server.safetensors"
    header, arrays = contents(path)
    old = {"input_shape": [8, 8, 1], "num_classes": 10, "mean": [0.5], "std": [0.25]}
    tree = config.earlier_names(config.to_json(config.without_paths(CFG)))
    tree = {name: value for name, value in tree.items() if name not in ("task", "array_codecs")}
    header |= {"info": parts.json.dumps(old), "config": parts.json.dumps(tree)}
    path.write_bytes(safetensors.numpy.save(arrays, metadata=header))
    loaded = parts.load_part(path)
    assert loaded.summary.input_shape == (8, 8, 1) and loaded.summary.mean == (0.5,)
    assert loaded.config == config.without_paths(CFG)


def contents(path):
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_files_that_are_no_parts(tmp_path):
    save(tmp_path)
    path = tmp_path / "client.safetensors"
    data = path.read_bytes()
    header, arrays = contents(path)
    del header["crc32"]  # as of before there were any

    def load(header=header, arrays=arrays):
        path.write_bytes(safetensors.numpy.save(arrays, metadata=header))
        return parts.load_part(path)

    load()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        parts.load_part(path)
    with pytest.raises(FileNotFoundError):
        parts.load_part(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="format 'msjax-half-1' or 'msjax-part-1', got None"):
        load(header={})
    with pytest.raises(ValueError, match="does not fit this version"):
        load(header=header | {"config": "{}"})
    with pytest.raises(ValueError, match="must be of a client or a server, got 'both'"):
        load(header=header | {"part": "both"})
    with pytest.raises(ValueError, match="these differ: params/"):
        load(header=header | {"part": "server"})
    name = next(iter(arrays))
    with pytest.raises(ValueError, match=f"these differ: {name}"):
        load(arrays=arrays | {name: arrays[name][..., :-1].copy()})


def test_parts_of_two_ends_of_a_run_are_told_apart():
    """As where clients went back from an end, and one was away: the part that it kept belongs to the other server's."""
    first, second = (parts.served_run_id("0a", generation) for generation in (7, 8))
    where = "of the client", "of the server"
    parts.check_run_ids(first, first, where)
    parts.check_run_ids("0a", first, where)  # of an earlier version, which did not tell the end
    said = "the parts must be of one run, got '0a-7' of the client and '0a-8' of the server. The run ended"
    with pytest.raises(ValueError, match=re.escape(said)):
        parts.check_run_ids(first, second, where)
    with pytest.raises(ValueError, match=r"of one run, got '' of the client and 'r' of the server$"):
        parts.check_run_ids("", "r", where)


def test_a_part_of_a_run_from_python_is_not_taken_for_one_that_lacks_its_preset(tmp_path):
    """As by `msjax serve --part`: no preset would help."""
    client = build.make_parts(CFG, SUMMARY)[0]
    parts.save_part(tmp_path / "own.safetensors", "client", client)
    with pytest.raises(ValueError, match=r"part must be a part of msjax train .*, got one of a run from Python"):
        parts.check_complete(parts.load_part(tmp_path / "own.safetensors"), "part")
