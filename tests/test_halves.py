"""Trained halves as files: what is loaded is what was saved, and what is no half is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from msjax import assemble, config, halves, models

CFG = config.Config(
    model=config.ModelConfig(width=0.5, cut="shallow"), data=config.DataConfig(data_dir="/secret"), seed=3
)
INFO = assemble.SetInfo((8, 8, 1), 10, np.float32([0.5]), np.float32([0.25]))


def save(path, cfg=CFG):
    client, server, *head = assemble.make_halves(cfg, INFO)
    mine = models.Half(client.apply, client.params | head[0].params, client.stats | head[0].stats) if head else client
    halves.save(path / "client.safetensors", "client", mine, cfg, INFO, run="r", step=7)
    halves.save(path / "server.safetensors", "server", server, cfg, INFO, run="r", step=7)
    return client, server, *head


@pytest.mark.parametrize("head_cut", [None, "last"])
def test_loaded_halves_compute_what_the_saved_did(tmp_path, head_cut):
    cfg = dataclasses.replace(CFG, mode=config.ModeConfig(head_cut=head_cut))
    x = y = jax.random.normal(jax.random.key(0), (3, *INFO.input_shape))
    for half in save(tmp_path, cfg):
        x, _ = half.apply(half.params, half.stats, x, train=False)
    client, server = (halves.load(tmp_path / f"{part}.safetensors") for part in ("client", "server"))
    for half in (client, server):
        y, _ = half.apply(half.params, half.stats, y, train=False)
    assert (client.head is not None) == (head_cut is not None) and server.head is None
    if client.head is not None:
        y, _ = client.head(client.params, client.stats, y, train=False)
    np.testing.assert_array_equal(x, y)
    assert (client.part, server.part, client.run, client.step) == ("client", "server", "r", 7)
    assert client.info == assemble.SetInfo((8, 8, 1), 10, (0.5,), (0.25,))
    assert client.config == dataclasses.replace(cfg, data=config.DataConfig())


def test_nothing_of_the_machine_is_in_the_file(tmp_path):
    save(tmp_path)
    assert b"/secret" not in (tmp_path / "client.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["client.safetensors", "server.safetensors"]


def test_files_that_are_no_halves(tmp_path):
    save(tmp_path)
    path = tmp_path / "client.safetensors"
    data = path.read_bytes()
    with safetensors.safe_open(path, "numpy") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def load(header=header, arrays=arrays):
        path.write_bytes(safetensors.numpy.save(arrays, metadata=header))
        return halves.load(path)

    load()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        halves.load(path)
    with pytest.raises(FileNotFoundError):
        halves.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="format 'msjax-half-1', got None"):
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
