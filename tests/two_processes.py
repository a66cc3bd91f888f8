"""One of two processes of a test: trains in all modes and writes what came out. test_several_processes.py starts it."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

import msjax
from msjax import compress, config, data
from msjax.split.finite import NonFiniteError
from msjax.training import batching, from_config, loop, processes
from msjax.training.loaded import mesh_of

from . import setups

RUNS = {
    "parallel": {"mode": setups.MODES[0]},
    "U-shaped": {"mode": setups.MODES[1]},
    "splitfed": {"mode": setups.MODES[2]},
    "sequential": {"mode": setups.MODES[3]},
    "budget": {
        "codec": compress.EntropyMask(bits=1.6),
        "grad_codec": compress.EntropyMask(error=0.3, signed=True, rounding="stochastic"),
        "cut_bits": 10.0,  # such small messages have much of a header
        # The parts are nearly the same at the end as at the start, so that no value moves to another code.
        "optim": config.OptimConfig(learning_rate=1e-6),
    },
}
"""All modes, and a budget for the cut: what their configs have in place of `setups.SMOOTH`'s fields."""


def config_of(name):
    """The config of a run of `RUNS`."""
    return dataclasses.replace(setups.SMOOTH, **RUNS[name])


class Stream:
    """A split that is not in memory; notes what is read of it."""

    in_memory = False

    def __init__(self, split):
        self._split, self.read = split, set()
        self.input_like, self.label_like = split.input_like, split.label_like

    def __len__(self):
        return len(self._split)

    def labels(self):
        return self._split.labels()

    def fetch(self, indices, entropy=()):
        self.read |= set(np.asarray(indices).tolist())
        return self._split.fetch(indices)


def counts_of(cfg):
    """How many samples a config's run has, to train and to test on: uneven in parallel mode."""
    return setups.UNEVEN if cfg.mode == setups.MODES[0] else setups.even(cfg.clients)


def loaded(cfg, *, streamed=False):
    """The run of a config on random data."""
    dataset = setups.dataset(*counts_of(cfg))
    if streamed:
        dataset = dataclasses.replace(dataset, train=Stream(dataset.train), test=Stream(dataset.test))
    data.load = lambda *args, **options: dataset
    return from_config.load_run_everywhere(cfg)


def result(finished):
    """What a run ended with, as arrays by name."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(finished.state[:2])}
    for record in finished.history:
        for group in ("train", "test", "traffic"):
            found |= {f"{record['epoch']} {group} {name}": value for name, value in record[group].items()}
    if finished.state.up_bits is not None:
        found["aims"] = finished.state.up_bits
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def own_model(shift):
    """A model of functions and arrays, and data for it."""
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=shape).astype(np.float32) / 2 for shape in ((6, 8), (8, 3))]
    client = (lambda params, x: jax.nn.relu(x @ params["w"]), {"w": weights[0]})
    server = (lambda params, h: h @ params["w"], {"w": weights[1]})
    x = shift + rng.normal(size=(48, 6)).astype(np.float32)
    return (client, server), data.from_arrays((x[:40], np.arange(40) % 3), (x[40:], np.arange(8) % 3))


def train_own(folder, learning_rate=0.05, shift=0.0):
    """`msjax.train` as a user calls it."""
    model, dataset = own_model(shift)
    options = {"codec": compress.RandK(ratio=0.5), "optimizer": config.OptimConfig(learning_rate=learning_rate)}
    return msjax.train(model, dataset, clients=4, batch_size=5, epochs=2, folder=folder, **options)


def error_of(function):
    """The message of what is raised, and its class."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(port: str, number: str, folder: str) -> None:
    folder, number = pathlib.Path(folder), int(number)
    processes.join(f"localhost:{port}", 2, number)
    found, arrays = {"devices": jax.device_count()}, {}
    for name in RUNS:
        run = loaded(config_of(name))
        arrays |= {f"{name}: {key}": value for key, value in result(loop.train(run, quiet=True)).items()}
        if name == "parallel":
            resident = batching.resident_of_clients(run.dataset.train, mesh_of(run.spec), run.client_indices)
            found["rows"] = [len(shard.data) for shard in resident.inputs.addressable_shards]
    run = loaded(config_of("parallel"), streamed=True)
    arrays |= {f"streamed: {key}": value for key, value in result(loop.train(run, quiet=True)).items()}
    found["read"] = sorted(map(int, run.dataset.train.read))
    found["held"] = [list(map(int, indices)) for indices in run.client_indices]
    trained = train_own(str(folder / "own"))
    arrays |= {"own: client": trained.client.params["w"], "own: server": trained.server.params["w"]}

    other = dataclasses.replace(setups.SMOOTH, optim=config.OptimConfig(learning_rate=0.25))

    def fails_in(process):
        if number == process:
            raise ValueError("no data here")
        return 5

    found["errors"] = {
        "config": error_of(lambda: loaded(other if number else setups.SMOOTH)),
        "data": error_of(lambda: train_own(None, shift=float(number))),
        "clients": error_of(lambda: loaded(dataclasses.replace(setups.SMOOTH, clients=3))),
        "together": error_of(lambda: processes.together(lambda: fails_in(1))),
        "first": error_of(lambda: processes.from_first(lambda: fails_in(0))),
        "second": error_of(lambda: processes.from_first(lambda: fails_in(1))),
        "NaN": error_of(lambda: train_own(None, learning_rate=1e30)),
    }
    assert found["errors"]["NaN"].startswith(NonFiniteError.__name__), found
    np.savez(folder / f"{number}.npz", **arrays)
    (folder / f"{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
