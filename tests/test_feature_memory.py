"""`FeatureMemory`: both ends remember the same, what is sent is the change, and nothing stays wrong for ever."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import wire
from msjax.compress import (
    EntropyMask,
    Exact,
    FeatureMemory,
    Identity,
    MaskEncoded,
    MemoryState,
    RandK,
    StochasticUniform,
    TopK,
    Uniform,
)

from .helpers import assert_same, case_id

SAMPLES, BATCH, SHAPE = 12, 4, (3, 5)
CODED = EntropyMask(bits=2.0, signed=True)
SINGLE = FeatureMemory(TopK(ratio=0.7, granularity="sample"))
MEMORIES = (
    FeatureMemory(Uniform(bits=3), threshold=0.2),
    FeatureMemory(CODED, threshold=0.1, dtype="bfloat16"),
    FeatureMemory(MaskEncoded(0.9, signed=True)),
    FeatureMemory(StochasticUniform(bits=2, granularity="sample"), dtype="float16"),
)
FAR = 3e38


@functools.partial(jax.jit, static_argnums=0)
def encode(memory, h, state, slots, key=None):
    return memory.encode(h, state, slots, key)


@functools.partial(jax.jit, static_argnums=(0, 4))
def decode(memory, payload, state, slots, like):
    return memory.decode(payload, state, slots, like)


@functools.partial(jax.jit, static_argnums=0)
def roundtrips(memory, features, state, slots, keys):
    """All batches in one program; its arithmetic may be fused otherwise."""

    def one(state, batch):
        h, slots, key = batch
        decoded, state = memory.roundtrip(h, state, slots, key)
        return state, decoded

    return jax.lax.scan(one, state, (features, slots, keys))


def like_of(h):
    return jax.ShapeDtypeStruct(h.shape, h.dtype)


def visits(epochs=3, *, seed=0, dtype=jnp.float32, drift=0.1):
    """Yields the features and slots of each batch: samples that change a little, in a new order every epoch."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(SAMPLES, *SHAPE))
    for _ in range(epochs):
        for slots in rng.permutation(SAMPLES).reshape(-1, BATCH):
            yield jnp.asarray(features[slots], dtype), jnp.asarray(slots, jnp.int32)
        features += drift * rng.normal(size=features.shape) * (rng.random(SAMPLES) < 0.7)[:, None, None]


def ends(memory, batches, dtype=jnp.float32):
    """Yields (h, slots, features that the receiver has, both memories after it), by messages of `wire`."""
    client = server = memory.init(SAMPLES, jax.ShapeDtypeStruct((BATCH, *SHAPE), dtype))
    for number, (h, slots) in enumerate(batches):
        key = jax.random.key(number) if memory.base.needs_key else None
        payload, client = encode(memory, h, client, slots, key)
        message = wire.decode(wire.encode(payload.changes, memory.base, h), expect=(memory.base, h))
        received = payload._replace(changes=message.payload)
        decoded, server = decode(memory, received, server, slots, like_of(h))
        yield h, slots, decoded, client, server


def distances(a, b):
    return np.linalg.norm(np.float64(a).reshape(len(a), -1) - np.float64(b).reshape(len(b), -1), axis=1)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: case_id(m.base))
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)], ids=case_id)
def test_both_ends_remember_the_same_bits(memory, dtype):
    batches, found = list(visits(dtype=dtype)), []
    for h, _, decoded, client, server in ends(memory, batches, dtype):
        assert (decoded.shape, decoded.dtype) == (h.shape, h.dtype)
        assert_same(client, server)
        found.append(decoded)
    assert client.seen.all()
    features, slots = (jnp.stack(arrays) for arrays in zip(*batches, strict=True))
    keys = jnp.stack([jax.random.key(number) for number in range(len(batches))])
    state, decoded = roundtrips(memory, features, memory.init(SAMPLES, h), slots, keys)
    assert_same(state, client)
    assert_same(decoded, jnp.stack(found))


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: case_id(m.base))
def test_the_first_epoch_is_the_base_codecs_own(memory):
    for number, (h, _, decoded, _, _) in enumerate(ends(memory, visits(epochs=1))):
        assert_same(decoded, memory.base.roundtrip(h, jax.random.key(number)))


@pytest.mark.parametrize("threshold", [0.0, 0.15])
def test_the_rule_sample_by_sample(threshold):
    """With a base that takes each sample by itself, against a dictionary."""
    memory = FeatureMemory(SINGLE.base, threshold=threshold)
    known, kept = {}, 0
    for h, slots, decoded, _, server in ends(memory, visits(epochs=4)):
        for one, slot, found in zip(h, slots.tolist(), decoded, strict=True):
            before = known.get(slot)
            if before is None:
                known[slot] = memory.base.roundtrip(one[None])[0]
            elif jnp.linalg.norm(one - before) > threshold * jnp.linalg.norm(one):
                known[slot] = before + memory.base.roundtrip((one - before)[None])[0]
            else:
                kept += 1
            np.testing.assert_array_equal(found, known[slot])
            np.testing.assert_array_equal(server.values[slot], known[slot])
    assert (kept > 3) == (threshold > 0)


@pytest.mark.parametrize("base", [RandK(ratio=0.8), StochasticUniform(bits=1), CODED, SINGLE.base], ids=case_id)
def test_what_is_sent_never_takes_a_sample_farther_away(base):
    memory, before = FeatureMemory(base), None
    for h, slots, decoded, client, _ in ends(memory, visits(epochs=4, drift=0.5)):
        if before is not None and before.seen[slots].all():
            away = distances(h, before.values[slots])
            assert (distances(h, decoded) <= away * (1 + 1e-6)).all()
        before = client


def test_features_that_do_not_change_come_closer_with_every_epoch():
    errors = [0.0] * 4
    for number, (h, _, decoded, _, _) in enumerate(ends(FeatureMemory(CODED), visits(epochs=4, drift=0))):
        errors[number * BATCH // SAMPLES] += float(jnp.sum((h - decoded) ** 2))
    assert all(after < before / 2 for before, after in itertools.pairwise(errors))


def test_what_is_not_sent_costs_a_bit_a_sample():
    """Of an entropy-coded base: the message has nothing but its header, and that is what the wire's estimate says."""
    memory = FeatureMemory(EntropyMask(error=0.07, signed=True), threshold=0.3)
    h, other = jax.random.normal(jax.random.key(0), (2, 64, 500))
    slots, state, sizes, sent = jnp.arange(64), memory.init(64, h), [], []
    for epoch in range(3):
        now = h if epoch != 1 else h.at[:32].add(other[:32])
        payload, state = encode(memory, now, state, slots)
        sizes.append(len(wire.encode(payload.changes, memory.base, h)))
        estimate = wire.estimate_bytes(payload.changes, memory.base, h)
        assert 0.9 * sizes[-1] < estimate < 1.1 * sizes[-1]
        sent.append(memory.is_sent(payload, h).tolist())
    assert sent == [[1] * 64, [1] * 32 + [0] * 32, [1] * 32 + [0] * 32]
    assert 0.3 * sizes[0] < sizes[1] < 0.6 * sizes[0]
    payload, _ = encode(memory, h, state, slots)
    assert not payload.sent.any() and len(wire.encode(payload.changes, memory.base, h)) < 250 < sizes[0] / 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("memory", [SINGLE, MEMORIES[2]], ids=lambda m: case_id(m.base))
def test_what_is_not_finite_shows_and_is_forgotten(memory, value):
    batches = list(visits(epochs=1)) * 4
    h, slots = batches[4]
    batches[4] = h.at[1].set(value), slots
    for number, (given, slots, decoded, client, server) in enumerate(ends(memory, batches)):
        assert_same(client, server)
        assert np.isfinite(client.values).all()
        if number == 4:
            assert not np.isfinite(decoded[1]).all() and not client.seen[slots[1]]
            assert not client.values[slots[1]].any()
            if memory is SINGLE:  # the others of the batch are not touched
                assert (
                    np.isfinite(decoded[jnp.array([0, 2, 3])]).all() and client.seen[slots[jnp.array([0, 2, 3])]].all()
                )
        elif number == 7:  # new again
            assert client.seen.all()
            np.testing.assert_array_equal(
                decoded[1], memory.base.roundtrip(given[1:2])[0]
            ) if memory is SINGLE else None
    assert np.isfinite(decoded).all()


def test_of_a_sample_that_comes_twice_the_last_is_remembered():
    memory = FeatureMemory(Identity())
    h, slots = jnp.arange(8.0).reshape(4, 2), jnp.array([5, 3, 5, 5])
    decoded, state = memory.roundtrip(h, memory.init(6, h), slots)
    np.testing.assert_array_equal(decoded, h)
    np.testing.assert_array_equal(state.values[jnp.array([3, 5])], h[jnp.array([1, 3])])
    assert state.seen.tolist() == [False, False, False, True, False, True]
    again, state = memory.roundtrip(h + 1, state, slots)
    np.testing.assert_array_equal(again, h + 1)
    np.testing.assert_array_equal(state.values[5], h[3] + 1)


def test_samples_without_a_slot_go_whole():
    h = jnp.ones((4, 15))
    memory = FeatureMemory(Uniform(bits=3, granularity="sample"))
    state, slots = memory.init(2, h), jnp.array([1, -1, 2, 1 << 30])
    for _ in range(2):
        decoded, state = memory.roundtrip(h, state, slots)
        np.testing.assert_array_equal(decoded, memory.base.roundtrip(h))
        assert state.seen.tolist() == [False, True] and not state.values[0].any()


@pytest.mark.parametrize(
    ("dtype", "samples", "slots", "seen"),
    [
        (np.uint8, 300, [0, 5, 44, 255], [0, 5, 44, 255]),
        (np.int8, 300, [-1, 0, 1, 127], [0, 1, 127]),
        (np.int16, 40_000, [0, 1, -1, 30_000], [0, 1, 30_000]),
        (np.uint32, 9, [2**32 - 1, 2**31 + 3, 8, 9], [8]),
        (np.int64, 9, [2**32 + 3, -(2**32) + 4, 9, 8], [8]),
        (np.uint64, 9, [2**63 + 3, 2**32, 8, 1], [1, 8]),
    ],
)
def test_slots_of_any_integers(dtype, samples, slots, seen, unchecked):
    memory, h = FeatureMemory(Identity()), jnp.ones((4, 2))
    _, state = memory.roundtrip(h, memory.init(samples, h), np.array(slots, dtype))
    assert np.flatnonzero(state.seen).tolist() == seen
    if np.dtype(dtype).itemsize < 8:
        traced = jax.jit(memory.roundtrip)(h, memory.init(samples, h), jnp.array(slots, dtype))
        assert_same(traced[1], state)


def test_on_a_mesh_with_explicit_axes(unchecked):
    mesh = jax.make_mesh((2,), ("data",))
    memory, h, slots = FeatureMemory(Uniform(bits=4)), jax.random.normal(jax.random.key(0), (4, 6)), jnp.arange(4)
    spread = jax.device_put(h, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None)))
    payload, state = memory.encode(spread, memory.init(np.int64(5), spread), slots)
    assert_same((payload, state), memory.encode(h, memory.init(5, h), slots))
    decoded, _ = memory.decode(payload, memory.init(5, h), slots, like=spread)
    np.testing.assert_array_equal(decoded, state.values[:4])


@pytest.mark.parametrize("base", (Uniform(bits=4), StochasticUniform(bits=4)), ids=case_id)
def test_both_ends_are_equal_where_each_call_is_a_program(base):
    memory, h, slots = FeatureMemory(base), jax.random.normal(jax.random.key(0), (4, 6)), jnp.arange(4)
    sender = receiver = memory.init(4, h)
    for epoch in range(3):
        payload, sender = memory.encode(h + epoch, sender, slots, jax.random.key(epoch))
        received, receiver = memory.decode(payload, receiver, slots, like=h)
        assert_same(receiver, sender)
        np.testing.assert_array_equal(received, sender.values)


@pytest.mark.parametrize("memory", MEMORIES[:2], ids=lambda m: case_id(m.base))
def test_a_saved_memory_goes_on_with_the_same_bits(memory, tmp_path, unchecked):
    """Whole, or a client's part of it with slots of its own."""
    batches = list(visits(epochs=2))
    for number, (_, _, _, client, _) in enumerate(ends(memory, batches)):
        if number == 2:
            raw = np.asarray(client.values).view(np.uint8)
            np.savez(tmp_path / "memory.npz", values=raw, seen=client.seen)
    with np.load(tmp_path / "memory.npz") as saved:
        restored = MemoryState(saved["values"].view(memory.dtype), saved["seen"])
    part = np.sort(batches[3][1])
    other = MemoryState(restored.values[part], restored.seen[part])
    for h, slots in batches[3:]:
        decoded, restored = memory.roundtrip(h, restored, slots)
        if h is batches[3][0]:
            in_part, other = memory.roundtrip(h, other, np.searchsorted(part, slots))
            assert_same(decoded, in_part)
    assert_same(restored, client)


def test_sums_of_the_largest_numbers_stay_finite():
    memory, h = FeatureMemory(Identity()), jnp.array([[-FAR, FAR, 1.0, FAR]])
    with jax.debug_nans(True), jax.debug_infs(True):
        _, state = memory.roundtrip(h, memory.init(1, h), jnp.zeros(1, jnp.int32))
        decoded, state = memory.roundtrip(-h, state, jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(decoded, [[0.4e38, -0.4e38, -1.0, -0.4e38]], rtol=0.02)
    assert state.seen.all()


def test_sizes():
    memory, like = (
        FeatureMemory(MaskEncoded(signed=True), dtype="bfloat16"),
        jax.ShapeDtypeStruct((9, 100), jnp.float32),
    )
    state = memory.init(50, like)
    assert sum(leaf.nbytes for leaf in state) == memory.memory_bytes(50, like) == 50 * 201
    payload, _ = memory.encode(jnp.ones((9, 100)), state, jnp.arange(9))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(payload)) == memory.payload_bytes(like)
    assert memory.payload_bytes(like) == memory.base.payload_bytes(like) + 2
    assert jax.tree.map(lambda a: (a.shape, a.dtype), payload) == jax.tree.map(
        lambda a: (a.shape, a.dtype), memory.payload_like(like)
    )
    empty = jnp.zeros((0, 100))
    decoded, after = memory.roundtrip(empty, state, jnp.zeros(0, jnp.int32))
    assert decoded.shape == (0, 100)
    assert_same(after, state)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"base": "TopK"}, TypeError, "base must be a Codec, got 'TopK'"),
        ({"base": MaskEncoded()}, ValueError, "base must be signed, as changes have both signs, got MaskEncoded"),
        ({"base": Exact()}, ValueError, r"base must take floats, as changes are, got Exact\(\)"),
        ({"threshold": 1}, ValueError, r"threshold must be a number in \[0, 1\), got 1"),
        ({"threshold": True}, ValueError, r"threshold must be a number in \[0, 1\), got True"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
    ],
)
def test_wrong_options(options, error, said, unchecked):
    with pytest.raises(error, match=said):
        FeatureMemory(**({"base": TopK()} | options))
    assert FeatureMemory(TopK(), threshold=np.float32(0.1)) == FeatureMemory(TopK(), threshold=0.1)


def test_wrong_arguments(unchecked):
    memory, h, slots = FeatureMemory(StochasticUniform()), jnp.ones((4, 3)), jnp.arange(4)
    state, key = memory.init(8, h), jax.random.key(0)
    payload, _ = memory.encode(h, state, slots, key)
    cases = [
        (lambda: memory.encode(h, state, slots), ValueError, "key must be a JAX random key"),
        (lambda: memory.encode(h.astype(int), state, slots, key), TypeError, "h must be one of float32"),
        (lambda: memory.encode(h[0, 0], state, slots, key), ValueError, "h must have a batch axis, got a scalar"),
        (lambda: memory.init(8, h[0, 0]), ValueError, "like must have a batch axis, got a scalar"),
        (
            lambda: memory.encode(h, state, slots.astype(jnp.float32), key),
            TypeError,
            "slots must be integers, got float32",
        ),
        (lambda: memory.encode(h, state, slots[:3], key), ValueError, r"slots must be one a sample, \[4\], got shape"),
        (lambda: memory.encode(h.T, state, slots[:3], key), ValueError, r"state must be float32\[N, 4\] and bool\[N\]"),
        (lambda: memory.decode(payload, state._replace(seen=slots), slots, h), ValueError, "state must be .* int32"),
        (lambda: memory.decode(payload._replace(sent=slots), state, slots, h), ValueError, r"sent must be uint8\[1\]"),
        (lambda: memory.encode(np.zeros((4, 3)), state, slots, key), TypeError, "h must be one of float32, .* float64"),
        (
            lambda: memory.encode(h, None, slots, key),
            TypeError,
            "state must be a MemoryState, or its two arrays, got",
        ),
        (lambda: memory.is_sent(payload, jnp.ones((40, 3))), ValueError, r"payload.sent must be uint8\[5\], got uint8"),
        (lambda: memory.init(0, h), ValueError, "samples must be an integer in 1..2147483647, got 0"),
        (lambda: memory.init(2, h.astype(int)), TypeError, "h must be one of float32"),
        (lambda: memory.decode(payload._replace(changes=()), state, slots, h), ValueError, "payload must be what"),
    ]
    for call, error, said in cases:
        with pytest.raises(error, match=said):
            call()


def test_a_memory_of_bfloat16_is_read_again_as_it_was_written(unchecked, tmp_path):
    """NumPy's files do not know the dtype, and have its bytes alone."""
    memory = FeatureMemory(MaskEncoded(signed=True), dtype="bfloat16")
    h = jax.random.normal(jax.random.key(0), (4, 8))
    _, state = memory.encode(h, memory.init(5, h), jnp.arange(4))
    np.savez(tmp_path / "memory.npz", **state._asdict())
    with np.load(tmp_path / "memory.npz") as saved:
        read = dict(saved)
    found = [memory.encode(h, given, jnp.arange(4)) for given in (state, tuple(read.values()))]
    jax.tree.map(np.testing.assert_array_equal, *found)
