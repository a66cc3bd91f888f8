"""What a run needs before it is begun: values, memory, bytes and seconds on a link, from shapes alone.

Nothing is trained and no weights are made: the parts are traced with shapes and dtypes, and each figure is a formula
over what the library itself counts with, `RunSpec`, `split.traffic`, `Codec.payload_bytes`. `msjax plan` prints it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import build, compress, config, data, models
from msjax.split import programs
from msjax.split.make_spec import init_part
from msjax.split.payloads import Codecs, PayloadSpec
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, client_keys
from msjax.split.traffic import Traffic, epoch_traffic
from msjax.split.trees import TreeSpec, float_leaves, with_float_leaves

UNKNOWN_STEPS = 100
"""Steps of a client that stand for an epoch where nobody says how many samples there are."""


class Counts(NamedTuple):
    """Examples of a data set, over all clients."""

    train: int
    test: int


class Run(NamedTuple):
    """A run as shapes and dtypes alone.

    Attributes:
      spec: its description.
      inputs: one sample as the data set stores it.
      parts: the state of each part before the first step, by name: client, server and, U-shaped, tail.
      client: that of a client with its tail.
    """

    spec: RunSpec
    inputs: TreeSpec
    parts: dict[str, PartState]
    client: PartState

    @property
    def batch_size(self) -> int:
        """Samples of a client in a step."""
        return self.spec.schedule.full_batch_size

    @property
    def clients(self) -> int:
        """How many clients take part in each step."""
        return len(self.spec.schedule.position(0).clients)


class Needs(NamedTuple):
    """What a party has in memory for a part of the network.

    Attributes:
      trained_values, frozen_values: parameters; and what gets no gradient: statistics, and weights beside adapters.
      weight_bytes: of both.
      gradient_bytes: of one step: on the server one set for each client of the step, whose mean is taken.
      optimizer_bytes: of the optimizer's state.
      average_bytes: of what is remembered of compressed averages; see `split.averages`.
      activation_bytes: of what the forward pass of a step leaves for the backward pass; on the server for all clients
        of the step. As JAX's differentiation keeps it, before XLA fuses or recomputes any of it.
    """

    trained_values: int
    frozen_values: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int = 0
    activation_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(value for name, value in self._asdict().items() if name.endswith("_bytes"))


class Sent(NamedTuple):
    """What a codec makes of a run's messages, of one client.

    Attributes:
      up_bytes, down_bytes: of a step: the mean over an epoch, labels and averages with it.
      feature_bytes: of those, the features up.
      gradient_bytes: the gradients down (U-shaped, what the server sends).
      average_up_bytes, average_down_bytes: what keeps the clients equal.
      exact: whether these are what is sent. Of entropy-coded codecs with a number of bits it is what they aim at, of
        others the bytes before coding, which is the most.
      seconds: of a step's messages on the link.
    """

    up_bytes: float
    down_bytes: float
    feature_bytes: float
    gradient_bytes: float
    average_up_bytes: float
    average_down_bytes: float
    exact: bool
    seconds: float


class Row(NamedTuple):
    """One choice of codecs in the table."""

    name: str
    codec: str
    grad_codec: str
    sent: Sent


class Link(NamedTuple):
    """How fast messages travel, in 10⁶ bits a second of each direction; up and down do not overlap in a step.

    Attributes:
      client_mbit: of each client's own link.
      server_mbit: of the server's, which all its clients share; None where that is no limit.
    """

    client_mbit: float = 100.0
    server_mbit: float | None = None

    def seconds(self, client_bytes: float, clients: int) -> float:
        """Returns how long it takes that each of `clients` sends so many bytes, or gets them, all at once."""
        own = 8 * client_bytes / (self.client_mbit * 1e6)
        shared = 0.0 if self.server_mbit is None else 8 * client_bytes * clients / (self.server_mbit * 1e6)
        return max(own, shared)


class Plan(NamedTuple):
    """What a run needs; see `plan`.

    Attributes:
      cfg: its config.
      run: its shapes.
      counts: of its data, where they are known.
      parties: by part: client, server and, U-shaped, the tail, which is the client's, too.
      operations: floating-point ones of a step by party, of the server for all clients; as XLA counts them.
      rows: the codecs of the config first.
      link: of `Sent.seconds`.
    """

    cfg: config.Config
    run: Run
    counts: Counts | None
    parties: dict[str, Needs]
    operations: dict[str, float]
    rows: list[Row]
    link: Link

    @property
    def epoch_steps(self) -> int | None:
        """Steps of an epoch, where the data are known."""
        return None if self.counts is None else self.run.spec.schedule.epoch_steps

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        schedule, features = self.run.spec.schedule, self.run.spec.features
        return {
            "clients": schedule.clients,
            "clients_of_a_step": self.run.clients,
            "batch_size": self.run.batch_size,
            "epoch_steps": self.epoch_steps,
            "epochs": schedule.epochs,
            "features": features.to_json(),
            "parties": {name: needs._asdict() | {"bytes": needs.bytes} for name, needs in self.parties.items()},
            "operations": self.operations,
            "link": self.link._asdict(),
            "codecs": [row._asdict() | {"sent": row.sent._asdict()} for row in self.rows],
            "config": config.to_json(self.cfg),
        }


def plan(
    cfg: config.Config,
    *,
    summary: build.DataSummary | None = None,
    counts: Counts | None = None,
    codecs: dict[str, tuple[compress.Codec, compress.Codec]] | None = None,
    link: Link = Link(),  # noqa: B008
) -> Plan:
    """Returns what a run of this config needs.

    Args:
      summary: of its data; by default as `describe_data` finds it.
      counts: of its data, likewise.
      codecs: by name those of features and gradients that are set beside the config's; by default `alternatives`.
      link: on which messages travel.

    Raises:
      ValueError: the config does not work.
      data.DataError: the data set is not known by its name, and cannot be had.
    """
    cfg = build.resolved(cfg)
    if summary is None:
        summary, found = describe_data(cfg)
        counts = counts or found
    run = describe_run(cfg, summary, counts)
    parties = {name: needs(run, name) for name in run.parts}
    shown = {"as configured": None} | (alternatives(cfg) if codecs is None else codecs)
    specs = {name: run.spec if pair is None else with_codecs(run.spec, *pair) for name, pair in shown.items()}
    rows = [Row(name, str(spec.codec), str(spec.grad_codec), sent(spec, link)) for name, spec in specs.items()]
    return Plan(cfg, run, counts, parties, operations(run), rows, link)


# -- The data and the run, as shapes. ------------------------------------------------------------------------------


def describe_data(cfg: config.Config) -> tuple[build.DataSummary, Counts | None]:
    """Returns what the network has to know of a config's data and how many examples there are, None where nobody knows.

    Sets of images that are known by name and texts for a decoder need not be at hand. Others are loaded.
    """
    if cfg.model.name == models.DECODER:
        tokens = TreeSpec.of(jax.ShapeDtypeStruct((cfg.data.text_length,), np.int32))
        return build.DataSummary(tokens, tokens), None
    known = None if config.is_reference(cfg.data.name) else data.published(cfg.data.name)
    if known is not None:
        side = cfg.data.image_size
        shape = known.shape if side is None else (side, side, known.shape[-1])
        inputs, labels = (TreeSpec.of(jax.ShapeDtypeStruct(*like)) for like in ((shape, np.uint8), ((), np.int32)))
        statistics = ((0.5,) * shape[-1], (0.25,) * shape[-1])  # of the right number, which is all that counts here
        augment = data.default_augmentation(cfg.data.name)
        return build.DataSummary(inputs, labels, known.num_classes, *statistics, augment), Counts(*known[2:])
    ds = build.load_data(cfg)
    return build.DataSummary.of(ds).normalized_as(cfg.data), Counts(len(ds.train), len(ds.test))


def describe_run(cfg: config.Config, summary: build.DataSummary, counts: Counts | None) -> Run:
    """Returns the description of a run on such data; where there are no counts an epoch is of a hundred steps a client.

    Raises:
      ValueError: the config does not work, or there are more clients than samples.
    """
    if counts is not None and counts.train < cfg.clients:
        raise ValueError(f"clients must be in 1..{counts.train} (the number of examples), got {cfg.clients}")
    parts = jax.eval_shape(lambda: build.make_parts(cfg, summary))
    samples = UNKNOWN_STEPS * cfg.batch_size if counts is None else counts.train // cfg.clients
    test_samples = 0 if counts is None else counts.test
    built = build.build(cfg, summary, samples=samples, test_samples=test_samples, parts=parts, shapes_only=True)
    states = (jax.eval_shape(functools.partial(init_part, built.spec.optimizer), part) for part in parts)
    by_name = dict(zip(("client", "server", "tail"), states, strict=False))
    return Run(built.spec, summary.inputs, by_name, built.client)


# -- Memory. -------------------------------------------------------------------------------------------------------


def values(tree: Any) -> int:
    """Returns how many values a tree of arrays, or of their shapes, has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of those."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_needs(part: PartState) -> Needs:
    """Returns what a part takes by itself, without activations, with one set of gradients."""
    return Needs(
        values(part.params),
        values(part.stats),
        nbytes(part.params) + nbytes(part.stats),
        nbytes(part.params),
        nbytes(part.opt_state),
    )


def needs(run: Run, name: str) -> Needs:
    """Returns what a party has in memory for its part in a step."""
    spec, part = run.spec, run.parts[name]
    found, clients, remembered = state_needs(part), 1, ()
    if name == "server":
        clients = run.clients
        remembered = jax.eval_shape(lambda: spec.mode.server_memory(spec)) if spec.compresses_updates else ()
    elif name == "client" and spec.compresses_updates:
        remembered = jax.eval_shape(functools.partial(spec.mode.client_memory, spec), run.client)
    return found._replace(
        gradient_bytes=found.gradient_bytes * clients,
        average_bytes=nbytes(remembered),
        activation_bytes=run.batch_size * clients * sample_activation_bytes(run, name),
    )


def sample_activation_bytes(run: Run, name: str) -> int:
    """Returns how many bytes one sample more in a batch leaves for the backward pass.

    Weights, which the backward pass needs, too, do not grow with the batch and so are not in it.
    """
    two, three = (_residual_bytes(run, name, batch_size) for batch_size in (2, 3))
    return three - two


def _residual_bytes(run, name, batch_size):
    spec, part, key = run.spec, run.parts[name], jax.random.key(0)
    last = name == ("tail" if spec.u_shaped else "server")
    if name == "client":
        given = jax.eval_shape(spec.preprocess, run.inputs.batch(batch_size))
    else:
        given = (spec.outputs if name == "tail" else spec.features).batch(batch_size)

    def residuals(part, x, y):
        def forward(params, floats):
            h = x if name == "client" else with_float_leaves(x, floats)
            outputs, stats = getattr(spec, name)(params, part.stats, h, train=True, key=key)
            return (spec.task.losses(outputs, y, train=True).mean() if last else float_leaves(outputs)), stats

        floats = () if name == "client" else float_leaves(x)
        _, vjp, _ = jax.vjp(forward, part.params, floats, has_aux=True)
        return vjp

    return nbytes(jax.eval_shape(residuals, part, given, spec.labels.batch(batch_size)))


# -- Operations. ---------------------------------------------------------------------------------------------------


def operations(run: Run) -> dict[str, float]:
    """Returns each party's floating-point operations of a step, of the server for all its clients.

    As XLA counts them of the parties' own programs, codecs and optimizer with them, lowered from shapes.
    """
    spec, batch_size = run.spec, run.batch_size
    client, server = run.client, run.parts["server"]
    size = {"batch_size": batch_size}
    x, y = jax.eval_shape(spec.preprocess, run.inputs.batch(batch_size)), spec.labels.batch(batch_size)
    keys = jax.eval_shape(lambda: client_keys(jax.random.key(0), jnp.int32(0), jnp.arange(1)))
    key = jax.eval_shape(lambda keys: keys[0], keys)
    bits = () if spec.cut_bits is None else (jax.ShapeDtypeStruct((), np.float32),)
    grad_bits = () if spec.cut_seconds is None else (jax.ShapeDtypeStruct((1,), np.float32),)
    of_client, of_server = [], []

    def count(flops, program, *args, **options):
        flops.append(float(program.lower(spec, *args, **options).cost_analysis().get("flops", 0.0)))
        return jax.eval_shape(functools.partial(program, spec, **options), *args)

    payload, pending = count(of_client, programs.client_forward, client, x, key, *bits)
    if spec.u_shaped:
        present = jax.ShapeDtypeStruct((1,), bool)
        outputs, held = count(of_server, programs.server_forward, server, _stacked(payload), keys, **size)
        answer, tail, _ = count(of_client, programs.client_tail, client, _first(outputs), y, key, **size)
        args = server, held, _stacked(answer), keys, present
        _, replies = count(of_server, programs.server_backward, *args, **size)
        update = count(of_client, programs.client_backward, pending, _first(replies), tail, **size)
    else:
        args = server, _stacked(payload), _stacked(y), keys, *grad_bits
        _, replies, _ = count(of_server, programs.server_step, *args, **size)
        update = count(of_client, programs.client_backward, pending, _first(replies), **size)
    count(of_client, programs.update_part, client, update)
    return {"client": sum(of_client), "server": run.clients * sum(of_server)}


def _stacked(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), tree)


def _first(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


# -- Bytes. --------------------------------------------------------------------------------------------------------


def alternatives(cfg: config.Config) -> dict[str, tuple[compress.Codec, compress.Codec]]:
    """Returns by name the codecs of features and gradients that are set beside a config's.

    No compression; the paper's, at its rates; EntropyMask one way and both ways.
    """
    signed = cfg.model.name == models.DECODER or cfg.model.cut_before_activation or getattr(cfg.codec, "signed", False)
    none, entropy = compress.Identity(), functools.partial(compress.EntropyMask, signed=signed)
    unbiased = compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic")
    return {
        "none": (none, none),
        "QU, 3 bits": (compress.Uniform(bits=3), none),
        "SP, 4.1 %": (compress.TopK(ratio=0.95875), none),
        "MS": (compress.MaskEncoded(ratio=0.99, bits=2, signed=signed), none),
        "EntropyMask, 2 bits": (entropy(bits=2.0), none),
        "EntropyMask, 2 bits up, 1.5 down": (entropy(bits=2.0), unbiased),
    }


def with_codecs(spec: RunSpec, codec: compress.Codec, grad_codec: compress.Codec) -> RunSpec:
    """Returns the same run with these codecs at the cut, for all arrays and without a common budget."""
    changed = {"codec": Codecs(codec), "test_codec": Codecs(codec).at_inference(), "grad_codec": Codecs(grad_codec)}
    none = dict.fromkeys(("cut_bits", "cut_seconds", "link_bytes_per_second"))
    return dataclasses.replace(spec, **changed, **none, grad_kept_only=False)


def array_bytes(codec: compress.Codec, like: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of a payload; of an entropy-coded codec that aims at a number of bits, what it aims at."""
    bits = getattr(codec, "bits", None) if codec.entropy_coded else None
    return codec.payload_bytes(like) if bits is None else round(bits * like.size / 8)


def message_bytes(payload: PayloadSpec) -> int:
    """Returns the same of all arrays of a message."""
    return sum(array_bytes(codec, like) for codec, like in zip(payload.codecs, payload.likes, strict=True))


def sent(spec: RunSpec, link: Link) -> Sent:
    """Returns what a client sends and gets in a step, the mean over an epoch, and how long that takes on a link."""
    schedule = spec.schedule
    at_once = len(schedule.position(0).clients)
    traffic, client_steps = epoch_traffic(spec, 0, message_bytes), schedule.epoch_steps * at_once
    codecs = [spec.codec, spec.grad_codec, *([Codecs(spec.update_codec)] if spec.compresses_updates else [])]
    mean = {field.name: getattr(traffic, field.name) / client_steps for field in dataclasses.fields(Traffic)}
    up, down = traffic.uplink_bytes / client_steps, traffic.downlink_bytes / client_steps
    return Sent(
        up,
        down,
        mean["uplink_feature_bytes"],
        mean["downlink_gradient_bytes"] + mean["downlink_feature_bytes"],
        mean["uplink_synchronization_bytes"],
        mean["downlink_synchronization_bytes"],
        not any(codec.entropy_coded for codec in codecs),
        link.seconds(up, at_once) + link.seconds(down, at_once),
    )
