"""The parties of split learning as they are apart: what a client and the server do with each exchange's messages.

No network is in here: `run` lets all of them talk in one program, `msjax.transport` over a network. Both call the same
jitted functions on the same arrays, so they compute the same bits. What `simulate` computes in one fused program agrees
with them to float32 rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import data, simulate, step
from msjax.compress import Codec, Identity
from msjax.protocol import Exchange, Phase, Plan


class Message(NamedTuple):
    """What one party tells the other in an exchange; what an exchange has no use for is None."""

    payload: tuple | None = None
    """A codec's payload, in the form that `Shapes` says."""
    labels: np.ndarray | None = None
    """int32 (B,)"""
    sums: simulate.Sums | None = None
    """Where the labels are the client's: loss and counts of its batch, or of all its test batches."""


class Form(NamedTuple):
    """Of a payload: the codec that made it and what it decodes to."""

    codec: Codec
    like: jax.ShapeDtypeStruct


class Shapes:
    """What is sent in each exchange, from shapes alone: both ends know it, and a message that differs is wrong.

    Args:
      test_codec: of test features, or None to send them as they are.
      client, server: the halves' states, or their shapes.
      sample: shape and dtype of one sample at the client's input.
    """

    def __init__(self, plan: Plan, setup: step.Setup, test_codec: Codec | None, client: Any, server: Any, sample: Any):
        self.plan, self._setup, self._test_codec = plan, setup, test_codec or Identity()
        self._sample = sample
        self._client, self._server = (jax.eval_shape(lambda half: half, half) for half in (client, server))
        update = (self._client.params, self._client.stats)
        self._update = _floats(update)
        self._half = _floats(self._client)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def features(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the features of a batch."""
        x = jax.ShapeDtypeStruct((batch, *self._sample.shape), self._sample.dtype)
        return step.features_like(self._setup, self._client, x)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def head_features(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what the head gets of a batch."""
        return step.head_features_like(self._setup, self._server, self.features(batch))

    def half(self) -> Form:
        """A client's half with its momentum, as it is handed on."""
        return _vector_form(self._half)

    def batch(self, exchange: Exchange) -> int:
        """Number of samples of each client in an exchange of features."""
        if exchange.phase == Phase.TEST:
            return test_index(self.plan, exchange.number).shape[1]
        place = self.plan.place(exchange.step)
        return place.stop - place.start

    def up(self, exchange: Exchange) -> Form | None:
        """What a client sends."""
        if exchange.phase == Phase.FEATURES:
            return Form(self._setup.codec, self.features(self.batch(exchange)))
        if exchange.phase == Phase.GRADIENT:
            return Form(self._setup.grad_codec, self.head_features(self.batch(exchange)))
        if exchange.phase == Phase.TEST:
            return Form(self._test_codec, self.features(self.batch(exchange)))
        sizes = {Phase.AVERAGE: self._update, Phase.GIVE: self._half}
        return _vector_form(sizes[exchange.phase]) if exchange.phase in sizes else None

    def down(self, exchange: Exchange) -> Form | None:
        """What the server answers. Of the halves that are handed on, there is none at the very first."""
        if exchange.phase == Phase.FEATURES and self._setup.head is not None:
            return Form(self._setup.codec, self.head_features(self.batch(exchange)))
        if exchange.phase in (Phase.FEATURES, Phase.GRADIENT):
            return Form(self._setup.grad_codec, self.features(self.batch(exchange)))
        if exchange.phase == Phase.TEST and self._setup.head is not None:
            return Form(self._test_codec, self.head_features(self.batch(exchange)))
        if exchange.phase == Phase.TAKE and exchange.step > 0:
            return self.half()
        return _vector_form(self._update) if exchange.phase == Phase.AVERAGE else None


def test_index(plan: Plan, number: int) -> np.ndarray:
    """int32 (K, B): the test samples of the clients in test round `number`."""
    return _test_calls(plan)[number][0]


@functools.lru_cache(maxsize=4)
def _test_calls(plan):
    return plan.test_calls()


class Programs:
    """The jitted functions of a run; clients of one program share them, so that each is compiled once.

    Args:
      numpy_encoder: clients encode with NumPy, with the same bits, and not within the jitted functions.

    Raises:
      ValueError: `numpy_encoder` with a codec that is random.
    """

    def __init__(
        self,
        setup: step.Setup,
        preprocess: simulate.Preprocess,
        test_codec: Codec | None,
        seed: int,
        *,
        numpy_encoder: bool = False,
    ):
        self.setup, self.test_codec = setup, test_codec or Identity()
        train_key, test_key = simulate.train_key(seed), simulate.test_key(seed)

        def keys(testing, at, clients):
            key = jax.random.fold_in(test_key, at) if testing else train_key
            return simulate.client_keys(key, jnp.int32(0) if testing else at, clients)

        def one_key(testing, at, client):
            return keys(testing, at, client[None])[0]

        # Jitted, since one by one the operations on keys take longer than a small net's step.
        self._keys, self._one_key = (jax.jit(f, static_argnums=0) for f in (keys, one_key))

        def preprocessed(inputs, key):
            return preprocess(inputs, step.split_key(key).augment)

        def test_forward(codec, state, inputs, key):
            return (step.infer_features(setup.client, codec, state, preprocess(inputs), key),)

        def forward(codec, *args):
            return step.client_forward(dataclasses.replace(setup, codec=codec), *args)

        def client_head(codec, *args, **kwargs):
            return step.client_head(dataclasses.replace(setup, grad_codec=codec), *args, **kwargs)

        def test_server(state, payload, key, features):
            u_shaped = setup.head is not None
            return step.infer_outputs(setup.server, self.test_codec, state, payload, key, features, to_head=u_shaped)

        def test_head(state, payload, y, features):
            return step.score(step.infer_logits(setup.head, self.test_codec, state, payload, features), y)

        def with_setup(fun, **static):
            return jax.jit(functools.partial(fun, setup), **static)

        def encoding(fun, codec, **static):
            """`fun` of a codec, jitted, to (payload, …)."""
            if not numpy_encoder:
                return jax.jit(functools.partial(fun, codec), **static)
            codec.encode_numpy(np.zeros((1, 1), np.float32))  # raises where it cannot
            dense = jax.jit(functools.partial(fun, Identity()), **static)

            def encode(*args, **kwargs):
                payload, *rest = dense(*args, **kwargs)
                return codec.encode_numpy(np.asarray(payload.values)), *rest

            return encode

        self.preprocess = jax.jit(preprocessed)
        self.forward = encoding(forward, setup.codec)
        self.client_head = encoding(client_head, setup.grad_codec, static_argnames="features")
        self.client_backward = with_setup(step.client_backward, static_argnames="features")
        self.client_update = with_setup(step.client_update)
        self.server_step = with_setup(step.server_step, static_argnames="features")
        self.server_forward = with_setup(step.server_forward, static_argnames="features")
        self.server_backward = with_setup(step.server_backward, static_argnames="features")
        self.test_forward = encoding(test_forward, self.test_codec)
        self.test_server = jax.jit(test_server, static_argnames="features")
        self.test_head = jax.jit(test_head, static_argnames="features")
        self.score = jax.jit(step.score)
        self.mean = jax.jit(lambda vectors: vectors.mean(0))
        self.to_vector = jax.jit(_to_vector)
        self.from_vector = jax.jit(_from_vector)

    def keys(self, exchange: Exchange, clients: tuple[int, ...]) -> jax.Array:
        """The keys of these clients in an exchange (K,)."""
        return self._keys(*self._where(exchange), np.asarray(clients, np.int32))

    def key(self, exchange: Exchange, client: int) -> jax.Array:
        """The key of one client in an exchange."""
        return self._one_key(*self._where(exchange), np.int32(client))

    def _where(self, exchange):
        testing = exchange.phase == Phase.TEST
        return testing, np.int32(exchange.number if testing else exchange.step)


NONE = simulate.Sums(0.0, 0, 0, 0)


class ClientData(NamedTuple):
    """What a client has: inputs (N, …) as a `data.Dataset` has them and int32 labels (N,), and the same to test on."""

    inputs: np.ndarray
    labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


_WITH_FEATURES = (Phase.FEATURES, Phase.GRADIENT)


class _Weights(NamedTuple):
    """A half without its momentum."""

    params: Any
    stats: Any


class Client:
    """One client: its data, its half of the network, and its part in every exchange."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        shapes: Shapes,
        programs: Programs,
        state: step.HalfState,
        own: ClientData,
        seed: int,
    ):
        self.number, self.state = number, state
        self._plan, self.shapes, self._programs, self._data, self._seed = plan, shapes, programs, own, seed
        self.begin()

    @property
    def keeps_state(self) -> bool:
        """Whether its state outlives a turn; if not it is handed one at each turn's beginning."""
        return not self._plan.sequential or self._plan.clients == 1

    @property
    def keeps_result(self) -> bool:
        """Whether it has the trained half at the end: in turns the last client alone."""
        return self.number in self._plan.test_clients()

    @property
    def end(self) -> int:
        """The number of steps of the run."""
        return self._plan.total_steps

    def needs_state(self, at: int) -> bool:
        """Whether the half that it has before step `at` counts."""
        return self.keeps_result if at == self.end else self.keeps_state

    def script(self, start: int = 0) -> Iterator[Exchange]:
        """Yields this client's exchanges from step `start` on."""
        return (exchange for exchange in self._plan.exchanges(start) if self.number in exchange.clients)

    def begin(self) -> None:
        """Forgets an exchange under way, to begin at another step."""
        self._pending = self._update = self._outgoing = self._head_update = None
        self._prepared: tuple[Exchange, Any] | None = None
        self._tested = []

    def may_checkpoint(self, exchange: Exchange, every: int) -> bool:
        """Whether the state before this exchange is to be saved."""
        if exchange.phase != Phase.FEATURES or not self.keeps_state:
            return False
        return self._plan.may_checkpoint(exchange.step, every)

    def half(self) -> tuple:
        """Its half with momentum as the payload that `Shapes.half` describes."""
        return (self._programs.to_vector(self.state),)

    def adopt(self, payload: tuple, at: int) -> None:
        """Goes on with the half of another client, as it is before step `at`."""
        self.state = _with_count(self._programs.from_vector(payload[0], self.state), at)

    def prepare(self, exchange: Exchange) -> None:
        """Does in advance what of a coming exchange does not depend on the state: the batch of a training step."""
        if exchange.phase == Phase.FEATURES and (self._prepared is None or self._prepared[0] != exchange):
            key = self._key(exchange)
            self._prepared = exchange, (self._programs.preprocess(self._inputs(exchange), key), key)

    def send(self, exchange: Exchange) -> Message:
        """The message of this client for an exchange that it takes part in."""
        match exchange.phase:
            case Phase.FEATURES:
                self.prepare(exchange)
                x, key = self._prepared[1]
                payload, self._pending = self._programs.forward(self.state, x, key)
                return Message(payload, self._sent_labels(exchange))
            case Phase.GRADIENT:
                return self._outgoing
            case Phase.AVERAGE:
                return Message((self._programs.to_vector(self._averaged()),))
            case Phase.GIVE:
                return Message(self.half())
            case Phase.TEST:
                (payload,) = self._programs.test_forward(self.state, self._inputs(exchange), self._key(exchange))
                return Message(payload, self._sent_labels(exchange))
            case Phase.RESULT:
                tested, self._tested = self._tested, []
                return Message(sums=total(tested))
        return Message()

    def receive(self, exchange: Exchange, message: Message) -> None:
        """Goes on with the server's answer."""
        features = self.shapes.features(self.shapes.batch(exchange)) if exchange.phase in _WITH_FEATURES else None
        head = self._programs.setup.head is not None
        match exchange.phase:
            case Phase.FEATURES if head:
                form = self.shapes.down(exchange)
                labels = self._labels(exchange)
                payload, self._head_update, info = self._programs.client_head(
                    self.state, message.payload, labels, self._key(exchange), features=form.like
                )
                self._outgoing = Message(payload, sums=sums_of(info, len(labels)))
            case Phase.FEATURES | Phase.GRADIENT:
                more = {"head": self._head_update} if head else {}
                update = self._programs.client_backward(self._pending, message.payload, features=features, **more)
                self._pending = None
                if self._plan.mode.kind == "parallel" and self._plan.averages(exchange.step):
                    self._update = update
                else:
                    self.state = self._programs.client_update(self.state, update)
            case Phase.AVERAGE:
                mean = self._programs.from_vector(message.payload[0], self._averaged())
                if self._plan.mode.kind == "parallel":
                    self.state = self._programs.client_update(self.state, mean)
                    self._update = None
                else:
                    self.state = self.state._replace(params=mean.params, stats=mean.stats)
            case Phase.TAKE if message.payload is not None:
                self.adopt(message.payload, exchange.step)
            case Phase.TEST if head:
                form = self.shapes.down(exchange)
                labels = self._labels(exchange)
                info = self._programs.test_head(self.state, message.payload, labels, features=form.like)
                self._tested.append(sums_of(info, len(labels)))

    def _averaged(self):
        """What goes into an average: this step's update, or the half without its momentum."""
        return self._update if self._plan.mode.kind == "parallel" else _Weights(self.state.params, self.state.stats)

    def _key(self, exchange):
        return self._programs.key(exchange, self.number)

    def _index(self, exchange):
        """Which samples an exchange is about."""
        if exchange.phase == Phase.TEST:
            return test_index(self._plan, exchange.number)[exchange.clients.index(self.number)]
        place = self._plan.place(exchange.step)
        return self._order(place.epoch)[place.start : place.stop]

    def _inputs(self, exchange):
        inputs = self._data.test_inputs if exchange.phase == Phase.TEST else self._data.inputs
        return inputs[self._index(exchange)]

    def _labels(self, exchange):
        labels = self._data.test_labels if exchange.phase == Phase.TEST else self._data.labels
        return labels[self._index(exchange)]

    def _sent_labels(self, exchange):
        return None if self._programs.setup.head is not None else self._labels(exchange)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch):
        pool = np.arange(len(self._data.labels), dtype=np.int32)
        return data.epoch_order(pool, self._plan.samples, seed=self._seed, epoch=epoch, client=self.number)


class Server:
    """The server: its half, what it is handed to pass on, and the sums of the epoch under way."""

    def __init__(self, plan: Plan, shapes: Shapes, programs: Programs, state: step.HalfState):
        self.state = state
        self.relayed = None
        self.train = self.test = NONE
        self._plan, self._shapes, self._programs = plan, shapes, programs
        self._pending = None

    @property
    def relays(self) -> bool:
        """Whether it has to have a half to hand on, once training has begun."""
        return self._plan.sequential and self._plan.clients > 1

    @property
    def relayed_like(self) -> np.ndarray:
        """Something of the form of `relayed`."""
        form = self._shapes.half()
        return np.zeros(form.like.shape, np.float32)

    def handle(self, exchange: Exchange, messages: dict[int, Message]) -> dict[int, Message]:
        """The answer to each client that is in `messages`: all of the exchange's, or those that came in time."""
        clients = tuple(sorted(messages))
        ordered = [messages[client] for client in clients]
        answers = self._answers(exchange, clients, ordered)
        return dict(zip(clients, answers, strict=True))

    def _answers(self, exchange, clients, messages):
        match exchange.phase:
            case Phase.FEATURES:
                form = self._shapes.up(exchange)
                keys = self._programs.keys(exchange, clients)
                payloads = _stack([m.payload for m in messages])
                if self._programs.setup.head is not None:
                    answers, pending = self._programs.server_forward(self.state, payloads, keys, features=form.like)
                    self._pending = pending, clients
                else:
                    y = np.stack([m.labels for m in messages])
                    self.state, answers, info = self._programs.server_step(
                        self.state, payloads, y, keys, features=form.like
                    )
                    self.train = total([self.train, sums_of(info, y.size)])
                return _unstack(answers, len(clients))
            case Phase.GRADIENT:
                form = self._shapes.up(exchange)
                (pending, everyone), self._pending = self._pending, None
                keys = self._programs.keys(exchange, everyone)
                # Of those who sent features some may have been dropped since: theirs is anyone's payload, masked.
                here, came = np.isin(everyone, clients), dict(zip(clients, messages, strict=True))
                payloads = _stack([came.get(client, messages[0]).payload for client in everyone])
                self.state, answers = self._programs.server_backward(
                    self.state, pending, payloads, keys, here, features=form.like
                )
                self.train = total([self.train, *(m.sums for m in messages)])
                answers = dict(zip(everyone, _unstack(answers, len(everyone)), strict=True))
                return [answers[client] for client in clients]
            case Phase.AVERAGE:
                mean = self._programs.mean(np.stack([np.asarray(m.payload[0]) for m in messages]))
                return [Message((mean,))] * len(messages)
            case Phase.TAKE:
                answer = Message() if self.relayed is None else Message((self.relayed,))
                return [answer]
            case Phase.GIVE:
                self.relayed = np.asarray(messages[0].payload[0])
            case Phase.TEST:
                return [self._test(exchange, client, m) for client, m in zip(clients, messages, strict=True)]
            case Phase.RESULT:
                self.test = total([self.test, *(m.sums for m in messages)])
        return [Message()] * len(messages)

    def _test(self, exchange, client, message):
        form = self._shapes.up(exchange)
        key = self._programs.key(exchange, client)
        out = self._programs.test_server(self.state, message.payload, key, features=form.like)
        if self._programs.setup.head is not None:
            return Message(out)
        info = self._programs.score(out, message.labels)
        self.test = total([self.test, sums_of(info, len(message.labels))])
        return Message()


def run(plan: Plan, server: Server, clients: list[Client], *, start: int = 0) -> Iterator[Exchange]:
    """Lets the parties talk in one program; yields every exchange after it is done."""
    for exchange in plan.exchanges(start):
        messages = {number: clients[number].send(exchange) for number in exchange.clients}
        for number, answer in server.handle(exchange, messages).items():
            clients[number].receive(exchange, answer)
        yield exchange


def sums_of(info: step.Info, samples: int) -> simulate.Sums:
    """The sums of one batch."""
    return simulate.Sums(float(info.loss) * samples, int(info.top1), int(info.top5), samples)


def total(sums: list[simulate.Sums]) -> simulate.Sums:
    return simulate.Sums(*map(sum, zip(*sums, strict=True)))


def _stack(payloads):
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *payloads)


def _unstack(payloads, count):
    """A message for each client, of NumPy arrays: taken apart on the host, which no compiled program has to do."""
    payloads = jax.tree.map(np.asarray, payloads)
    return [Message(jax.tree.map(lambda leaf, k=k: leaf[k], payloads)) for k in range(count)]


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(tree):
    """How many float values a tree has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if _is_float(leaf))


def _vector_form(size):
    return Form(Identity(), jax.ShapeDtypeStruct((size,), jnp.float32))


def _to_vector(tree):
    """All float values of a tree as one float32 vector (n,)."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree) if _is_float(leaf)])


def _from_vector(vector, like):
    """The tree `like` with the values of a vector; what is no float is kept."""
    leaves, structure = jax.tree.flatten(like)
    at, out = 0, []
    for leaf in leaves:
        if _is_float(leaf):
            out.append(vector[at : at + leaf.size].reshape(leaf.shape))
            at += leaf.size
        else:
            out.append(leaf)
    return jax.tree.unflatten(structure, out)


def _with_count(state, count):
    """A half that was handed on, its optimizer's count of updates set: integers are not in the vector."""
    return jax.tree.map(lambda leaf: leaf if _is_float(leaf) else jnp.full_like(leaf, count), state)
