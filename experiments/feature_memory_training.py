"""What `feature_memory` trains: its arms, and the step of clients whose features go through a memory."""

import dataclasses
import functools
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import build, compress, data, wire
from msjax.compress import Codec, EntropyMask, FeatureMemory, Identity, MaskEncoded
from msjax.config import Config
from msjax.split import fused
from msjax.split.payloads import Codecs
from msjax.split.spec import RunSpec
from msjax.split.state import TrainState, client_keys, eval_key, train_key
from msjax.split.step import client_backward, client_features, server_step, update_part
from msjax.split.trees import mean

CLIENTS, BATCH = 2, 125
FRAME = 9  # bytes in a message's header for one more buffer: the bits that say what was sent


class Setting(NamedTuple):
    """A network and its data.

    Attributes:
      config: of the run; its first `samples` of training data, or those behind `earlier` samples.
      test_batch: of test samples that go through a codec together.
      signed: whether features have both signs.
      frozen: the clients' parts compute as at test: without dropout, with their running statistics.
      earlier: samples on which the network was trained for two epochs before, without compression, at the config's
        rate; the run itself then has a tenth of that.
    """

    config: Config
    samples: int
    test_samples: int
    test_batch: int
    seeds: int
    signed: bool
    frozen: bool = False
    earlier: int = 0


class Arm(NamedTuple):
    """What is compared: a codec alone, or the base of a memory; in the first epoch, when all samples are new, `first`
    instead of it where that is given."""

    codec: Codec
    remembers: bool = False
    first: Codec | None = None
    threshold: float = 0.0
    all_gradients: bool = False

    def coder(self, epoch: int) -> Codec | FeatureMemory:
        """Returns what features go through in an epoch."""
        return FeatureMemory(self.whole if epoch == 0 else self.codec, self.threshold) if self.remembers else self.codec

    @property
    def whole(self) -> Codec:
        """What features go through that have no memory."""
        return self.first or self.codec

    def __str__(self) -> str:
        first = f"{_short(self.first)}, then " if self.first else ""
        memory = ", memory" * (self.remembers and self.codec != Identity())
        threshold = f", threshold {self.threshold}" * (self.threshold > 0)
        return f"{first}{_short(self.codec)}{memory}{threshold}" + ", with all gradients" * self.all_gradients


def _short(codec):
    """A codec's kind and rate."""
    match codec:
        case EntropyMask():
            return f"EntropyMask {codec.bits} bits" if codec.bits else f"EntropyMask error {codec.error}"
        case MaskEncoded():
            return f"MS {codec.bits} bits"
    return "none"


def named(arm: Arm) -> dict[str, Any]:
    """Returns an arm as its row has it."""
    first = arm.first and str(arm.first)
    return {
        "codec": str(arm.codec),
        "remembers": arm.remembers,
        "first": first,
        "threshold": arm.threshold,
        "all_gradients": arm.all_gradients,
    }


def arm_of(row: dict[str, Any]) -> Arm:
    """Returns the arm of a row."""
    first = row["first"] and compress.from_string(row["first"])
    return Arm(compress.from_string(row["codec"]), row["remembers"], first, row["threshold"], row["all_gradients"])


class Run(NamedTuple):
    """A run with its data, before its first step."""

    spec: RunSpec
    state: TrainState
    train: data.Arrays
    test: data.Arrays


def load(setting: Setting, seed: int) -> Run:
    """Loads the data, builds the network, and trains it on the earlier samples where there are such."""
    cfg = dataclasses.replace(setting.config, seed=seed, codec=Identity(), grad_codec=Identity())
    whole = build.load_data(cfg)
    first, behind = whole.train[: setting.earlier], setting.earlier + setting.samples
    train, test = (
        data.Arrays(*part) for part in (whole.train[setting.earlier : behind], whole.test[: setting.test_samples])
    )
    summary = build.DataSummary.of(whole).normalized_as(cfg.data)

    def built(cfg, samples):
        found = build.build(cfg, summary, samples=samples // CLIENTS, test_samples=len(test))
        return Run(found.spec, TrainState(found.client, found.server, jnp.int32(0)), train, test)

    if not setting.earlier:
        return built(cfg, setting.samples)
    earlier = built(dataclasses.replace(cfg, epochs=2), setting.earlier)._replace(train=data.Arrays(*first))
    for epoch in range(2):
        earlier, _, _ = train_epoch(earlier, Identity(), (), epoch, seed + 100, frozen=False)
    slower = dataclasses.replace(cfg.optim, learning_rate=cfg.optim.learning_rate / 10)
    run = built(dataclasses.replace(cfg, optim=slower), setting.samples)
    parts = [
        new._replace(params=old.params, stats=old.stats)
        for new, old in ((run.state.client, earlier.state.client), (run.state.server, earlier.state.server))
    ]
    return run._replace(state=TrainState(*parts, jnp.int32(0)))


def empty_memory(run: Run, arm: Arm) -> Any:
    """Returns the clients' memories, (K, …); () for a codec alone."""
    if not arm.remembers:
        return ()
    (like,) = run.spec.feature_payload(1).likes
    one = arm.coder(0).init(len(run.train) // CLIENTS, like)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (CLIENTS, *leaf.shape)), one)


@functools.partial(
    jax.jit, static_argnames=("spec", "coder", "frozen", "all_gradients"), donate_argnames=("state", "memory")
)
def train_step(spec, coder, state, memory, x, y, slots, key, *, frozen, all_gradients=False):
    """One step of all clients: (state, memory, payloads to be measured, sums to be added up)."""
    keys = client_keys(key, state.step, jnp.arange(CLIENTS))
    at_clients = dataclasses.replace(spec, client=_as_at_test(spec.client)) if frozen else spec

    def one_client(x, key):
        return client_features(at_clients, state.client, spec.preprocess(x), key)

    h, pending = jax.vmap(one_client)(x, keys)
    (given,) = jax.tree.leaves(h)
    if isinstance(coder, Codec):
        before, payloads, sent = given, jax.vmap(coder.encode)(given), jnp.ones((CLIENTS, BATCH), jnp.bool_)
        received = jax.vmap(lambda payload, h: coder.decode(payload, h))(payloads, given)
    else:
        before = jax.vmap(lambda state, slots: state.values[slots].astype(jnp.float32))(memory, slots)
        payloads, _ = jax.vmap(coder.encode)(given, memory, slots)  # the client's memory is the server's, to the bit
        received, memory = jax.vmap(coder.decode)(payloads, memory, slots, given)
        sent = jax.vmap(coder.is_sent)(payloads, given)
    payload = jax.vmap(spec.feature_payload(BATCH).encode)(jax.tree.unflatten(jax.tree.structure(h), [received]))
    server, replies, metrics = server_step(spec, state.server, payload, y, keys, batch_size=BATCH)
    if not all_gradients:  # replies are the gradients, as they are
        replies = jax.tree.map(lambda g: jnp.where(sent.reshape(CLIENTS, BATCH, *(1,) * (g.ndim - 2)), g, 0), replies)
    updates = jax.vmap(lambda *args: client_backward(spec, *args, batch_size=BATCH))(pending, replies)
    client = update_part(spec, state.client, mean(updates))
    squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in (given, received - given, given - before)]
    sums = jnp.stack([metrics.loss, sent.mean(), *squares])
    return TrainState(client, server, state.step + 1), memory, payloads, sums


@functools.cache
def _as_at_test(client):
    def apply(params, stats, x, *, train, key):
        return client(params, stats, x, train=False, key=None)

    return apply


def train_epoch(run: Run, coder: Codec | FeatureMemory, memory: Any, epoch: int, seed: int, **options: bool) -> Any:
    """Returns the run and its memories after an epoch, and what was measured in it; None where a loss is not finite.

    Args:
      options: those of `train_step`.
    """
    holders = data.partition(len(run.train), CLIENTS, seed=seed)
    order = data.epoch_indices(holders, len(run.train) // CLIENTS, seed=seed, epoch=epoch)
    slot_of = np.zeros(len(run.train), np.int32)
    for own in holders:
        slot_of[own] = np.arange(own.size)
    state, sums, nbytes = run.state, np.zeros(5), 0
    (like,) = run.spec.feature_payload(BATCH).likes
    steps = order.shape[1] // BATCH
    for step in range(steps):
        chosen = order[:, step * BATCH : (step + 1) * BATCH]
        x, y = (jax.tree.map(lambda a, at=chosen: jnp.asarray(a[at]), part) for part in run.train[:])
        args = (run.spec, coder, state, memory, x, y, jnp.asarray(slot_of[chosen]), train_key(seed))
        state, memory, payloads, found = train_step(*args, **options)
        sums += np.float64(found)
        if not np.isfinite(sums).all():
            return run._replace(state=state), memory, None
        nbytes += message_bytes(jax.device_get(payloads), coder, like)
    loss, sent, energy, lost, moved = sums
    found = {
        "train_loss": loss / steps,
        "bits": 8 * nbytes / (steps * CLIENTS * like.size),
        "error": lost / energy,
        "change": moved / energy,
        "sent": sent / steps,
    }
    return run._replace(state=state), memory, found


def message_bytes(payloads: Any, coder: Codec | FeatureMemory, like: Any) -> int:
    """Returns the bytes of all clients' messages, whose payloads have a leading axis K."""
    remembers = isinstance(coder, FeatureMemory)
    base, payloads, sent = (coder.base, *payloads) if remembers else (coder, payloads, None)
    if isinstance(base, Identity):
        return CLIENTS * wire.most_bytes(base, like)
    messages = (jax.tree.map(lambda leaf, k=k: leaf[k], payloads) for k in range(CLIENTS))
    total = sum(len(wire.encode(one, base, like, compression="huffman")) for one in messages)
    return total + (sent.nbytes + CLIENTS * FRAME if remembers else 0)


@functools.partial(jax.jit, static_argnames="spec")
def _test_batch(spec, state, x, y, key):
    of_one = jax.tree.map(lambda leaf: leaf[None], (spec.preprocess(x), y, key))
    return jax.tree.map(lambda leaf: leaf[0], fused.evaluate(spec, state, *of_one))


def test(run: Run, codec: Codec, batch: int, seed: int) -> dict[str, float]:
    """Returns test loss and accuracy with features through a codec."""
    spec = dataclasses.replace(run.spec, test_codec=Codecs.of(codec.at_inference()))
    losses, sums = [], {}
    for start in range(0, len(run.test), batch):
        x, y = jax.tree.map(jnp.asarray, run.test[start : start + batch])
        found = _test_batch(spec, run.state, x, y, jax.random.fold_in(eval_key(seed), start))
        losses.append(float(found.loss))
        sums = {name: sums.get(name, 0) + np.asarray(value) for name, value in found.sums.items()}
    return {"loss": statistics.mean(losses), "top1_percent": spec.task.finish(sums)["top1_percent"]}
