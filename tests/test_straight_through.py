"""The codec as a layer: its value, its gradient rule, and its place in Linen and NNX modules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from msjax import compress
from msjax.compress import EntropyMask, Identity, MaskEncoded, RandK, RandTopK, TopK, Uniform, straight_through

KEY = jax.random.key(5)
H = jax.random.normal(jax.random.key(0), (3, 7))
G = jax.random.normal(jax.random.key(1), (3, 7))
DEFAULTS = [pytest.param(cls(), marks=[pytest.mark.slow] if cls.entropy_coded else []) for cls in compress.CODECS]


def name_of(codec):
    return type(codec).__name__


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_pullback(codec, h, key, grad_codec, g):
    y, pull = jax.vjp(lambda h: straight_through(codec, h, key, grad_codec), h)
    return (
        y,
        pull(g)[0],
        codec.roundtrip(h, key),
        None if grad_codec is None else grad_codec.roundtrip(g, compress.downlink_key(key)),
    )


@pytest.mark.parametrize("codec", DEFAULTS, ids=name_of)
def test_gradient_is_the_identity(codec):
    y, grad, expected, _ = value_and_pullback(codec, H, KEY, None, G)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(grad, G)


@pytest.mark.parametrize("grad_codec", DEFAULTS, ids=name_of)
def test_gradient_goes_through_the_downlink_codec(grad_codec):
    if not getattr(grad_codec, "signed", True):
        grad_codec = dataclasses.replace(grad_codec, signed=True)
    _, grad, _, expected = value_and_pullback(Identity(), H, KEY, grad_codec, G)
    np.testing.assert_array_equal(grad, expected)
    assert isinstance(grad_codec, Identity) or not np.array_equal(grad, G)


def test_uplink_and_downlink_draw_differently():
    y, grad, _, _ = value_and_pullback(RandK(0.5), H, KEY, RandK(0.5), H)
    assert not np.array_equal(y, grad)
    assert compress.downlink_key(None) is None
    # Nor as any sample does on the way up: split(key)[i] may equal fold_in(key, i).
    down = tuple(jax.random.key_data(compress.downlink_key(jax.random.key(0))).tolist())
    samples = jax.random.key_data(jax.random.split(jax.random.key(0), 64)).tolist()
    assert down not in {tuple(sample) for sample in samples}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    y, grad, _, _ = value_and_pullback(MaskEncoded(0.75), H.astype(dtype), None, TopK(0.5), G.astype(dtype))
    assert y.dtype == grad.dtype == dtype


@functools.partial(jax.jit, static_argnums=0)
def kept_and_pullback(codec, h, g):
    payload = codec.encode(h, KEY)
    kept = codec.take_kept(payload, g)
    y, pull = jax.vjp(lambda h: straight_through(codec, h, KEY, kept_only=True), h)
    return codec.decode(payload, h), kept, codec.put_kept(payload, kept, h), y, pull(g)[0]


@pytest.mark.parametrize(
    "codec",
    [
        Identity(),
        TopK(0.6),
        RandK(0.6, granularity="sample"),
        RandTopK(0.6, granularity="sample"),
        TopK(0.6, granularity="channel"),
        MaskEncoded(0.9, bits=1),
        Uniform(1),
        pytest.param(EntropyMask(error=0.3, levels=5, keep_zeros=True), marks=pytest.mark.slow),
        pytest.param(EntropyMask(error=0.3, levels=5, signed=True, granularity="sample"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_of_what_was_kept(codec):
    """They are g where the features do not decode to zero; of a sparsifier its derivative, and as short as it keeps."""
    h = H.at[0].set(0.0)
    decoded, kept, whole, y, pulled = kept_and_pullback(codec, h, G)
    np.testing.assert_array_equal(y, decoded)
    assert (kept.shape, kept.dtype) == (codec.kept_like(h).shape, codec.kept_like(h).dtype)
    factor = np.where(decoded != 0, 1, 0)
    if hasattr(codec, "_kept"):  # a sparsifier: what it kept may be 0
        ones = codec.decode(codec.encode(h, KEY)._replace(values=jnp.ones(kept.shape)), h)
        assert kept.size == np.count_nonzero(ones) < h.size
        factor = np.asarray(ones)
    np.testing.assert_allclose(whole, factor * np.asarray(G), rtol=1e-6)
    np.testing.assert_array_equal(pulled, whole)
    assert isinstance(codec, Uniform) or 0 < np.count_nonzero(pulled) < h.size


@pytest.mark.slow
def test_what_entropy_mask_keeps_are_codes_but_zero():
    """Where small values decode to their mean, they do not count as kept, either."""
    h = jax.random.normal(jax.random.key(2), (4000,))
    means, zeros = (EntropyMask(bits=1.0, keep_zeros=keep) for keep in (False, True))
    decoded = [np.asarray(jax.jit(codec.roundtrip)(h)) for codec in (means, zeros)]
    assert decoded[0].min() > 0 == decoded[1].min()
    for codec in (means, zeros):
        kept = kept_and_pullback(codec, h, jnp.ones_like(h))[2]
        np.testing.assert_array_equal(kept != 0, decoded[1] != 0)
    assert "keep_zeros" not in repr(means) and compress.from_string(repr(zeros)) == zeros


def test_kept_gradients_through_the_downlink_codec():
    """The gradient codec sees what was kept alone, and is unbiased in that if it is unbiased."""

    @jax.jit
    def draw(keys):
        def pull(key):
            return jax.vjp(lambda h: straight_through(TopK(0.5), h, key, RandK(0.5), kept_only=True), H)[1](G)

        return jax.vmap(pull)(keys)[0]

    found = np.asarray(draw(jax.random.split(KEY, 2000)))
    kept = np.asarray(jax.jit(TopK(0.5).roundtrip)(H)) != 0
    assert (np.count_nonzero(found, axis=(1, 2)) == kept.sum() // 2).all()
    np.testing.assert_allclose(found.mean(0), np.where(kept, G, 0), atol=6 * np.abs(G).max() / 2000**0.5)


def test_large_values_pass_exactly():
    """`x + stop_gradient(d − x)` would lose them."""
    h = jnp.array([1e30, 3.0, 1e-30, 2.0])
    np.testing.assert_array_equal(jax.jit(lambda h: straight_through(TopK(0), h))(h), h)


def test_vmap_of_grad_and_no_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def pull(codec, h, g):
        traces.append(codec)
        return jax.vmap(lambda h, g: jax.vjp(lambda h: straight_through(codec, h, None, codec), h)[1](g)[0])(h, g)

    got = pull(TopK(0.6), H, G)
    assert pull(TopK(0.6), G, H).shape == H.shape and len(traces) == 1
    roundtrip = jax.jit(TopK(0.6).roundtrip)
    np.testing.assert_array_equal(got, np.stack([roundtrip(g) for g in G]))


def test_reverse_mode_only():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda h: jax.jvp(lambda h: straight_through(TopK(0.5), h), (h,), (h,))).lower(H)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: straight_through("TopK", H), TypeError, "codec must be a Codec, got 'TopK'"),
        (lambda: straight_through(None, H), TypeError, "codec must be a Codec, got None"),
        (lambda: straight_through(TopK(), H, None, "TopK"), TypeError, "grad_codec must be a Codec, got 'TopK'"),
        (
            lambda: TopK(0.5).put_kept(TopK(0.5).encode(H), jnp.zeros(3), H),
            ValueError,
            r"kept must be float32\[10\], as kept_like says, got float32\[3\]",
        ),
        (lambda: TopK(0.5).take_kept(TopK(0.6).encode(H), G), ValueError, "payload must be what TopK"),
        (lambda: straight_through(RandK(), H), ValueError, "key must be a JAX random key for RandK, got None"),
        (
            lambda: straight_through(TopK(), H, None, RandK()),
            ValueError,
            "key must be a JAX random key for grad_codec RandK, got None",
        ),
        (
            lambda: straight_through(TopK(), H, None, MaskEncoded()),
            ValueError,
            "grad_codec must have signed=True, as gradients are of both signs, got MaskEncoded",
        ),
        (
            lambda: straight_through(TopK(), H, None, MaskEncoded(signed=True, granularity="sample"), kept_only=True),
            ValueError,
            'grad_codec must have granularity="tensor" where kept_only leaves one vector of a batch',
        ),
        (
            lambda: straight_through(TopK(), jnp.arange(3)),
            TypeError,
            "h must be one of float32, bfloat16, float16, got int32",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


CODEC = MaskEncoded(0.75, signed=True)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.Dense(8, name="client")(x)
        return linen.Dense(2, name="server")(straight_through(CODEC, h))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.client, self.server = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.server(straight_through(CODEC, self.client(x)))


@jax.jit
def expected_gradients(client, server, x):
    """By hand: the server differentiates at what was decoded, the client takes its cotangent as it is."""
    decoded = CODEC.roundtrip(x @ client)
    g = 2 * (decoded @ server)
    return x.T @ (g @ server.T), decoded.T @ g


def test_in_linen():
    x = jax.random.normal(KEY, (4, 5))
    params = jax.jit(LinenNet().init)(KEY, x)["params"]
    grads = jax.jit(jax.grad(lambda p: jnp.sum(LinenNet().apply({"params": p}, x) ** 2)))(params)
    for name, want in zip(
        ("client", "server"), expected_gradients(params["client"]["kernel"], params["server"]["kernel"], x), strict=True
    ):
        np.testing.assert_allclose(grads[name]["kernel"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_key_of_each_device_for_features_of_all(kind):
    """The gradient of what all devices share is the sum of theirs."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    h = jax.device_put(H, NamedSharding(mesh, P()))
    keys = jax.device_put(jax.random.split(KEY), NamedSharding(mesh, P("d")))
    mine = jax.grad(lambda h, key: straight_through(RandK(0.5), h, key).sum())
    with jax.set_mesh(mesh):
        all_of_them = jax.shard_map(lambda h, keys: mine(h, keys[0]), in_specs=(P(), P("d")), out_specs=P())
        assert (jax.jit(all_of_them)(h, keys) == 2).all()


def test_a_variable_of_nnx_is_an_array(unchecked):
    found = nnx.jit(lambda h: straight_through(CODEC, h))(nnx.Param(H))
    np.testing.assert_array_equal(found, CODEC.roundtrip(H))


def test_in_nnx():
    x = jax.random.normal(KEY, (4, 5))
    net = NnxNet(nnx.Rngs(0))
    graph, params = nnx.split(net)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x) ** 2)))(params)
    for name, want in zip(
        ("client", "server"), expected_gradients(net.client.kernel[...], net.server.kernel[...], x), strict=True
    ):
        np.testing.assert_allclose(grads[name]["kernel"][...], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad_codec", [None, MaskEncoded(signed=True)])
def test_the_derivative_of_a_derivative_is_that_of_the_identity(grad_codec):
    def loss(h):
        return (straight_through(MaskEncoded(), h, None, grad_codec) ** 2).sum()

    h = jnp.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(jax.jacrev(jax.grad(loss))(h)[-1], [0, 0, 0, 2])
    if grad_codec is None:
        np.testing.assert_array_equal(jax.jacrev(jax.grad(loss))(h), 2 * np.eye(4))
        penalty = jax.grad(lambda h: (jax.grad(loss)(h) ** 2).sum())(h)
        np.testing.assert_array_equal(penalty, 8 * MaskEncoded().roundtrip(h))


@pytest.mark.parametrize("grad_codec", [None, RandK(0.5)], ids=str)
def test_kept_gradients_are_where_the_features_are_on_a_mesh_with_explicit_axes(grad_codec):
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Explicit,))
    h, g = H[: len(H) // 2 * 2], G[: len(H) // 2 * 2]

    def pulled(h, g):
        return jax.vjp(lambda h: straight_through(TopK(0.5), h, KEY, grad_codec, kept_only=True), h)[1](g)[0]

    spread = [jax.device_put(leaf, jax.NamedSharding(mesh, jax.P("c"))) for leaf in (h, g)]
    with jax.set_mesh(mesh):
        found = jax.jit(pulled)(*spread)
    assert found.sharding.spec == jax.P("c", None)
    np.testing.assert_array_equal(found, pulled(h, g))
