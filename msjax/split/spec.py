"""`RunSpec`: the one description of a run. States, programs, message specs and byte counts follow from it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msjax import data
from msjax.compress import Codec, Identity
from msjax.models import ModelPart, RemoteApply
from msjax.split.payloads import Codecs, PayloadSpec
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.state import PartState
from msjax.split.trees import TreeSpec, count_floats, float_leaves
from msjax.tasks import Task

Apply = Callable[..., tuple[Any, Any]]
"""A part as a pure function: `apply(params, stats, x, train=…, key=…) -> (y, new_stats)`; see `models.ModelPart`."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From inputs as a data set stores them to those of the network, on the device.

    Attributes:
      augment: one of `data.AUGMENTATIONS`, or a function from (inputs, key) to inputs, for training inputs; of the same
        dtype where they are normalised behind it.
      mean, std: for `data.normalize`; None takes inputs as they are.
      dtype: of floating inputs behind it; None leaves it.
      padding: of the augmentation "crop_flip".
      maximum: see `data.normalize`; of the inputs as the data set has them.
    """

    augment: str | Callable[[Any, jax.Array], Any] = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str | None = None
    padding: int = data.CROP_PADDING
    maximum: float | None = None

    def __call__(self, inputs: Any, key: jax.Array | None = None) -> Any:
        """Returns inputs (B, …) as the network takes them; augmented with `key`, as they are without."""
        if key is not None:
            if callable(self.augment):
                given = inputs
                inputs = self.augment(inputs, key)
                if self.mean is not None and inputs.dtype != given.dtype:
                    raise ValueError(
                        f"augment must return inputs of the dtype that it is given, {given.dtype}, got {inputs.dtype}: "
                        "whether floats are in 0..1 or 0..255 cannot be told"
                    )
            else:
                inputs = data.augment(inputs, key, kind=self.augment, padding=self.padding)
        if self.mean is not None:
            mean, std = (np.asarray(v, np.float32) for v in (self.mean, self.std))
            return data.normalize(inputs, mean, std, jnp.dtype(self.dtype or "float32"), maximum=self.maximum)
        if self.dtype is None:
            return inputs
        return jax.tree.map(self._cast, inputs)

    def _cast(self, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if self.dtype == "int32":
            raise ValueError("data.name must be a set of tokens, which the model takes, got one of numbers")
        return leaf.astype(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class RunSpec:
    """What does not change in a run. Frozen, hashable and equal by value: a static argument of jitted functions.

    Over a network a party lacks the functions that are the other's; what is exchanged follows from the specs alone,
    which both have.

    Attributes:
      client, server, tail: the parts' functions; `tail` only where the last layers stay with the client (U-shaped).
      features: what the client sends, of one sample.
      outputs: what the server returns for it, of one sample: the network's outputs or, U-shaped, the tail's features.
      tail_outputs: U-shaped, the network's outputs of one sample.
      labels: of one sample.
      client_update_values: floating values of the client part's weights and statistics, which are averaged.
      client_state_values: the same with the optimizer's state: what is handed on from client to client.
      client_statistic_values: how many of those averaged values are statistics.
      codec: of the features, up (and, U-shaped, those for the tail, down).
      grad_codec: of their gradients.
      test_codec: of test features.
      update_codec: of what keeps the clients' parts equal, both ways; see `averages`.
      optimizer: of every part.
      task: loss and metrics.
      preprocess: of the inputs, at the client.
      schedule: the order of exchanges.
    """

    client: Apply | None
    server: Apply | None
    tail: Apply | None
    features: TreeSpec
    outputs: TreeSpec
    tail_outputs: TreeSpec | None
    labels: TreeSpec
    client_update_values: int
    client_state_values: int
    client_statistic_values: int
    codec: Codecs
    grad_codec: Codecs
    test_codec: Codecs
    update_codec: Codec
    optimizer: optax.GradientTransformation
    task: Task
    preprocess: Preprocess
    schedule: Schedule

    @property
    def mode(self) -> Any:
        """How the clients work together."""
        return self.schedule.mode

    @property
    def u_shaped(self) -> bool:
        """Whether the last layers and the labels stay with the clients."""
        return self.schedule.u_shaped

    @functools.cached_property
    def _values(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def _hash(self):
        return hash(self._values)

    # Found once: a spec is looked up in every call of a jitted function.
    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, RunSpec) and self._values == other._values)

    def describe(self) -> dict[str, Any]:
        """Returns what parties must agree on, as JSON-ready values by name."""
        schedule = self.schedule
        counts = ("clients", "samples", "test_samples", "batch_size", "epochs", "test_every", "u_shaped")
        updates = {}
        if self.compresses_updates:  # other runs are described as they were before there was this
            updates = {"update_codec": str(self.update_codec), "client statistics": self.client_statistic_values}
        return (
            {
                "features": self.features.to_json(),
                "outputs": self.outputs.to_json(),
                "labels": self.labels.to_json(),
                "client values": self.client_update_values,
                "client state values": self.client_state_values,
                "task": self.task.name,
                "metrics": [name for name, _ in self.task.metrics],
                "codec": str(self.codec),
                "grad_codec": str(self.grad_codec),
                "test_codec": str(self.test_codec),
                "mode": repr(schedule.mode),
            }
            | updates
            | {name: getattr(schedule, name) for name in counts}
        )

    # -- What messages carry. ---------------------------------------------------------------------------------------

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def feature_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of a training batch's features, as the client sends them."""
        return PayloadSpec.of_features(self.features, self.codec, batch_size)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def gradient_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of the gradients of those features, as the server sends them."""
        return PayloadSpec.of_gradients(self.features, self.grad_codec, batch_size)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def tail_feature_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of what the tail gets of a training batch."""
        return PayloadSpec.of_features(self.outputs, self.tail_codec, batch_size)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def tail_gradient_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of the gradients of those, as the client sends them."""
        return PayloadSpec.of_gradients(self.outputs, Codecs(self.grad_codec.default), batch_size)

    @property
    def tail_codec(self) -> Codecs:
        """The codecs of the features for the tail: the default one, as names are those of the first cut's arrays."""
        return Codecs(self.codec.default)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def test_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of a test batch's features."""
        return PayloadSpec.of_features(self.features, self.test_codec, batch_size)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def tail_test_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of what the tail gets of a test batch."""
        return PayloadSpec.of_features(self.outputs, Codecs(self.test_codec.default), batch_size)

    def up(self, exchange: Exchange) -> PayloadSpec | None:
        """Returns what a client sends in an exchange; None where it has no payload."""
        match exchange.phase:
            case Phase.FEATURES:
                return self.feature_payload(self.schedule.batch_size_of(exchange))
            case Phase.GRADIENT:
                return self.tail_gradient_payload(self.schedule.batch_size_of(exchange))
            case Phase.TEST:
                return self.test_payload(self.schedule.batch_size_of(exchange))
            case Phase.RESULT:
                return None
        return self.mode.up(self, exchange)

    def down(self, exchange: Exchange) -> PayloadSpec | None:
        """Returns what the server answers in an exchange; None where it has no payload."""
        match exchange.phase:
            case Phase.FEATURES if self.u_shaped:
                return self.tail_feature_payload(self.schedule.batch_size_of(exchange))
            case Phase.FEATURES | Phase.GRADIENT:
                return self.gradient_payload(self.schedule.batch_size_of(exchange))
            case Phase.TEST if self.u_shaped:
                return self.tail_test_payload(self.schedule.batch_size_of(exchange))
            case Phase.TEST | Phase.RESULT:
                return None
        return self.mode.down(self, exchange)

    def part_payload(self) -> PayloadSpec:
        """Returns the spec of a client's part with its optimizer state, as it is handed on.

        With it goes what the changes of parts are counted from, where the mode compresses these.
        """
        reference = self.compresses_updates and self.mode.averages_parts
        return PayloadSpec.of_vector(self.client_state_values + reference * self.client_update_values)

    @property
    def compresses_updates(self) -> bool:
        """Whether averages go through a codec, with error feedback; see `averages`."""
        together = self.schedule.clients > 1 and not self.mode.one_at_a_time and self.client_update_values > 0
        return together and self.update_codec != Identity()

    @functools.cached_property
    def _average_payload(self):
        if not self.compresses_updates:
            return PayloadSpec.of_vector(self.client_update_values)
        sizes = (self.client_update_values - self.client_statistic_values, self.client_statistic_values)
        return PayloadSpec.of_vectors([size for size in sizes if size], self.update_codec)

    def average_payload(self) -> PayloadSpec:
        """Returns the spec of what a client sends to be averaged, and of the server's answer."""
        return self._average_payload

    @property
    def sends_labels(self) -> bool:
        """Whether labels go to the server."""
        return not self.u_shaped

    @functools.cached_property
    def metric_sums_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each metric's sums."""
        outputs = self.outputs if self.tail_outputs is None else self.tail_outputs
        return self.task.check(outputs.batch(2), self.labels.batch(2))


def make_spec(
    parts: tuple[ModelPart, ...],
    *,
    client_values: tuple[int, int, int] | None = None,
    inputs: TreeSpec,
    labels: TreeSpec,
    schedule: Schedule,
    task: Task,
    optimizer: optax.GradientTransformation,
    codec: Codecs,
    grad_codec: Codecs,
    test_codec: Codecs,
    update_codec: Codec,
    preprocess: Preprocess,
) -> RunSpec:
    """Returns the description of a run, checked on shapes alone.

    Args:
      parts: client, server and, where `schedule.u_shaped`, tail; arrays, or their shapes and dtypes. Of a part that
        another party has its `apply` is a `models.RemoteApply`.
      client_values: how many floating values the client's part has without and with the optimizer's state, and how
        many of them are statistics; needed where it is another party's.
      inputs: one sample as the data set stores it.

    Raises:
      TypeError: `update_codec` is no codec.
      ValueError: a part does not take what the one before returns, loss or metrics do not fit, a codec is named for an
        array that is not there, `update_codec` does not fit the mode, or `grad_codec` or `update_codec` is not signed.
    """
    names = ("client", "server", "tail")[: len(parts)]
    batch = 2
    key = jax.random.key(0)
    x = _shapes_of("preprocessing", "what the data set stores", lambda x: preprocess(x, key), inputs.batch(batch))
    found, before = [], "the data"
    for name, part in zip(names, parts, strict=True):
        if isinstance(part.apply, RemoteApply):
            y = TreeSpec(*part.apply.outputs).batch(batch)
        else:
            y = _part_outputs(name, part, x, before)
        found.append(TreeSpec.of_batch(y, batch, f"what {name} returns"))
        for path, leaf in jax.tree_util.tree_leaves_with_path(part.params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"{name} must have floating parameters, got {leaf.dtype} at {where!r}: see as_part")
        x, before = y, name
    features, outputs = found[0], found[1]
    if not float_leaves(features.batch(1)):
        raise ValueError(f"client must return at least one floating array to be compressed, got {features}")
    if client_values is None:
        client = jax.eval_shape(lambda: init_part(optimizer, parts[0], *parts[2:]))
        averaged = count_floats((client.params, client.stats))
        client_values = averaged, count_floats(client), count_floats(client.stats)
    here = [None if isinstance(part.apply, RemoteApply) else part.apply for part in parts]
    update_values, state_values, statistic_values = client_values
    spec = RunSpec(
        client=here[0],
        server=here[1],
        tail=here[2] if len(parts) > 2 else None,
        features=features,
        outputs=outputs,
        tail_outputs=found[2] if len(parts) > 2 else None,
        labels=labels,
        client_update_values=update_values,
        client_state_values=state_values,
        client_statistic_values=statistic_values,
        codec=codec,
        grad_codec=grad_codec,
        test_codec=test_codec,
        update_codec=update_codec,
        optimizer=optimizer,
        task=task,
        preprocess=preprocess,
        schedule=schedule,
    )
    _check_update_codec(update_codec, schedule)
    for one in grad_codec.all:
        _check_signed("grad_codec", one)
    codec.for_tree(features)
    grad_codec.for_tree(features, "grad_codec")
    _ = spec.metric_sums_like
    task.check_sums(found[-1].batch(3), labels.batch(3))
    return spec


def _check_signed(name, codec):
    """Gradients have both signs, of which one would be lost."""
    if not getattr(codec, "signed", True):
        raise ValueError(f"{name} must have signed=True, as gradients are of both signs, got {codec}")


def _check_update_codec(codec, schedule):
    if not isinstance(codec, Codec):
        raise TypeError(f"update_codec must be a codec of msjax.compress, got {codec!r}")
    if codec == Identity():
        return
    _check_signed("update_codec", codec)
    try:
        codec.payload_like(jax.ShapeDtypeStruct((1,), np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"update_codec must be one of float32 vectors, got {codec}: {error}") from None
    if schedule.mode.one_at_a_time:
        raise ValueError(f"update_codec must be Identity() in sequential mode, which averages nothing, got {codec}")
    if getattr(codec, "granularity", "tensor") != "tensor":
        raise ValueError(f'update_codec must have granularity="tensor", as averages have no samples, got {codec}')


def _part_outputs(name, part, x, before):
    def run(params, stats, x):
        return part.apply(params, stats, x, train=True, key=jax.random.key(0))

    y, stats = _shapes_of(name, f"what {before} returns", run, part.params, part.stats, x)
    expected, got = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (part.stats, stats))
    if expected != got:
        raise ValueError(f"{name} must return statistics of the structure that it gets, {expected}; got {got}")
    return y


def _shapes_of(name, what, function, *args):
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        shapes, detail = TreeSpec.of(args[-1]), (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{name} must take {what}, {shapes}, but raised {type(error).__name__}: {detail}") from error


def init_part(optimizer: optax.GradientTransformation, *parts: ModelPart) -> PartState:
    """Returns what a party that has these parts of the model starts with.

    Raises:
      ValueError: two parts have arrays of one name.
    """
    params, stats = {}, {}
    if len(parts) == 1:
        params, stats = parts[0].params, parts[0].stats
    else:
        params, stats = merge_arrays(*(part.params for part in parts)), merge_arrays(*(part.stats for part in parts))
    return PartState(params, stats, optimizer.init(params))


def merge_arrays(*dicts: dict[str, Any]) -> dict[str, Any]:
    """Returns the union of dicts of arrays whose names must differ.

    Raises:
      ValueError: a name is in two of them.
    """
    merged: dict[str, Any] = {}
    for arrays in dicts:
        if twice := sorted(merged.keys() & arrays.keys()):
            raise ValueError(f"client and tail must have arrays of different names, got {twice[0]!r} in both")
        merged |= arrays
    return merged
