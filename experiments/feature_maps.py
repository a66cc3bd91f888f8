"""Real feature maps and gradients, of a trained run, at every named cut: what codecs are compared on.

    python -m experiments.feature_maps runs/cifar10_lite-uncompressed --data-dir DIR --out maps.npz

The trained network is cut anew at each of its named cuts, and one training batch (no augmentation, no codec) goes
through it. Keys of the file: `shallow/features`, `shallow/gradients`, …: float32 (samples, height, width, channels), of
the gradients those of the mean loss.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import build, config, models, tasks
from msjax.data import digests
from msjax.runs import RunFolder
from msjax.training import loaded, saved
from msjax.training.devices import split_cpu
from msjax.training.from_config import load_run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished or interrupted run")
    parser.add_argument("--data-dir", help="where the data set is on this machine")
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--out", default="maps.npz")
    options = parser.parse_args()
    maps = collect(options.run, samples=options.samples, data_dir=options.data_dir)
    np.savez_compressed(options.out, **maps)
    for name, array in maps.items():
        print(f"{name}: {list(array.shape)}, {np.mean(array == 0):.1%} zeros")
    return 0


class Network(NamedTuple):
    """A trained network, whole, with the data that it was trained on."""

    cfg: config.Config
    run: loaded.LoadedRun
    params: dict[str, Any]
    stats: dict[str, Any]

    def batch(self, samples: int) -> tuple[jax.Array, jax.Array]:
        """The first training samples, not augmented: input of the network, and labels."""
        images, labels = map(jnp.asarray, self.run.dataset.train.fetch(np.arange(samples)))
        return self.run.spec.preprocess(images), labels

    def cuts(self, cut: int | str) -> tuple[models.ModelPart, models.ModelPart]:
        """Client and server part of the network, cut anew."""
        at = dataclasses.replace(self.cfg, model=dataclasses.replace(self.cfg.model, cut=str(cut)))
        client, server = build.make_parts(at, self._summary())[:2]
        return _trained(client, self.params, self.stats), _trained(server, self.params, self.stats)

    def named_cuts(self) -> list[str]:
        return list(dict(build.make_model(self.cfg, self._summary()).named_cuts))

    def list_cuts(self) -> list[models.Cut]:
        """Every boundary between two blocks."""
        return models.list_cuts(build.make_model(self.cfg, self._summary()))

    def _summary(self):
        return build.DataSummary.of(self.run.dataset)


def load(path: str, *, data_dir: str | None = None, cache_dir: str | None = None, trained: bool = True) -> Network:
    """Returns the network of a run folder as it was last saved; as it was before the first step if not `trained`.

    Raises:
      ValueError: there is no such run, it has no checkpoint, or its clients have parts of their own.
    """
    folder, cfg = RunFolder.open(path, read_only=True)
    data = dataclasses.replace(
        cfg.data, data_dir=data_dir or cfg.data.data_dir, cache_dir=cache_dir or cfg.data.cache_dir
    )
    cfg = dataclasses.replace(cfg, data=data)
    split_cpu(cfg.clients)
    run = load_run(cfg)
    if not run.dataset.in_memory:
        raise ValueError(f"the run's data set must fit in memory, got {cfg.data.name!r}")
    if run.spec.mode.own_parts:
        raise ValueError(f"the run's clients must share one part, got mode.kind={cfg.mode.kind!r}")
    state = run.state
    if trained:
        if "train" in folder.other_data(digests(run.dataset)):  # a network of other images has other features
            folder.check_data(digests(run.dataset))
        found = saved.restore(folder, run, *loaded.placed(run))
        if found is None:
            raise ValueError(f"the run must have a checkpoint, got {path!r} without one")
        state = found[0]
    folder.close()
    state = jax.device_get(state)
    return Network(cfg, run, state.client.params | state.server.params, state.client.stats | state.server.stats)


def collect(
    run: str,
    *,
    samples: int,
    cuts: Iterable[str] | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, np.ndarray]:
    """Returns features and gradients by cut, of all named ones or of `cuts`; see above. Raises what `load` does."""
    network = load(run, data_dir=data_dir, cache_dir=cache_dir)
    x, labels = network.batch(samples)
    maps = {}
    for name in cuts or network.named_cuts():
        h, g = at_cut(*network.cuts(name), x, labels, label_smoothing=network.cfg.optim.label_smoothing)
        maps[f"{name}/features"], maps[f"{name}/gradients"] = np.asarray(h), np.asarray(g)
    return maps


def _trained(part: models.ModelPart, params, stats) -> models.ModelPart:
    """A part with the trained arrays of its blocks."""
    own = part._replace(params={k: params[k] for k in part.params}, stats={k: stats[k] for k in part.stats})
    return jax.tree.map(jnp.asarray, own)


@functools.partial(jax.jit, static_argnames="label_smoothing")
def at_cut(client, server, x, labels, *, label_smoothing):
    """(features, gradients) of a batch, as in training."""

    def loss(h):
        logits, _ = server.apply(server.params, server.stats, h, train=True, key=jax.random.key(1))
        return tasks.cross_entropy(logits, labels, label_smoothing).mean()

    h, _ = client.apply(client.params, client.stats, x, train=True, key=jax.random.key(0))
    return h, jax.grad(loss)(h)


if __name__ == "__main__":
    sys.exit(main())
