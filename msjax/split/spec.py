"""`RunSpec`: the one description of a run. States, programs, message specs and byte counts follow from it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msjax import data
from msjax.compress import Codec, Identity, SmallFloat
from msjax.models import constants_of
from msjax.split.payloads import Codecs, PayloadSpec
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.trees import TreeSpec
from msjax.tasks import Task

Apply = Callable[..., tuple[Any, Any]]
"""A part as a pure function: `apply(params, stats, x, train=…, key=…) -> (y, new_stats)`; see `models.ModelPart`."""

_STATISTICS = SmallFloat(exponent_bits=5, mantissa_bits=2)  # an eighth of a change at most, over 33 octaves


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From inputs as a data set stores them to those of the network, on the device.

    Attributes:
      augment: of training batches: one of `data.AUGMENTATIONS`; or a function from (inputs, key) to inputs; or, where
        it has three parameters without a default, from (inputs, labels, key) to (inputs, labels). What it returns has
        the dtype of what it is given: labels always, and their shapes; inputs where they are normalised behind it.
      mean, std: for `data.normalize`; None takes inputs as they are.
      dtype: of floating inputs behind it; None leaves it.
      padding: of the augmentation "crop_flip".
      maximum: see `data.normalize`; of the inputs as the data set has them.
    """

    augment: str | Callable[..., Any] = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str | None = None
    padding: int = data.CROP_PADDING
    maximum: float | None = None

    @property
    def takes_labels(self) -> bool:
        """Whether `augment` is a function that changes labels, too."""
        return callable(self.augment) and _required(self.augment) == 3

    def augmented(self, inputs: Any, labels: Any, key: jax.Array) -> tuple[Any, Any]:
        """Returns a training batch: inputs (B, …) as the network takes them, and labels (B, …).

        Raises:
          ValueError: `augment` changed a dtype or the labels' shapes.
        """
        if not callable(self.augment):
            return self(data.augment(inputs, key, kind=self.augment, padding=self.padding)), labels
        given, like = inputs, TreeSpec.of(labels)
        if self.takes_labels:
            found = self.augment(inputs, labels, key)
            if not isinstance(found, tuple) or len(found) != 2:
                raise ValueError(f"augment must return (inputs, labels) where it is given labels, got {type(found)}")
            inputs, labels = found
        else:
            inputs = self.augment(inputs, key)
        if (found := TreeSpec.of(labels)) != like:
            raise ValueError(
                f"augment must return labels of the shapes and dtypes that it is given, {like}, got {found}"
            )
        if self.mean is not None and inputs.dtype != given.dtype:
            raise ValueError(
                f"augment must return inputs of the dtype that it is given, {given.dtype}, got {inputs.dtype}: "
                "whether floats are in 0..1 or 0..255 cannot be told"
            )
        return self(inputs), labels

    def check(self, labels: TreeSpec) -> None:
        """Raises ValueError where the augmentation moves pixels, and labels have places that would stay."""
        moves = self.augment in data.AUGMENTATIONS and self.augment != "none"
        if moves and any(len(leaf.shape) > 1 for leaf in labels.leaves):
            raise ValueError(
                f'augment must be "none", or a function of (inputs, labels, key), for labels of {labels} each, whose '
                f"places would not move with the image, got {self.augment!r}"
            )

    def __call__(self, inputs: Any) -> Any:
        """Returns inputs (B, …) as the network takes them, not augmented."""
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


def _required(function):
    """How many positional arguments a function needs; 0 where that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some that are not written in Python
        return 0
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


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
      grad_kept_only: whether gradients are sent only where the features were kept; see `Codec.take_kept`.
      test_codec: of test features.
      update_codec: of what keeps the clients' parts equal, both ways; see `averages`. Where whole parts are
        handed on, of these.
      cut_bits: real bits a value of the features, up and down together; None leaves it to the codecs. See `budget`.
      cut_seconds: the time that a step's messages may take on a client's link; None for any.
      link_bytes_per_second: the speed of every client's link, as far as it is known before it is measured.
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
    grad_kept_only: bool
    test_codec: Codecs
    update_codec: Codec
    cut_bits: float | None
    cut_seconds: float | None
    link_bytes_per_second: float | None
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

    @property
    def cut_is_coded(self) -> bool:
        """Whether the bytes of what crosses the cuts depend on values: a codec of it is entropy-coded."""
        return self.codec.entropy_coded or self.grad_codec.entropy_coded

    @functools.cached_property
    def client_constants(self) -> frozenset[str]:
        """The names of those of the clients' `stats` that never change, such as weights beside adapters."""
        return constants_of(self.client) | constants_of(self.tail)

    @functools.cached_property
    def server_constants(self) -> frozenset[str]:
        """The same of the server's."""
        return constants_of(self.server)

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
            updates["statistics codec"] = str(self.statistics_codec)
        if self.compresses_parts:
            updates["update_codec"] = str(self.update_codec)
        updates |= {"grad_kept_only": True} if self.grad_kept_only else {}
        updates |= {"own_tests": True} if schedule.own_tests else {}
        for name in ("cut_bits", "cut_seconds", "link_bytes_per_second"):
            if getattr(self, name) is not None:
                updates[name] = getattr(self, name)
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
        kept_by = self.codec if self.grad_kept_only else None
        return PayloadSpec.of_gradients(self.features, self.grad_codec, batch_size, kept_by)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def tail_feature_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of what the tail gets of a training batch."""
        return PayloadSpec.of_features(self.outputs, self.tail_codec, batch_size)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def tail_gradient_payload(self, batch_size: int) -> PayloadSpec:
        """Returns the spec of the gradients of those, as the client sends them."""
        kept_by = self.tail_codec if self.grad_kept_only else None
        return PayloadSpec.of_gradients(self.outputs, Codecs(self.grad_codec.default), batch_size, kept_by)

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
        """Returns the spec of a client's part with its optimizer state, as one brings it for another that was dropped.

        With it goes what the changes of parts are counted from, where the mode compresses these.
        """
        reference = self.compresses_updates and self.mode.own_parts
        return PayloadSpec.of_vector(self.client_state_values + reference * self.client_weight_values)

    @property
    def client_weight_values(self) -> int:
        """How many of the averaged values are weights."""
        return self.client_update_values - self.client_statistic_values

    @property
    def statistics_codec(self) -> Codec:
        """The codec of the statistics in an average where this is compressed; see `averages`.

        A byte each with an error relative to each change, in every step; float32 where they come once a round.
        """
        return Identity() if self.mode.own_parts else _STATISTICS

    @property
    def compresses_updates(self) -> bool:
        """Whether averages go through a codec, with error feedback; see `averages`."""
        together = self.schedule.clients > 1 and not self.mode.hands_parts_on(self.schedule)
        return together and self.client_update_values > 0 and self.update_codec != Identity()

    @property
    def compresses_parts(self) -> bool:
        """Whether parts that are handed on go through `update_codec`."""
        return self.mode.hands_parts_on(self.schedule) and self.update_codec != Identity()

    def handed_payload(self) -> PayloadSpec:
        """Returns the spec of a part that is handed on: one vector, in a list where it is compressed."""
        if not self.compresses_parts:
            return self.part_payload()
        return PayloadSpec.of_vectors([(self.client_state_values, self.update_codec)])

    @functools.cached_property
    def average_payload(self) -> PayloadSpec:
        """What a client sends to be averaged, and the server answers."""
        if not self.compresses_updates:
            return PayloadSpec.of_vector(self.client_update_values)
        weights = self.client_weight_values, self.update_codec
        statistics = self.client_statistic_values, self.statistics_codec
        return PayloadSpec.of_vectors([vector for vector in (weights, statistics) if vector[0]])

    @property
    def sends_labels(self) -> bool:
        """Whether labels go to the server."""
        return not self.u_shaped

    @functools.cached_property
    def metric_sums_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each metric's sums."""
        outputs = self.outputs if self.tail_outputs is None else self.tail_outputs
        return self.task.check(outputs.batch(2), self.labels.batch(2))
