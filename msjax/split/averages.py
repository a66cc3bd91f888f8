"""What keeps the clients' parts equal, through a codec: averages with error feedback at each sender.

In an average every client sends two vectors, one of its part's weights and one of its statistics; the server answers
all of them with the means. Of the weights, in parallel mode it is the gradient, in SplitFed the change since the last
average. The same values come again and again, so what a message loses can be made good by the next one: a sender adds
the error of its last message to what it sends (Seide et al., Interspeech 2014; both ways as in DoubleSqueeze, Tang et
al., arXiv 1905.05957). With a codec that is unbiased it does not: that error may be larger than what was sent, and
would grow. All clients decode the same answer, so their parts stay equal to the bit.

Statistics, such as means and variances of batch normalization, have no feedback and a codec of their own
(`RunSpec.statistics_codec`). In parallel mode their change in the step is sent, with a relative error. As a running
average moves by a share of its distance from the data, what a change lost is in the next one anyway; added once more,
it would overshoot, and variances could become negative. (They still could where a running average moves by more than
three quarters of its distance in a step, as with a momentum of 0.1 where 0.9 is meant.) In SplitFed they are sent as
they are.

With `Identity` nothing of this happens: one vector travels as it is, and nothing is remembered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from msjax.keys import KEY_IMPL
from msjax.split import shards
from msjax.split.payloads import Payload
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, changing, split_key
from msjax.split.step import PartUpdate
from msjax.split.trees import from_vector, is_float, to_vector

Vectors = tuple[jax.Array, ...]
"""Float32 vectors, one for each array of `RunSpec.average_payload`: weights and statistics; without those that are
empty."""


class Memory(NamedTuple):
    """What a party keeps from one average to the next; part of its checkpoints."""

    error: Vectors
    """What its messages so far have lost of the weights; () with an unbiased codec, or without weights."""
    reference: Vectors = ()
    """SplitFed, of a client: the weights as they were last averaged, equal at all clients; () without weights."""


class Averages(NamedTuple):
    """The memories of all parties in one program."""

    client: Memory
    """The errors have a leading axis K; the reference has none."""
    server: Memory


def no_error(spec: RunSpec) -> Vectors:
    """Returns the error before the first message."""
    return () if spec.update_codec.unbiased else no_vectors(spec)[: int(spec.client_weight_values > 0)]


def no_vectors(spec: RunSpec) -> Vectors:
    """Returns vectors of zeros, in the shapes of those that are averaged."""
    return tuple(jnp.zeros(like.shape, like.dtype) for like in spec.average_payload.likes)


def update_key(key: jax.Array) -> jax.Array:
    """Returns the key that a client encodes what it averages with, given its key of the step."""
    return jax.random.fold_in(split_key(key).codec, (1 << 30) + 1)


def mean_key(key: jax.Array) -> jax.Array:
    """Returns the key that the server encodes the means with, given that of the first client of the run."""
    return jax.random.fold_in(split_key(key).codec, (1 << 30) + 2)


def to_vectors(weights: PyTree, stats: PyTree) -> Vectors:
    """Returns the vectors of two trees."""
    return tuple(vector for vector in (to_vector(weights), to_vector(stats)) if vector.size)


def reference_of(part: PartState) -> Vectors:
    """Returns what the first changes of a client's part are counted from."""
    return to_vectors(part.params, {})


def from_vectors(vectors: Vectors, weights: PyTree, stats: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the two trees with the values of `vectors`; arrays that are not floating are kept."""
    left = list(vectors)
    return tuple(from_vector(left.pop(0), tree) if to_vector(tree).size else tree for tree in (weights, stats))


def encode(spec: RunSpec, vectors: Vectors, error: Vectors, key: jax.Array) -> tuple[Payload, Vectors, Vectors]:
    """Returns the payload of `vectors` and the error before; what it decodes to; and the error after it."""
    payload_spec = spec.average_payload
    wanted = [*map(jnp.add, vectors, error), *vectors[len(error) :]]
    payload = payload_spec.encode(wanted, key)
    decoded = tuple(payload_spec.decode(payload))
    # What is not finite shows in the loss; kept, it would never leave.
    lost = map(jnp.subtract, wanted[: len(error)], decoded)
    return payload, decoded, tuple(jnp.where(jnp.isfinite(one), one, 0) for one in lost)


def encode_update(
    spec: RunSpec, update: PartUpdate, stats: PyTree, memory: Memory, key: jax.Array
) -> tuple[Payload, Memory]:
    """Returns the payload of a client's gradients and of the change of its statistics, and its memory after it.

    Args:
      stats: before the step.
      key: the client's of the step.
    """
    payload, _, error = encode(spec, _update_vectors(update, stats), memory.error, update_key(key))
    return payload, memory._replace(error=error)


def decode_update(spec: RunSpec, payload: Payload, update: PartUpdate, stats: PyTree) -> PartUpdate:
    """Returns the mean of all clients' updates in the server's answer, in the structure of `update`."""
    return _mean_update(tuple(spec.average_payload.decode(payload)), update, stats)


def encode_part(spec: RunSpec, part: PartState, memory: Memory, key: jax.Array) -> tuple[Payload, Memory]:
    """Returns the payload of a client's part, of its weights the change since the last average; its memory after it."""
    payload, _, error = encode(spec, _changes(part, memory.reference), memory.error, update_key(key))
    return payload, memory._replace(error=error)


def decode_part(spec: RunSpec, payload: Payload, part: PartState, memory: Memory) -> tuple[PartState, Memory]:
    """Returns a client's part with the average in the server's answer, and its memory with that as reference."""
    return _averaged(part, memory, tuple(spec.average_payload.decode(payload)))


def encode_mean(spec: RunSpec, payloads: Payload, memory: Memory, key: jax.Array) -> tuple[Payload, Memory]:
    """Returns the server's answer to the stacked payloads of K clients, and its memory after it.

    Args:
      key: that of the first client of the run in this step.
    """
    vectors = jax.vmap(spec.average_payload.decode)(payloads)
    means = tuple(vector.mean(0) for vector in vectors)
    payload, _, error = encode(spec, means, memory.error, mean_key(key))
    return payload, memory._replace(error=error)


# -- The same in one program. ---------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """What clients send in an average, in one program."""

    total: Vectors
    """The sum over them of what the server decodes."""
    error: Vectors
    """Each client's after it, with a leading axis of clients."""
    nbytes: jax.Array
    """About the bytes of each client's message, float32 (K,); 0 where they follow from shapes."""


def send(
    spec: RunSpec,
    vectors: Vectors,
    error: Vectors,
    keys: jax.Array,
    *,
    clients_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> Sent:
    """Encodes vectors of K clients, each with a leading axis K, and adds them up.

    Args:
      error, keys: of each client, with a leading axis K.
      clients_at_once: how many are encoded at the same time; None for all.
      mesh: as of `fused.fused_step`.
    """

    def one_client(vectors, error, key):
        payload, decoded, error = encode(spec, vectors, error, update_key(key))
        return decoded, error, _about_bytes(spec, payload)

    each = vectors, error, keys
    decoded, error, nbytes = shards.by_client(mesh, one_client, (), each, clients_at_once=clients_at_once)
    return Sent(tuple(vector.sum(0) for vector in decoded), error, nbytes)


def over_devices(total: Vectors, clients: int, axis_name: str | None) -> Vectors:
    """Returns the mean of what clients sent, given the sum of `clients` of them on each device of a mesh axis."""
    means = tuple(vector / clients for vector in total)
    return means if axis_name is None else jax.lax.pmean(means, axis_name)


def first_of_all(key: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the key of the run's first client, given that of the first client of each device."""
    if axis_name is None:
        return key
    return jax.random.wrap_key_data(jax.lax.all_gather(jax.random.key_data(key), axis_name)[0], impl=KEY_IMPL)


def answer(spec: RunSpec, means: Vectors, error: Vectors, first_key: jax.Array) -> tuple[Vectors, Vectors, jax.Array]:
    """Returns the means as every client decodes them, the server's error after it, and about the answer's bytes."""
    payload, means, error = encode(spec, means, error, mean_key(first_key))
    return means, error, _about_bytes(spec, payload)


def _about_bytes(spec, payload):
    return spec.average_payload.estimated_bytes(payload) if spec.update_codec.entropy_coded else jnp.float32(0)


def update_vectors(updates: PartUpdate, stats: PyTree) -> Vectors:
    """Returns the vectors that K clients send of their updates, whose arrays have a leading axis K, as the vectors do.

    Args:
      stats: before the step.
    """
    return jax.vmap(lambda update: _update_vectors(update, stats))(updates)


def mean_update(means: Vectors, part: PartState, stats: PyTree) -> PartUpdate:
    """Returns the mean of all clients' updates as every client has it.

    Args:
      part: before the step.
      stats: in the structure of the updates'; what is not floating is taken from here.
    """
    like = jax.tree.map(lambda new, old: new.astype(old.dtype), stats, changing(part.stats, stats))
    return _mean_update(means, PartUpdate(part.params, like), part.stats)


def average_parts(
    spec: RunSpec,
    now: jax.Array,
    parts: PartState,
    memory: Averages,
    keys: jax.Array,
    axis_name: str | None,
    *,
    clients_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[PartState, Averages, tuple[jax.Array, jax.Array]]:
    """Gives each of K clients, whose parts have a leading axis K and nothing that never changes, the average of all.

    What the devices exchange is no part of a `lax.cond`: XLA's CPU (jaxlib 0.10) corrupts memory where a program with
    such a one comes from the persistent compilation cache.

    Args:
      now: bool (), whether this step ends with an average; else nothing changes.
      clients_at_once, mesh: as of `send`.

    Returns:
      The parts, the memories, and about the bytes of all messages up and down.
    """
    clients, reference = keys.shape[0], memory.client.reference

    def encode_changes(parts, error):
        vectors = jax.vmap(lambda part: _changes(part, reference))(parts)
        return send(spec, vectors, error, keys, clients_at_once=clients_at_once, mesh=mesh)

    def nothing(parts, error):
        return Sent(no_vectors(spec), error, jnp.zeros(clients, jnp.float32))

    sent = jax.lax.cond(now, encode_changes, nothing, parts, memory.client.error)
    means = over_devices(sent.total, clients, axis_name)
    first_key = first_of_all(keys[0], axis_name)

    def adopt_mean(parts, memory):
        changes, error, answer_bytes = answer(spec, means, memory.server.error, first_key)
        part, own = _averaged(jax.tree.map(lambda leaf: leaf[0], parts), memory.client, changes)

        def to_all(mean, own):
            return jnp.broadcast_to(mean, own.shape) if is_float(own) else own

        trees = (jax.tree.map(to_all, getattr(part, name), getattr(parts, name)) for name in ("params", "stats"))
        params, stats = trees
        memory = Averages(own, memory.server._replace(error=error))
        return parts._replace(params=params, stats=stats), memory, answer_bytes

    def as_before(parts, memory):
        return parts, memory, jnp.float32(0)

    memory = memory._replace(client=memory.client._replace(error=sent.error))
    parts, memory, answer_bytes = jax.lax.cond(now, adopt_mean, as_before, parts, memory)
    return parts, memory, (sent.nbytes.sum(), answer_bytes * clients)


def _update_vectors(update, stats):
    return to_vectors(update.grads, _difference(update.stats, changing(stats, update.stats)))


def _mean_update(vectors, update, stats):
    grads, change = from_vectors(vectors, update.grads, update.stats)
    before = changing(stats, change)
    return PartUpdate(grads, jax.tree.map(lambda c, old: old + c if is_float(c) else c, change, before))


def _changes(part, reference):
    now = to_vectors(part.params, part.stats)
    return (*map(jnp.subtract, now, reference), *now[len(reference) :])


def _averaged(part, memory, changes):
    reference = tuple(map(jnp.add, memory.reference, changes))
    params, stats = from_vectors((*reference, *changes[len(reference) :]), part.params, part.stats)
    return part._replace(params=params, stats=stats), memory._replace(reference=reference)


def _difference(new, old):
    return jax.tree.map(lambda a, b: a - b if is_float(a) else a, new, old)
