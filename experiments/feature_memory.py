"""Features against those that the receiver remembers: does sending their change pay?

    python -m experiments.feature_memory --data-dir DIR      # about an hour on two cores

`compress.FeatureMemory` (AQ-SGD, arXiv 2206.01299; SplitCom, 2602.10564) beside its base codec alone, at several rates.
Two clients of 125, samples in a new order every epoch, no augmentation, gradients uncompressed. Alone, a codec for
features behind a ReLU is unsigned; in a memory it has to be signed. The step is that of `msjax.split.step`; features
are encoded before it, and the server gets what is decoded. The gradient goes on only of samples that were sent, but for
arms "with all gradients". Bits are those of every message of `msjax.wire` up, Huffman-coded, by the number of values; a
memory's have the bit a sample on top. "Change" is what a sample's features differ by from what the memory has, squared
and relative; "error" what they differ by from what the server got. Accuracy is of the last epoch, with test features as
they are, and through the codec of the first epoch, as they have no memory. A run ends where its loss is not finite.

Settings: a small network on a table, from scratch; a transformer on 10,000 texts, from scratch with its dropout, and
from weights of two epochs on 20,000 other texts, with a tenth of the learning rate and without dropout at the clients.

What the record says. On the table (three seeds) `EntropyMask` with a memory needs 21 to 47 % fewer bits than alone for
the same training loss, and with test features as they are it is no less accurate. But where test features come with as
few bits and no memory, a server trained with one is worse, by up to 3.6 points. Fine-tuning the transformer (one seed;
a standard error of the accuracy is 1.4 points), features change by only 1 % from the first epoch to the second, and
their error falls as it should, but training gains little: for its loss a memory needs 23 % more bits at one bit a
value, about as many at half a bit, 7 % more or fewer with the thresholds. It needs half as many behind a finer first
epoch and a third at 0.25 bits; these two are 8.5 and 6.3 points less accurate than no compression with test features as
they are, 2.4 and 4.8 through the codec. From scratch with
dropout, features change by 60 %; no memory was run there. Whether gradients go on of all samples or only of those that
were sent makes no difference beyond the noise at these rates.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import study
from msjax import build, compress, data, wire
from msjax.compress import Codec, EntropyMask, FeatureMemory, Identity, MaskEncoded
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig
from msjax.split import fused
from msjax.split.payloads import Codecs
from msjax.split.spec import RunSpec
from msjax.split.state import TrainState, client_keys, eval_key, train_key
from msjax.split.step import client_backward, client_features, server_step, update_part
from msjax.split.trees import mean

OUT = pathlib.Path(__file__).parent / "results" / "feature_memory"
CLIENTS, BATCH = 2, 125
FRAME = 9  # bytes in a message's header for one more buffer: the bits that say what was sent
TESTS = ("test", "test_through_codec")


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


def settings(options: Any) -> dict[str, Setting]:
    """Returns each setting by name, with the data where the options say."""
    table = Config(
        ModelConfig("mlp"),
        DataConfig("adult", data_dir=options.data_dir),
        OptimConfig(learning_rate=0.05),
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=6,
    )
    text = Config(
        ModelConfig("transformer", width=0.25, activation="gelu"),
        DataConfig("glue/sst2", data_dir=options.data_dir, text_length=40),
        OptimConfig("adamw", learning_rate=1e-3, weight_decay=0.01, warmup_epochs=0.2),
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=4,
    )
    return {
        "MLP, Adult": Setting(table, 32_500, 16_250, 250, 3, signed=False),
        "transformer, SST-2": Setting(text, 10_000, 872, 218, 1, signed=True),
        "transformer, SST-2, fine-tuned": Setting(text, 10_000, 872, 218, 1, signed=True, frozen=True, earlier=20_000),
    }


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


def arms(*, signed: bool) -> list[Arm]:
    """Returns what is compared; the first one compresses nothing and measures how features change."""

    def entropy_mask(bits, signed=True):
        return EntropyMask(bits=bits, signed=signed)

    found = [Arm(Identity(), True), *(Arm(entropy_mask(bits, signed)) for bits in (0.25, 0.5, 1.0, 2.0))]
    found += [Arm(entropy_mask(bits), True) for bits in (0.25, 0.5, 1.0)]
    found += [Arm(EntropyMask(error=0.25, signed=True), True, threshold=threshold) for threshold in (0.1, 0.3)]
    later = Arm(entropy_mask(0.25), True, entropy_mask(1.0))
    found += [later, later._replace(all_gradients=True)]
    return [*found, Arm(MaskEncoded(bits=1, signed=signed)), Arm(MaskEncoded(bits=1, signed=True), True)]


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


def measure(setting: Setting, start_from: Run, arm: Arm, seed: int) -> dict[str, Any]:
    """Trains with one arm; returns what each epoch measured, and the test of the last."""
    begin = time.monotonic()
    run = start_from._replace(state=jax.tree.map(jnp.array, start_from.state))  # its own, as steps give theirs away
    memory, history = empty_memory(run, arm), []
    for epoch in range(setting.config.epochs):
        options = {"frozen": setting.frozen, "all_gradients": arm.all_gradients}
        run, memory, found = train_epoch(run, arm.coder(epoch), memory, epoch, seed, **options)
        if found is None:
            break
        history.append(found)
    row = {
        **_named(arm),
        "seed": seed,
        "history": history,
        "diverged": len(history) < setting.config.epochs,
    }
    if not row["diverged"]:
        row |= {n: test(run, c, setting.test_batch, seed) for n, c in zip(TESTS, (Identity(), arm.whole), strict=True)}
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", required=True, help="a TFDS data directory with adult and glue/sst2")
    parser.add_argument("--settings", nargs="+", help="beginnings of names of some settings; by default all")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    earlier = json.loads(file.read_text()) if file.exists() else {"rows": [], "wall_seconds": 0.0}
    rows, start = earlier["rows"], time.monotonic()
    done = {_id(row) for row in rows}
    wanted = {n: s for n, s in settings(options).items() if n.startswith(tuple(options.settings or [""]))}
    for seed in range(max(setting.seeds for setting in wanted.values())):
        for name, setting in wanted.items():
            todo = [arm for arm in arms(signed=setting.signed) if (name, *_named(arm).values(), seed) not in done]
            run = load(setting, seed) if todo and seed < setting.seeds else None
            for arm in todo if run else []:
                rows.append({"setting": name} | measure(setting, run, arm, seed))
                print(_line(rows[-1]), flush=True)
                wall = earlier["wall_seconds"] + time.monotonic() - start
                timing.save(options.out, timing.record(options, rows, wall))
    print(table(rows))
    timing.save(options.out, json.loads(file.read_text()), plot(rows))
    return 0


def _named(arm):
    first = arm.first and str(arm.first)
    return {
        "codec": str(arm.codec),
        "remembers": arm.remembers,
        "first": first,
        "threshold": arm.threshold,
        "all_gradients": arm.all_gradients,
    }


def _arm(row):
    first = row["first"] and compress.from_string(row["first"])
    return Arm(compress.from_string(row["codec"]), row["remembers"], first, row["threshold"], row["all_gradients"])


def _id(row):
    return tuple(row[name] for name in ("setting", "codec", "remembers", "first", "threshold", "all_gradients", "seed"))


def _short(codec):
    """A codec's kind and rate."""
    match codec:
        case EntropyMask():
            return f"EntropyMask {codec.bits} bits" if codec.bits else f"EntropyMask error {codec.error}"
        case MaskEncoded():
            return f"MS {codec.bits} bits"
    return "none"


def _line(row):
    bits, errors, changes = (
        "/".join(f"{epoch[name]:.3f}" for epoch in row["history"]) for name in ("bits", "error", "change")
    )
    tested = " ".join(f"{row[name]['top1_percent']:.2f}" for name in TESTS if name in row) or "diverged"
    what = f"{row['setting']}, seed {row['seed']}: {_arm(row)}: bits {bits} error {errors} change {changes}"
    return f"{what} loss {row['history'][-1]['train_loss']:.4f} top-1 {tested}"


def by_arm(rows: list[dict]) -> dict[tuple[str, Arm], list[dict]]:
    """Returns the rows of all seeds by setting and arm."""
    found = {}
    for row in rows:
        found.setdefault((row["setting"], _arm(row)), []).append(row)
    return found


def total_bits(rows: list[dict]) -> float:
    """Returns the real bits a value, over all epochs and seeds."""
    return statistics.mean(epoch["bits"] for row in rows for epoch in row["history"])


def _of_epoch(rows, name, epoch):
    return statistics.mean(row["history"][epoch][name] for row in rows)


def bits_alone(rows: list[dict], row: dict) -> float | None:
    """Returns the bits that `EntropyMask` alone would need for the training loss of a row, between those measured.

    Of the same setting and seed; None where the loss is beyond them.
    """
    points = {}
    for other in rows:
        arm = _arm(other)
        same = (other["setting"], other["seed"]) == (row["setting"], row["seed"]) and not other["diverged"]
        if same and isinstance(arm.codec, EntropyMask) and not arm.remembers:
            points[other["history"][-1]["train_loss"]] = np.log(total_bits([other]))
    loss, losses = row["history"][-1]["train_loss"], sorted(points)
    if len(losses) < 2 or not losses[0] <= loss <= losses[-1]:
        return None
    return float(np.exp(np.interp(loss, losses, [points[one] for one in losses])))


def table(rows: list[dict]) -> str:
    """Returns all that was measured, of each setting, as Markdown."""
    lines = []
    for (setting, arm), own in by_arm(rows).items():
        ended = [row for row in own if not row["diverged"]]
        if not ended:
            epochs = ", ".join(str(len(row["history"]) + 1) for row in own)
            lines.append([setting, str(arm), *["–"] * 5, f"diverged in epoch {epochs}", *["–"] * 2, str(len(own))])
            continue
        bits, errors, changes = (
            " → ".join(f"{_of_epoch(ended, name, epoch):.{digits}f}" for epoch in epochs)
            for name, digits, epochs in (("bits", 2, (0, 1, -1)), ("error", 3, (0, 1, -1)), ("change", 3, (1, -1)))
        )
        needed = [bits_alone(rows, row) for row in ended if arm.remembers]
        alone = "–" if not needed or None in needed else f"{statistics.mean(needed):.3f}"
        cells = [setting, str(arm), f"{total_bits(ended):.3f}", alone, bits, errors, changes if arm.remembers else "–"]
        cells.append(study.mean_and_deviation([row["history"][-1]["train_loss"] for row in ended], 4))
        cells += [study.mean_and_deviation([row[t]["top1_percent"] for row in ended]) for t in TESTS]
        lines.append([*cells, f"{len(ended)}" if ended == own else f"{len(ended)} of {len(own)}"])
    header = ["setting", "codec", "bits a value", "EntropyMask alone, for this loss", "first → second → last epoch"]
    return timing.table(
        [*header, "error", "change, second → last", "training loss", "test top-1, %", "through the codec", "seeds"],
        lines,
    )


KINDS = {
    "EntropyMask": ("C0o--", lambda arm: isinstance(arm.codec, EntropyMask) and not arm.remembers),
    "EntropyMask, memory": ("C0s-", lambda arm: _is_remembered(arm) and not arm.first and not arm.threshold),
    "… with a finer first epoch": ("C2^", lambda arm: arm.first is not None and not arm.all_gradients),
    "… and all gradients": ("C4v", lambda arm: arm.all_gradients),
    "… with a threshold": ("C3s-", lambda arm: arm.threshold > 0),
    "MS": ("C1o--", lambda arm: isinstance(arm.codec, MaskEncoded) and not arm.remembers),
    "MS, memory": ("C1s-", lambda arm: isinstance(arm.codec, MaskEncoded) and arm.remembers),
}
"""How each kind of arm is drawn, and which arms are of it."""


def _is_remembered(arm):
    return isinstance(arm.codec, EntropyMask) and arm.remembers


def plot(rows: list[dict]) -> matplotlib.figure.Figure:
    """Each setting: training loss of the last epoch, and the features' error in it, against the bits of all epochs."""
    found, names = by_arm(rows), list(dict.fromkeys(row["setting"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(names), 6.5), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for column, setting in enumerate(names):
        own = {arm: same for (of, arm), same in found.items() if of == setting and not any(r["diverged"] for r in same)}
        for line, name in enumerate(("train_loss", "error")):
            axes = panels[line, column]
            for kind, (style, belongs) in KINDS.items():
                points = sorted((total_bits(r), _of_epoch(r, name, -1)) for arm, r in own.items() if belongs(arm))
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=kind, markersize=4)
            if line == 0 and (plain := own.get(Arm(Identity(), True))):
                axes.axhline(_of_epoch(plain, name, -1), color="k", linewidth=0.8, label="none")
        panels[0, column].set_title(setting)
        panels[0, column].set_xscale("log", base=2)
        panels[1, column].set(xlabel="real bits a value, of all epochs", yscale="log")
    panels[0, 0].set(ylabel="training loss of the last epoch, nats")
    panels[1, 0].set(ylabel="error of the features, last epoch")
    study.legend(figure.axes, fontsize="x-small")
    return figure


if __name__ == "__main__":
    sys.exit(main())
