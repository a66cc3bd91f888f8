"""The models: published parameter counts and shapes, halves that compose exactly, state that stays functional."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msjax import models
from msjax.models import _conv
from msjax.models._layers import ConvNorm, max_pool
from msjax.models._resnet import BasicBlock

CIFAR, IMAGENET, DIGITS = (32, 32, 3), (224, 224, 3), (8, 8, 1)
TINY = {  # what really runs: two to four channels
    "convnet": dict(input_shape=DIGITS, num_classes=10, width=1 / 8),
    "resnet18": dict(input_shape=(8, 8, 3), num_classes=5, width=1 / 32),
    "vgg19": dict(input_shape=CIFAR, num_classes=5, width=1 / 32),
}


@functools.cache
def tiny(name, **options):
    return models.build(name, **(TINY[name] | options))


@functools.cache
def tiny_halves(name, cut="medium"):
    return models.split(tiny(name), cut, seed=3)


def batch(model, *leading):
    return jax.random.normal(jax.random.key(7), (*leading, *model.input_shape))


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes", "expected"),
    [
        ("resnet18", CIFAR, 10, 11_173_962),
        ("resnet18", CIFAR, 100, 11_220_132),
        ("resnet34", IMAGENET, 1000, 21_797_672),  # torchvision's
        # 0.27 M, 0.46 M, 0.85 M and 1.7 M in arXiv 1512.03385, Table 6, without the 2,752 of two projections.
        ("resnet20", CIFAR, 10, 269_722 + 2_752),
        ("resnet32", CIFAR, 10, 464_154 + 2_752),
        ("resnet56", CIFAR, 10, 853_018 + 2_752),
        ("resnet110", CIFAR, 10, 1_727_962 + 2_752),
        ("vgg19", CIFAR, 10, 38_958_922),
        ("vgg19", IMAGENET, 1000, 143_678_248),  # torchvision's vgg19_bn
        ("vgg19", (64, 64, 3), 200, 46_028_808),
    ],
)
def test_parameter_counts_are_the_published_ones(name, input_shape, num_classes, expected):
    assert models.count_params(models.build(name, input_shape=input_shape, num_classes=num_classes)) == expected


@pytest.mark.parametrize(("n", "expected"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_zero_padding_gives_the_counts_of_he_et_al(n, expected):
    model = models.build(f"resnet{n}", input_shape=CIFAR, num_classes=10, shortcut="zero_padding")
    assert models.count_params(model) == expected


@pytest.mark.parametrize(
    ("name", "input_shape", "first_block", "layers", "shapes"),
    [
        ("vgg19", CIFAR, "residual", (2, 8, 15), ((16, 16, 64), (4, 4, 256), (2, 2, 512))),
        ("resnet18", CIFAR, "paper", (2, 9, 13), ((32, 32, 64), (16, 16, 128), (8, 8, 256))),
        ("resnet34", IMAGENET, "paper", (2, 15, 27), ((56, 56, 64), (28, 28, 128), (14, 14, 256))),
        ("resnet18", CIFAR, "residual", (3, 9, 13), ((32, 32, 64), (16, 16, 128), (8, 8, 256))),
        ("resnet20", CIFAR, "residual", (3, 7, 13), ((32, 32, 16), (32, 32, 16), (16, 16, 32))),
    ],
)
def test_the_papers_cuts_have_the_papers_shapes(name, input_shape, first_block, layers, shapes):
    model = models.build(name, input_shape=input_shape, num_classes=10, first_block=first_block)
    cuts = {cut.name: cut for cut in models.list_cuts(model) if cut.name}
    assert list(cuts) == ["shallow", "medium", "deep"]
    assert tuple(cut.layer for cut in cuts.values()) == layers
    assert tuple(cut.shape for cut in cuts.values()) == shapes
    assert [models.resolve_cut(model, name) for name in cuts] == list(layers)


def test_list_cuts_names_every_boundary_but_the_end():
    cuts = models.list_cuts(models.build("vgg19", input_shape=CIFAR, num_classes=10, width=0.5, dtype="bfloat16"))
    assert [cut.layer for cut in cuts] == list(range(1, 19))
    assert cuts[-1] == models.Cut(18, None, "dense18", (2048,), jnp.bfloat16)
    resnet = models.list_cuts(models.build("resnet18", input_shape=(64, 64, 3), num_classes=200, width=0.25))
    assert [(cut.layer, cut.shape[-1]) for cut in resnet[2::2]] == [(5, 16), (9, 32), (13, 64), (17, 128)]
    assert resnet[0].shape == (64, 64, 16)
    convnet = models.list_cuts(models.build("convnet", input_shape=DIGITS, num_classes=10))
    assert [(cut.name, cut.shape) for cut in convnet] == [
        ("shallow", (8, 8, 32)),
        ("medium", (4, 4, 64)),
        ("deep", (4, 4, 64)),
        (None, (128,)),
    ]


def test_the_papers_first_block_has_no_skip_and_no_inner_activation():
    block = tiny("resnet18", first_block="paper").blocks[1]
    residual = tiny("resnet18").blocks[1]
    plain, skip = block.create(jax.random.key(0)), residual.create(jax.random.key(0))
    assert (block.layer, residual.layer) == (2, 3)
    assert_trees_equal(nnx.to_pure_dict(nnx.state(plain)), nnx.to_pure_dict(nnx.state(skip)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
    h = skip.conv2(plain.conv1(x, train=False), train=False)
    np.testing.assert_array_equal(plain(x, train=False), jax.nn.relu(h))
    h = skip.conv2(jax.nn.relu(skip.conv1(x, train=False)), train=False)
    np.testing.assert_array_equal(skip(x, train=False), jax.nn.relu(x + h))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_norm_against_numpy(stride):
    conv = ConvNorm(2, 3, stride=stride, use_bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (4, 6, 5, 2)), np.float64)
    got = conv(jnp.asarray(x, jnp.float32), train=True)
    padded, w = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(conv.conv.kernel[...], np.float64)
    rows, columns = range(0, 6, stride), range(0, 5, stride)
    h = np.array([[np.tensordot(padded[:, i : i + 3, j : j + 3], w, 3) for j in columns] for i in rows])
    h = h.transpose(2, 0, 1, 3)
    mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
    np.testing.assert_allclose(got, (h - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(conv.norm.mean[...], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(conv.norm.var[...], 0.9 + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize(("window", "padding", "shape"), [(2, 0, (1, 5, 6, 3)), (3, 1, (2, 8, 7, 2))])
def test_max_pool_and_its_gradient_are_those_of_reduce_window(window, padding, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    pads = ((padding, padding),) * 2
    got, got_vjp = jax.vjp(lambda x: max_pool(x, window, padding), x)
    want, want_vjp = jax.vjp(lambda x: nnx.max_pool(x, (window, window), (2, 2), pads), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got_vjp(jnp.sin(got))[0], want_vjp(jnp.sin(want))[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "cut", "train"),
    [
        ("convnet", "shallow", True),
        ("convnet", 4, False),
        pytest.param("resnet18", "deep", True, marks=pytest.mark.slow),
        pytest.param("vgg19", "medium", True, marks=pytest.mark.slow),
    ],
)
def test_halves_compose_to_the_whole(name, cut, train):
    model = tiny(name)
    x, key = batch(model, 2), jax.random.key(1)
    whole, (client, server) = models.whole(model, seed=3), models.split(model, cut, seed=3)
    assert_trees_equal(client.params | server.params, whole.params)
    y, stats = whole.apply(whole.params, whole.stats, x, train=train, key=key)
    h, client_stats = client.apply(client.params, client.stats, x, train=train, key=key)
    z, server_stats = server.apply(server.params, server.stats, h, train=train, key=key)
    assert y.shape == (2, model.num_classes)
    np.testing.assert_array_equal(z, y)
    assert_trees_equal(client_stats | server_stats, stats)


def test_seeds_give_other_parameters():
    one, other = (models.whole(tiny("convnet"), seed=seed).params["conv1"]["conv"]["conv"]["kernel"] for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.slow
def test_dirac_convolutions_start_as_identities():
    """All but the stem's and the 1×1 ones, as far as their channels go."""
    plain, dirac = (models.whole(tiny("resnet18", conv_init=name)).params for name in ("he_normal", "dirac"))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), plain, dirac)
    flat = jax.tree_util.tree_flatten_with_path(changed)[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, differs in flat if differs}
    assert names == {
        f"stage{stage}_block{n}/conv{conv}/conv/kernel" for stage in (1, 2, 3, 4) for n in (1, 2) for conv in (1, 2)
    }
    x = jax.random.normal(jax.random.key(0), (1, 5, 4, 2))
    for stage, outputs in ((1, 2), (2, 4)):
        kernel = dirac[f"stage{stage}_block1"]["conv1"]["conv"]["kernel"]
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        assert y.shape[-1] == outputs
        np.testing.assert_array_equal(y[..., :2], x)
        drawn = plain[f"stage{stage}_block1"]["conv1"]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel[..., 2:], drawn[..., 2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient_through_vmap_and_statistics_get_a_client_axis(name):
    client, server = tiny_halves(name)
    x, keys = batch(tiny(name), 3, 4), jax.random.split(jax.random.key(0), 3)

    def client_loss(client_params, server_params, x, key):
        h, client_stats = client.apply(client_params, client.stats, x, train=True)
        y, server_stats = server.apply(server_params, server.stats, h, train=True, key=key)
        return jnp.square(y - 1).mean(), client_stats | server_stats

    @jax.jit
    def loss(client_params, server_params):
        losses, stats = jax.vmap(client_loss, (None, None, 0, 0))(client_params, server_params, x, keys)
        return losses.mean(), stats

    grads, stats = jax.grad(loss, (0, 1), has_aux=True)(client.params, server.params)
    # A ReLU network of two channels may have dead units, so not every entry moves; a whole leaf must. A convolution's
    # bias is the exception: batch normalisation cancels it.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert grad.dtype == jnp.float32 and np.isfinite(grad).all()
        assert np.abs(grad).max() > 0 or "['conv']['bias']" in jax.tree_util.keystr(path), jax.tree_util.keystr(path)
    assert jax.tree.structure(stats) == jax.tree.structure(client.stats | server.stats)
    assert all(leaf.shape[0] == 3 and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats))
    assert not np.array_equal(*jax.tree.leaves(stats)[0][:2])


def test_statistics_move_in_training_and_stay_in_evaluation():
    client, _ = tiny_halves("convnet")
    before = jax.tree.map(np.array, client.stats)
    x = batch(tiny("convnet"), 4)
    h_train, moved = client.apply(client.params, client.stats, x, train=True)
    h_eval, kept = client.apply(client.params, client.stats, x, train=False)
    assert_trees_equal(client.stats, before)
    assert_trees_equal(kept, before)
    assert all(not np.array_equal(*pair) for pair in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True))
    assert not np.allclose(h_train, h_eval)
    alone, _ = client.apply(client.params, client.stats, x[:1], train=False)
    np.testing.assert_allclose(alone, h_eval[:1], atol=1e-5)


def test_running_variance_is_biased_or_pytorchs():
    x, found = batch(tiny("convnet"), 4), []
    for kind in ("biased", "unbiased"):
        model = models.build("convnet", input_shape=x.shape[1:], num_classes=4, width=0.25, running_variance=kind)
        client, _ = models.split(model, 1)
        h, stats = client.apply(client.params, client.stats, x, train=True)
        (norm,) = (block["conv"]["norm"] for block in stats.values())
        found.append((h, norm["mean"], norm["var"]))
    (h, mean, var), (same, same_mean, larger) = found
    np.testing.assert_array_equal(h, same)
    np.testing.assert_array_equal(mean, same_mean)
    n = x.size // x.shape[-1]
    np.testing.assert_allclose(larger - 0.9, (var - 0.9) * n / (n - 1), rtol=1e-4)
    assert (larger > var).all()


def test_equal_splits_do_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply, params, stats, x):
        traces.append(apply)
        return apply(params, stats, x, train=False)

    for _ in range(2):
        model = models.build("convnet", **TINY["convnet"])
        client, _ = models.split(model, "medium", seed=3)
        run(client.apply, client.params, client.stats, batch(model, 2))
    assert len(traces) == 1
    assert client.apply == tiny_halves("convnet")[0].apply != tiny_halves("convnet")[1].apply


def test_a_half_is_a_pytree():
    client, _ = tiny_halves("convnet")
    apply = jax.jit(lambda half, x: half.apply(half.params, half.stats, x, train=False))
    h, _ = apply(client, batch(tiny("convnet"), 2))
    assert h.shape == (2, 4, 4, 8)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(client))


def test_dropout_needs_a_key_in_training_only():
    client, server = tiny_halves("vgg19")
    h = jnp.ones((2, 4, 4, 8))
    assert server.apply.needs_key and not client.apply.needs_key
    with pytest.raises(ValueError, match=r"key must be given .* dense17, dense18"):
        server.apply(server.params, server.stats, h, train=True)
    _, dense = models.split(tiny("vgg19"), 16, seed=3)
    h = jax.random.normal(jax.random.key(0), (2, 1, 1, 16))
    assert dense.apply(dense.params, dense.stats, h, train=False)[0].shape == (2, 5)
    key, other = jax.random.split(jax.random.key(0))
    y, _ = dense.apply(dense.params, dense.stats, h, train=True, key=key)
    np.testing.assert_array_equal(y, dense.apply(dense.params, dense.stats, h, train=True, key=key)[0])
    assert not np.array_equal(y, dense.apply(dense.params, dense.stats, h, train=True, key=other)[0])


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_activations(activation):
    model = tiny("convnet", activation=activation)
    client, _ = models.split(model, "shallow", seed=3)
    h, _ = client.apply(client.params, client.stats, batch(model, 4), train=True)
    assert (float(h.min()) < 0) == (activation != "relu")
    assert activation != "tanh" or float(jnp.abs(h).max()) <= 1


def test_bfloat16_features_and_float32_state():
    name = "convnet"
    model = tiny(name, dtype=jnp.bfloat16)
    client, server = models.split(model, "medium", seed=3)
    assert_trees_equal(client, tiny_halves(name)[0]._replace(apply=client.apply))
    x = batch(model, 4)
    h, client_stats = client.apply(client.params, client.stats, x, train=True)
    y, server_stats = server.apply(server.params, server.stats, h, train=True)
    assert (h.dtype, y.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves((client_stats, server_stats))} == {jnp.dtype("float32")}
    full, _ = tiny_halves(name)[0].apply(client.params, client.stats, x, train=True)
    np.testing.assert_allclose(h.astype(jnp.float32), full, atol=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "resnet50"}, ValueError, "name must be one of convnet, .*, got 'resnet50'"),
        ({"input_shape": (32, 32)}, ValueError, "input_shape must be three positive integers"),
        ({"input_shape": (32, 0, 3)}, ValueError, "input_shape must be three positive integers"),
        ({"input_shape": DIGITS, "name": "vgg19"}, ValueError, "sides of at least 32 for vgg19, got \\(8, 8, 1\\)"),
        ({"num_classes": 0}, ValueError, "num_classes must be a positive integer, got 0"),
        ({"width": 0.0}, ValueError, "width must be above 0 and finite, got 0.0"),
        ({"activation": "elu"}, ValueError, "activation must be one of relu, .*, got 'elu'"),
        ({"dtype": "float16"}, TypeError, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"dtype": "half-ish"}, TypeError, "dtype must be float32 or bfloat16, got 'half-ish'"),
        ({"first_block": "plain"}, ValueError, "first_block must be"),
        ({"conv_init": "zeros"}, ValueError, 'conv_init must be "he_normal" or "dirac", got'),
        ({"conv_init": "dirac", "name": "mlp"}, ValueError, 'conv_init must be "he_normal" for mlp'),
        ({"shortcut": "identity"}, ValueError, 'shortcut must be "projection" or "zero_padding", got \'identity\''),
        (
            {"shortcut": "zero_padding", "name": "vgg19"},
            ValueError,
            "shortcut must be .* for vgg19, not one of resnet18",
        ),
        ({"first_block": "paper", "name": "vgg19"}, ValueError, 'first_block must be "residual" for vgg19'),
    ],
)
def test_build_names_argument_rule_and_value(unchecked, change, error, message):
    with pytest.raises(error, match=message):
        models.build(**({"name": "resnet18", "input_shape": CIFAR, "num_classes": 10} | change))


def test_a_cut_inside_a_block_names_the_boundaries():
    model = tiny("resnet18")
    with pytest.raises(ValueError, match=r'cut must be one of 1, 3, 5, .*shallow = 3.* got 2; .*first_block="paper"'):
        models.split(model, 2)
    for cut in (0, 4, 18, "middle"):
        with pytest.raises(ValueError, match="cut must be one of 1, 3, 5, 7, 9, 11, 13, 15, 17 or"):
            models.split(model, cut)


def test_a_users_own_model():
    class Scale(nnx.Module):
        def __init__(self, rngs):
            self.factor = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, train, key=None):
            return x * self.factor[...]

    blocks = tuple(models.Block.of(f"scale{i}", i, Scale) for i in (1, 2, 3))
    model = models.Model("mine", DIGITS, 1, jnp.dtype("float32"), blocks, (("shallow", 1),))
    client, server = models.split(model, "shallow")
    assert (list(client.params), list(server.params), client.stats) == (["scale1"], ["scale2", "scale3"], {})
    y, stats = server.apply(server.params, server.stats, jnp.ones((2, *DIGITS)), train=True)
    np.testing.assert_array_equal(y, jnp.ones((2, *DIGITS)))
    assert stats == {}
    assert models.count_params(dataclasses.replace(model, blocks=blocks[:2])) == 2


@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [
        (3, 1, (3, 7, 6, 8, 5)),
        (3, 1, (2, 4, 4, 64, 16)),
        (3, 1, (1, 1, 1, 4, 4)),
        (3, 2, (3, 8, 6, 4, 5)),
        (3, 2, (2, 7, 5, 3, 4)),
        (3, 2, (1, 1, 1, 2, 3)),
        (3, 1, (2, 2, 5, 3, 4)),  # small maps, which are products on a CPU
        (3, 1, (2, 3, 1, 3, 4)),
        (3, 2, (2, 4, 3, 3, 4)),
        (1, 1, (2, 4, 3, 4, 5)),
        (1, 2, (2, 8, 7, 4, 5)),
    ],
    ids=str,
)
def test_the_convolution_has_the_gradients_of_the_plain_one(kernel, stride, shape):
    n, h, w, i, o = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, n, h, w, i)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, i, o)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(2, n, -(-h // stride), -(-w // stride), o)), jnp.float32)
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(conv):
        def total(x, weights):
            y = jax.vmap(lambda x: conv(x, weights, (stride, stride), [(kernel // 2,) * 2] * 2, **layout))(x)
            return jnp.vdot(y, g), y

        return jax.grad(total, argnums=(0, 1), has_aux=True)(x, weights)

    found, plain = (gradients(conv) for conv in (_conv.conv_general_dilated, jax.lax.conv_general_dilated))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut", "activation"),
    [("convnet", 2, "tanh"), ("convnet", 4, "relu"), ("resnet9", "medium", "gelu"), ("resnet20", "shallow", "silu")],
)
def test_cut_before_the_activation(name, cut, activation):
    """The same network, whose features have both signs."""
    shape = (8, 8, 1) if name == "convnet" else (16, 16, 3)
    model = models.build(name, input_shape=shape, num_classes=5, width=0.125, activation=activation)
    x = jax.random.normal(jax.random.key(1), (4, *shape))
    plain, before = (models.split(model, cut, cut_before_activation=b) for b in (False, True))
    found = []
    for client, server in (plain, before):
        h, client_stats = client.apply(client.params, client.stats, x, train=True)
        y, server_stats = server.apply(server.params, server.stats, h, train=True)
        found.append((h, y, client_stats, server_stats))
    assert (found[1][0] < -0.5).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0][1:], found[1][1:])


@pytest.mark.parametrize(
    ("name", "cut", "activation", "said"),
    [("resnet9", 4, "relu", "a block that ends with one, got residual4"), ("convnet", 2, "gelu", "before a pool")],
)
def test_cuts_without_an_activation_to_cut_before(name, cut, activation, said):
    shape = (8, 8, 1) if name == "convnet" else (16, 16, 3)
    model = models.build(name, input_shape=shape, num_classes=5, width=0.125, activation=activation)
    with pytest.raises(ValueError, match=f"cut_before_activation must .*{said}"):
        models.split(model, cut, cut_before_activation=True)


@pytest.mark.parametrize(("side", "stride", "channels", "features"), [(6, 2, 4, 8), (5, 2, 3, 6), (4, 1, 2, 5)])
def test_the_zero_padding_shortcut_against_numpy(side, stride, channels, features):
    """Option A: every second pixel, and zero channels on both sides, a quarter of all for twice as many."""
    options = {"stride": stride, "activation": "relu", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    block = BasicBlock(channels, features, shortcut="zero_padding", **options)
    assert block.shortcut is None
    block.conv2.norm.scale[...] = jnp.zeros(features)  # nothing but the shortcut is left
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, side, side, channels)))
    want = np.zeros((2, -(-side // stride), -(-side // stride), features), np.float32)
    for row in range(want.shape[1]):
        for column in range(want.shape[2]):
            for channel in range(channels):
                at = channel + (features - channels) // 2
                want[:, row, column, at] = np.maximum(x[:, stride * row, stride * column, channel], 0)
    np.testing.assert_array_equal(block(jnp.asarray(x), train=False), want)


def test_zero_padding_takes_the_projections_alone_away():
    shapes = {"input_shape": CIFAR, "num_classes": 10, "width": 1 / 8}
    padded, projected = (
        models.whole(models.build("resnet20", **shapes, shortcut=shortcut)).params
        for shortcut in ("zero_padding", "projection")
    )
    for name in ("stage2_block1", "stage3_block1"):
        del projected[name]["shortcut"]
    assert_trees_equal(padded, projected)
