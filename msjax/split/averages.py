"""What keeps the clients' parts equal, through a codec: averages with error feedback at each sender.

In an average every client sends two vectors, one of its part's weights and one of its statistics; the server answers
all of them with the means. In parallel mode the first is the gradient and the second the change of the statistics in
the step; in SplitFed both are changes since the last average. The same values come again and again, so what a message
loses can be made good by the next one: a sender adds the error of its last message to what it sends (Seide et al.,
Interspeech 2014; both ways as in DoubleSqueeze, Tang et al., arXiv 1905.05957). With a codec that is unbiased it does
not: that error may be larger than what was sent, and would grow. All clients decode the same answer, so their parts
stay equal to the bit.

With `Identity` nothing of this happens: one vector travels as it is, and nothing is remembered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

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
    """What its messages so far have lost; () with an unbiased codec."""
    reference: Vectors = ()
    """SplitFed, of a client: weights and statistics as they were last averaged, equal at all clients."""


class Averages(NamedTuple):
    """The memories of all parties in one program."""

    client: Memory
    """The errors have a leading axis K; the reference has none."""
    server: Memory


def no_error(spec: RunSpec) -> Vectors:
    """Returns the error before the first message."""
    if spec.update_codec.unbiased:
        return ()
    return tuple(jnp.zeros(like.shape, like.dtype) for like in spec.average_payload().likes)


def update_key(key: jax.Array) -> jax.Array:
    """Returns the key that a client encodes what it averages with, given its key of the step."""
    return jax.random.fold_in(split_key(key).codec, (1 << 30) + 1)


def mean_key(key: jax.Array) -> jax.Array:
    """Returns the key that the server encodes the means with, given that of the first client of the run."""
    return jax.random.fold_in(split_key(key).codec, (1 << 30) + 2)


def to_vectors(weights: PyTree, stats: PyTree) -> Vectors:
    """Returns the vectors of two trees."""
    return tuple(vector for vector in (to_vector(weights), to_vector(stats)) if vector.size)


def from_vectors(vectors: Vectors, weights: PyTree, stats: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the two trees with the values of `vectors`; arrays that are not floating are kept."""
    left = list(vectors)
    return tuple(from_vector(left.pop(0), tree) if to_vector(tree).size else tree for tree in (weights, stats))


def encode(spec: RunSpec, vectors: Vectors, error: Vectors, key: jax.Array) -> tuple[Payload, Vectors, Vectors]:
    """Returns the payload of `vectors` and the error before; what it decodes to; and the error after it."""
    payload_spec = spec.average_payload()
    wanted = [vector + lost for vector, lost in zip(vectors, error, strict=True)] if error else list(vectors)
    payload = payload_spec.encode(wanted, key)
    decoded = tuple(payload_spec.decode(payload))
    if not error:
        return payload, decoded, ()
    # What is not finite shows in the loss; kept, it would never leave.
    lost = (want - got for want, got in zip(wanted, decoded, strict=True))
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
    return _mean_update(tuple(spec.average_payload().decode(payload)), update, stats)


def encode_part(spec: RunSpec, part: PartState, memory: Memory, key: jax.Array) -> tuple[Payload, Memory]:
    """Returns the payload of the change of a client's part since the last average, and its memory after it."""
    payload, _, error = encode(spec, _changes(part, memory.reference), memory.error, update_key(key))
    return payload, memory._replace(error=error)


def decode_part(spec: RunSpec, payload: Payload, part: PartState, memory: Memory) -> tuple[PartState, Memory]:
    """Returns a client's part with the average in the server's answer, and its memory with that as reference."""
    return _averaged(part, memory, tuple(spec.average_payload().decode(payload)))


def encode_mean(spec: RunSpec, payloads: Payload, memory: Memory, key: jax.Array) -> tuple[Payload, Memory]:
    """Returns the server's answer to the stacked payloads of K clients, and its memory after it.

    Args:
      key: that of the first client of the run in this step.
    """
    vectors = jax.vmap(spec.average_payload().decode)(payloads)
    means = tuple(vector.mean(0) for vector in vectors)
    payload, _, error = encode(spec, means, memory.error, mean_key(key))
    return payload, memory._replace(error=error)


# -- The same in one program. ---------------------------------------------------------------------------------------


class Exchanged(NamedTuple):
    """What comes of an average in one program."""

    means: Vectors
    """As every client decodes them."""
    memory: Averages
    payloads: Payload
    """The clients', with a leading axis K."""
    answer: Payload


def exchange(spec: RunSpec, vectors: Vectors, memory: Averages, keys: jax.Array, axis_name: str | None) -> Exchanged:
    """Averages vectors of K clients, each with a leading axis K; under `shard_map` over the mesh axis `axis_name`."""

    def one_client(vectors, error, key):
        return encode(spec, vectors, error, update_key(key))

    payloads, decoded, errors = jax.vmap(one_client)(vectors, memory.client.error, keys)
    means, first = tuple(vector.mean(0) for vector in decoded), keys[0]
    if axis_name is not None:
        means = jax.lax.pmean(means, axis_name)
        first = jax.random.wrap_key_data(jax.lax.all_gather(jax.random.key_data(first), axis_name)[0])
    answer, means, error = encode(spec, means, memory.server.error, mean_key(first))
    memory = Averages(memory.client._replace(error=errors), memory.server._replace(error=error))
    return Exchanged(means, memory, payloads, answer)


def average_update(
    spec: RunSpec, update: PartUpdate, stats: PyTree, memory: Averages, keys: jax.Array, axis_name: str | None
) -> tuple[PartUpdate, Exchanged]:
    """Returns the mean of K clients' updates, whose arrays have a leading axis K, as every client has it."""
    vectors = jax.vmap(lambda update: _update_vectors(update, stats))(update)
    found = exchange(spec, vectors, memory, keys, axis_name)
    one = jax.tree.map(lambda leaf: leaf[0], update)
    return _mean_update(found.means, one, stats), found


def average_parts(
    spec: RunSpec, parts: PartState, memory: Averages, keys: jax.Array, axis_name: str | None
) -> tuple[PartState, Exchanged]:
    """Gives each of K clients, whose parts have a leading axis K and nothing that never changes, the average of all."""
    reference = memory.client.reference
    vectors = jax.vmap(lambda part: _changes(part, reference))(parts)
    found = exchange(spec, vectors, memory, keys, axis_name)
    part, client = _averaged(jax.tree.map(lambda leaf: leaf[0], parts), found.memory.client, found.means)

    def to_all(mean, own):
        return jnp.broadcast_to(mean, own.shape) if is_float(own) else own

    trees = (jax.tree.map(to_all, getattr(part, name), getattr(parts, name)) for name in ("params", "stats"))
    params, stats = trees
    memory = found.memory._replace(client=client)
    return parts._replace(params=params, stats=stats), found._replace(memory=memory)


def _update_vectors(update, stats):
    return to_vectors(update.grads, _difference(update.stats, changing(stats, update.stats)))


def _mean_update(vectors, update, stats):
    grads, change = from_vectors(vectors, update.grads, update.stats)
    before = changing(stats, change)
    return PartUpdate(grads, jax.tree.map(lambda c, old: old + c if is_float(c) else c, change, before))


def _changes(part, reference):
    now = to_vectors(part.params, part.stats)
    return tuple(vector - before for vector, before in zip(now, reference, strict=True))


def _averaged(part, memory, changes):
    reference = tuple(before + change for before, change in zip(memory.reference, changes, strict=True))
    params, stats = from_vectors(reference, part.params, part.stats)
    return part._replace(params=params, stats=stats), memory._replace(reference=reference)


def _difference(new, old):
    return jax.tree.map(lambda a, b: a - b if is_float(a) else a, new, old)
