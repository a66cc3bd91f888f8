"""A model, data and task of one's own: trained through the cut in one program, and the same by parties apart."""

import dataclasses
import functools
import json
import re
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import msjax
from msjax import build, compress, config, data, models, modes, tasks
from msjax.cli import main as cli
from msjax.distributed import agreement
from msjax.pair import Pair, predict
from msjax.parts import save_part
from msjax.runs import RunFolder
from msjax.split import parties
from msjax.split.make_spec import init_part
from msjax.training import api, from_config, loop

from .helpers import assert_close
from .own_models import Decoder, Dense, Encoder, LinenBody, LinenHead, affine, as_set, counting, numbers, squares

CODEC = {"": compress.RandK(0.5), "skips/0": compress.RandK(0.75)}
UNET = {"codec": CODEC, "grad_codec": compress.RandK(0.5), "task": tasks.segmentation(2)}
TABLE = {"codec": compress.Identity(), "task": "regression"}
COMMON = {"clients": 2, "batch_size": 8, "epochs": 2, "optimizer": optax.sgd(0.05, momentum=0.9)}


def unet():
    return Encoder(nnx.Rngs(0)), Decoder(nnx.Rngs(1))


def mlp_linen():
    return LinenBody(16), LinenHead()


def three_parts():
    return Encoder(nnx.Rngs(0)), (counting, {"w": jnp.eye(6), "b": jnp.zeros(6)}, first_stats()), LinenHead()


def first_stats():
    return {"steps": jnp.int32(0), "mean": jnp.float32(0)}


class Flat(nnx.Module):
    """The encoder's first array alone, flattened."""

    def __init__(self, rngs):
        self.encoder = Encoder(rngs)

    def __call__(self, x):
        return self.encoder(x)["h"].mean((1, 2))


CASES = {
    "a U-Net with a skip connection and a mask across the cut": (unet, squares, UNET),
    "an MLP in Linen with batch normalisation": (mlp_linen, numbers, TABLE),
    "U-shaped, of NNX, a function and Linen": (
        lambda: (Flat(nnx.Rngs(0)), (counting, Dense(6, 6)(), first_stats()), LinenHead()),
        lambda n, seed=0: (squares(n, seed)[0], squares(n, seed)[0].mean((1, 2, 3))),
        TABLE,
    ),
}
MODES = {"parallel": modes.Parallel(), "splitfed": modes.SplitFed(2), "sequential": modes.Sequential(turn_steps=2)}
PAIRS = [
    pytest.param(case, mode, marks=[] if (case[:6], mode) == ("an MLP", "parallel") else [pytest.mark.slow])
    for case in CASES
    for mode in MODES
    if case.startswith("a U") or mode != "splitfed"
]


def parties_of(spec, model, dataset, seed=0):
    """The parties of the run that `msjax.train` made, each with its own data."""
    x = jax.eval_shape(spec.preprocess, jax.tree.map(lambda a: a[:2], dataset.train_inputs))
    parts = models.as_parts(model, x, seed=seed)
    client, server = init_part(spec.optimizer, parts[0], *parts[2:]), init_part(spec.optimizer, parts[1])
    indices = data.partition(len(dataset.train), spec.schedule.clients, seed=seed)
    clients = [
        parties.Client(
            n,
            spec,
            client,
            parties.ClientData(data.Arrays(*dataset.train.fetch(own)), dataset.test),
            seed,
        )
        for n, own in enumerate(indices)
    ]
    return parties.Server(spec, server, seed), clients


@pytest.mark.parametrize(("case", "mode"), PAIRS)
def test_one_program_equals_the_parties(case, mode):
    make_model, make_data, options = CASES[case]
    dataset = as_set(make_data)
    result = msjax.train(make_model(), dataset, mode=MODES[mode], **COMMON, **options)
    server, clients = parties_of(result.spec, make_model(), dataset)
    for _ in parties.run(server, clients):
        pass
    trained, last = clients[-1].state, result.parts
    assert_close(server.state[:2], (last[1].params, last[1].stats), 1e-5)
    params = last[0].params if len(last) == 2 else {"client": last[0].params, "tail": last[2].params}
    assert_close(trained.params, params, 1e-5)
    losses = [record["train"]["loss"] for record in result.history]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert result.test.keys() == {"loss", *(name for name, _ in result.spec.task.metrics)}
    assert result.predict(dataset.test_inputs[:3]).shape[0] == 3


@pytest.mark.slow
def test_bytes_of_a_tree_of_features():
    """Each array by its codec, a mask of booleans at a bit each, gradients of the floating arrays alone."""
    codec = {"": compress.Identity(), "skips/0": compress.TopK(0.9)}
    result = msjax.train(unet(), as_set(squares), task=tasks.segmentation(2), codec=codec, **COMMON)
    batch, steps, clients = 8, 2 * 3, 2
    sizes = [8, 8, 4]  # of a client's 20 samples
    mask = sum(-(-n * 64 // 8) for n in sizes)
    h = sum(4 * n * 4 * 4 * 6 for n in sizes)
    skip = sum(compress.TopK(0.9).payload_bytes(jax.ShapeDtypeStruct((n, 8, 8, 4), jnp.float32)) for n in sizes)
    assert result.traffic.uplink_feature_bytes == 2 * clients * (mask + h + skip)
    assert result.cut_bytes == result.traffic.uplink_feature_bytes + result.traffic.downlink_gradient_bytes
    assert result.total_bytes == result.traffic.uplink_bytes + result.traffic.downlink_bytes
    down = sum(4 * n * (4 * 4 * 6 + 8 * 8 * 4) for n in sizes)
    assert result.traffic.downlink_gradient_bytes == 2 * clients * down
    assert result.traffic.uplink_label_bytes == 2 * clients * sum(4 * n * 64 for n in sizes)
    assert result.history[-1]["step"] == steps and batch == 8


@pytest.mark.parametrize("kind", ["nnx", "linen", "list"])
def test_a_sequential_model_and_a_cut(kind):
    if kind == "linen":
        model = linen.Sequential([linen.Dense(8), jnp.tanh, linen.Dense(1)])
    else:
        layers = [nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1))]
        model = nnx.Sequential(*layers) if kind == "nnx" else layers
    x, y = numbers(64)
    result = msjax.train(model, (x, y), cut=2, clients=2, batch_size=8, epochs=6, **TABLE)
    assert result.spec.features.leaves[0].shape == (8,)
    assert result.history[-1]["train"]["loss"] < result.history[0]["train"]["loss"] / 2
    with pytest.raises(ValueError, match=r"cut must be in 1..2, the number of layers on the client, got 3"):
        msjax.train(model, (x, y), cut=3, **TABLE)


@pytest.mark.slow
def test_a_run_in_a_folder_goes_on_and_its_parts_can_be_loaded(tmp_path, monkeypatch):
    options = {**COMMON, **UNET, "epochs": 3}
    whole = msjax.train(unet(), as_set(squares), **options)
    run = tmp_path / "run"
    epochs = []
    original = msjax.runs.RunFolder.write_history

    def interrupt(self, history):
        original(self, history)
        epochs.append(len(history))
        if len(epochs) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(msjax.runs.RunFolder, "write_history", interrupt)
    with pytest.raises(KeyboardInterrupt):
        msjax.train(unet(), as_set(squares), folder=str(run), **options)
    again = msjax.train(unet(), as_set(squares), folder=str(run), **options)
    assert [r["train"] for r in again.history] == [r["train"] for r in whole.history]
    assert again.test == whole.test
    with pytest.raises(ValueError, match=r"folder must be new or that of the same run, .* differs in batch_size"):
        msjax.train(unet(), as_set(squares), folder=str(run), **{**options, "batch_size": 4})
    loaded = msjax.load_part(run / "server.safetensors", Decoder(nnx.Rngs(7)))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.server.params)
    features, _ = whole.client.apply(whole.client.params, whole.client.stats, squares(2)[0], train=False)
    ours, theirs = (p.apply(p.params, p.stats, features, train=False)[0] for p in (whole.server, loaded))
    np.testing.assert_array_equal(ours, theirs)
    bare = msjax.load_part(run / "client.safetensors")
    assert bare.apply is None and bare.params["conv1"]["kernel"].shape == (3, 3, 1, 4)


class Narrow(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


class Around(linen.Module):
    inner: linen.Module

    def __call__(self, x):
        return self.inner(x)


class Stack(nnx.Module):
    """Has layers, but is no Sequential."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


class Doubled(linen.Sequential):
    """A Sequential that does more than its layers do."""

    @linen.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Told(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        return linen.BatchNorm(use_running_average=not train)(x)


class ToldNnx(nnx.Module):
    def __call__(self, x, deterministic: bool = True):
        return x


class Untold(linen.Module):
    """Has a layer that must know whether it trains, and is not told."""

    layer: linen.Module

    @linen.compact
    def __call__(self, x):
        return self.layer(x)


class Noisy(linen.Module):
    """Draws from a stream of its own."""

    always: bool = False

    @linen.compact
    def __call__(self, x, train):
        noise = jax.random.normal(self.make_rng("noise"), x.shape) if train or self.always else 0.0
        return linen.Dense(4)(x) + noise


class Keeping(nnx.Module):
    """Keeps features for whoever wants to look at them."""

    def __init__(self):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.features = nnx.Intermediate(x)
        return self.norm(self.linear(x))


@pytest.mark.parametrize("client", [Noisy(), Keeping()], ids=lambda module: type(module).__name__)
def test_streams_of_other_names_and_intermediates(unchecked, client):
    """Noise is drawn in training, anew for each key; intermediates are no part of the statistics."""
    if isinstance(client, Keeping):
        client(jnp.ones((2, 4)))  # an earlier call leaves some
    (part, _) = models.as_parts((client, linen.Dense(1)), jnp.ones((2, 4)))

    def run(seed, train):
        return part.apply(part.params, part.stats, jnp.ones((2, 4)), train=train, key=jax.random.key(seed))

    (first, stats), (second, _) = run(0, True), run(1, True)
    assert jnp.array_equal(first, second) == isinstance(client, Keeping)
    assert jax.tree.structure(stats) == jax.tree.structure(part.stats)
    assert jnp.array_equal(run(0, False)[0], run(1, False)[0])
    history = msjax.train((client, linen.Dense(1)), numbers(40), task="regression", clients=2, batch_size=8, epochs=1)
    assert np.isfinite(history.history[-1]["train"]["loss"])
    assert isinstance(client, Noisy) or client.features[...].shape == (2, 4)


class Frozen(nnx.Module):
    """Its batch normalisation is not trained."""

    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.scale = np.ones(4)  # of NumPy, float64

    def train(self, **attributes):
        super().train(**attributes)
        self.norm.eval()

    def __call__(self, x):
        return self.norm(x) * self.scale


def test_a_part_that_keeps_its_normalisation_frozen(unchecked):
    options = {"task": "regression", "clients": 2, "batch_size": 8, "epochs": 1}
    stats = msjax.train((Frozen(), linen.Dense(1)), numbers(40), **options).client.stats
    assert not stats["norm"]["mean"].any() and stats["scale"].dtype == jnp.float32


class Half(linen.Module):
    """With a method of its own that is a function of parameters."""

    def half(self, params, x):
        return 0.5 * x @ params["w"]


def test_weights_that_are_there_already(unchecked):
    """Of Linen as a pair of module, or its apply, and variables: statistics are none of what is trained."""
    module = LinenBody(16)
    variables = module.init(jax.random.key(3), jnp.ones((2, 4)), train=False)
    x = jnp.ones((2, 4))
    frozen = jax.tree.map(np.float64, flax.core.freeze(variables))
    for pair in ((module, variables), (module.apply, variables), (module, frozen)):
        part = models.as_part(pair, x)
        assert set(part.stats) == {"batch_stats"} and part.apply == models.as_part(module, x).apply
        jax.tree.map(np.testing.assert_array_equal, part.params, variables["params"])
    with pytest.raises(ValueError, match=r"variables must be all that LinenBody has, .*, got"):
        models.as_part((module, {"params": variables["params"]}), x)
    assert isinstance(
        models.as_part((Half().half, {"w": x})).apply, type(models.as_part((affine, Dense(4, 4)())).apply)
    )


@pytest.mark.slow
def test_the_parts_of_a_u_shaped_run_are_read_into_modules_and_trained_again(tmp_path, unchecked):
    make = lambda: tuple(nnx.Linear(4, n, rngs=nnx.Rngs(n)) for n in (4, 4, 1))  # noqa: E731
    options = {"task": "regression", "clients": 2, "batch_size": 8, "epochs": 1}
    first = msjax.train(make(), numbers(40), folder=tmp_path / "run", **options)
    modules = make()
    parts = [
        msjax.load_part(tmp_path / "run" / f"{name}.safetensors", module)
        for name, module in zip(models.PARTS, modules, strict=True)
    ]
    for module, part, trained in zip(modules, parts, first.parts, strict=True):
        nnx.update(module, part.params)
        np.testing.assert_array_equal(module.kernel[...], trained.params["kernel"])
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(modules[2](modules[1](modules[0](x))), first.predict(x), rtol=1e-5)
    again = [msjax.train(tuple(given), numbers(40), **options).history[-1]["train"] for given in (parts, first.parts)]
    assert again[0] == again[1] != first.history[-1]["train"]


@pytest.mark.slow
def test_the_parts_of_a_u_shaped_run_of_an_earlier_version_are_read(tmp_path):
    """They had the part's name before those of their arrays."""
    module = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    part = models.as_part(module)
    save_part(tmp_path / "tail.safetensors", "tail", part.scoped("tail"))
    loaded = msjax.load_part(tmp_path / "tail.safetensors", module)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, part.params)


@pytest.mark.parametrize("params", [{"tail": {"w": np.ones(3)}}, np.ones(3)], ids=["of its name", "one array"])
def test_parts_whose_arrays_are_named_otherwise_are_read_as_they_are(tmp_path, params):
    part = models.ModelPart(affine, params, {})
    save_part(tmp_path / "tail.safetensors", "tail", part)
    loaded = msjax.load_part(tmp_path / "tail.safetensors", part)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def integers(params, x):
    return (x > 0).astype(jnp.int32)


def empty(params, x):
    return x[:, :0]


def sums(params, x):
    return params["w"] + x.sum(1, keepdims=True)


def no_batch(params, x):
    return x.mean(0)


TWO = (affine, Dense(4, 4)()), (affine, Dense(4, 1)())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ((TWO[0], Narrow()), {}, r"server must take float32\[2, 4\], but raised TypeError"),
        (
            (Untold(linen.BatchNorm()), TWO[1]),
            {},
            "client must be told whether it trains: .* use_running_average and pass",
        ),
        (
            (Untold(linen.Dropout(0.5)), TWO[1]),
            {},
            "client must be told whether it trains: .* deterministic and pass it",
        ),
        ((Noisy(always=True), TWO[1]), {}, "client must draw random numbers in training alone: .*InvalidRngError"),
        (((integers, {}), TWO[1]), {}, r"client must return at least one floating array .*, got int32\[4\]"),
        (
            ((empty, {}), (sums, {"w": jnp.ones(1)})),
            {},
            r"client must return floating arrays with values, got float32\[0\]",
        ),
        (((no_batch, {}), TWO[1]), {}, r"client returns must have the batch of 2 as its first axis, got float32\[4\]"),
        ((TWO[0],), {}, "model must have two parts, client and server, or three with a tail, got 1"),
        ((TWO[0], (affine, {"w": 1.0})), {}, "server must have arrays of numbers, got float at 'w'"),
        (((affine, {"key": jax.random.key(0)}), TWO[1]), {}, r"client must have arrays of numbers, got key.* at 'key'"),
        ((TWO[0], "server"), {}, "server must be an nnx.Module, a linen.Module, .* got str"),
        (TWO[0][0], {}, "model must be a tuple of client and server part"),
        (TWO, {"codec": {"skip": compress.TopK()}}, "codec must name floating arrays .* got 'skip'"),
        (TWO, {"codec": {"": 3}}, r"codec\[''\] must be a codec of msjax.compress, got 3"),
        (TWO, {"task": "sorting"}, "task must be a tasks.Task or one of classification, .*, got 'sorting'"),
        (TWO, {"task": "segmentation"}, r"task 'segmentation' needs options: give tasks.segmentation"),
        (TWO, {"task": "classification"}, "labels must be integers|labels to be integer|must take outputs"),
        (TWO, {"clients": 41}, r"clients must be in 1..40"),
        (TWO, {"mode": "splitfed"}, r"mode must be a mode of msjax.split.modes, .* got 'splitfed'"),
        (TWO, {"seed": -1}, "seed must be an integer in 0..4294967295, got -1"),
        (TWO, {"seed": 2**32}, "seed must be an integer in 0..4294967295, got 4294967296"),
        (TWO, {"optimizer": config.OptimConfig(gamma=-1.0)}, "optim.gamma must be above 0, got -1.0"),
        (TWO, {"optimizer": config.OptimConfig(milestones=(3,))}, r"optim.milestones must be \(\), its default"),
        (TWO, {"optimizer": config.OptimConfig(label_smoothing=0.1)}, "label_smoothing of the optimizer must be 0"),
        (TWO, {"alpha": "a"}, "alpha must be a number above 0, or None, got 'a'"),
        (TWO, {"augment": "flipp"}, "augment must be a function or one of .*, got 'flipp'"),
        ((ONE := Narrow(), ONE), {}, "model must have weights of its own in each part, got .* in two of them"),
        (nnx.Sequential(ONE, nnx.relu, ONE), {"cut": 2}, "model must have weights of its own in each part"),
        (linen.Sequential([LAYER := linen.Dense(4), LAYER]), {"cut": 1}, "own in each part, got one Dense in two of"),
        (Stack(), {"cut": 1}, "with cut, model must be a list of layers, .* got Stack"),
        (
            Doubled([linen.Dense(4), linen.Dense(1)]),
            {"cut": 1},
            "with cut, model must be a list of .* got Doubled",
        ),
        (
            [Told(), linen.Dense(1)],
            {"cut": 1},
            "client must be told whether it trains: .* not pass train on to its Told",
        ),
        (
            [nnx.relu, nnx.Sequential(ToldNnx()), Narrow()],
            {"cut": 1},
            "server must be told .* pass deterministic on to",
        ),
        (
            (TWO[0], (affine, {**Dense(4, 1)(), "n": jnp.int32(2)})),
            {},
            "server must have floating parameters, got int32 at 'n'",
        ),
        (TWO, {"clients": 0}, "clients must be an integer of at least 1, got 0"),
        (TWO, {"epochs": 1.5}, "epochs must be an integer of at least 1, got 1.5"),
        (TWO, {"optimizer": "adam"}, "optimizer must be an optax transformation or an OptimConfig, got 'adam'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(unchecked, model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        msjax.train(model, numbers(40), **{"task": "regression", "clients": 2, "batch_size": 8, **options})


@pytest.mark.parametrize(
    ("activation", "codec", "share"),
    [
        (jnp.tanh, compress.MaskEncoded(), 50),
        (jnp.tanh, {"": compress.EntropyMask(signed=True)}, None),
        (jnp.tanh, compress.Uniform(), None),
        (nnx.relu, compress.MaskEncoded(), None),
        (nnx.gelu, compress.EntropyMask(), None),
    ],
)
def test_a_codec_that_loses_half_of_the_features_is_told(activation, codec, share, caplog):
    client = (lambda p, x: activation(x @ p["w"]), {"w": jnp.eye(4)})
    msjax.train((client, (affine, Dense(4, 1)())), numbers(40), task="regression", clients=2, epochs=1, codec=codec)
    said = [int(found[1]) for m in caplog.messages if (found := re.search(r"as 0, and these are (\d+) % of the", m))]
    assert len(said) == (share is not None) and all(abs(one - share) < 20 for one in said)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ByPlace:
    """As `models.split` has them, for which a key is one of the whole network."""

    draws_by_place = True

    def __call__(self, params, stats, x, *, train, key=None):
        return x * jax.random.bernoulli(key, 0.5, x.shape) if train else x, stats


def test_client_and_tail_drop_other_places():
    """They have one key in a step, and modules alike would else draw the same mask."""
    x = jnp.ones((4, 100))
    drop = lambda p, x, train=False, key=None: x * jax.random.bernoulli(key, 0.5, x.shape) if train else x  # noqa: E731
    placed = models.ModelPart(ByPlace(), {}, {})
    client, _, tail = models.as_parts((placed, (affine, Dense(100, 100)()), placed), x)
    found = [part.apply({part.apply.name: {}}, {}, x, train=True, key=jax.random.key(1))[0] for part in (client, tail)]
    np.testing.assert_array_equal(*found)  # such as msjax cuts draw by themselves, as before they were cut
    for kind in ((drop, {}), nnx.Dropout(0.5, rngs=nnx.Rngs(0))):
        client, _, tail = models.as_parts((kind, (affine, Dense(100, 100)()), kind), x)
        masks = [
            np.asarray(part.apply(part.params, part.stats, x, train=True, key=jax.random.key(1))[0]) > 0
            for part in (client, tail)
        ]
        assert all(0.3 < mask.mean() < 0.7 for mask in masks) and 0.3 < (masks[0] == masks[1]).mean() < 0.7


def test_the_users_arrays_live_on_and_the_same_parts_give_the_same_run(unchecked):
    functions = ((lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}), (lambda p, x: x @ p["w"], {"w": jnp.ones((4, 1))}))
    modules = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))
    for parts, first in ((functions, lambda: functions[0][1]["w"]), (modules, lambda: modules[0].kernel[...])):
        before = np.array(first())
        options = {"task": "regression", "clients": 2, "batch_size": 8, "epochs": 1}
        results = [msjax.train(parts, numbers(40), **options).history[-1]["train"] for _ in range(2)]
        assert results[0] == results[1]
        np.testing.assert_array_equal(first(), before)


def test_a_plain_function_is_told_that_it_trains():
    def noisy(params, x, train=False, key=None):
        return x + jax.random.normal(key, x.shape) if train else x

    part = models.as_part((noisy, {}))
    x = jnp.zeros((2, 3))
    assert np.any(part.apply({}, {}, x, train=True, key=jax.random.key(0))[0] != 0)
    np.testing.assert_array_equal(part.apply({}, {}, x, train=False)[0], x)


def test_a_loss_of_other_options_is_not_taken_for_that_of_a_folder(tmp_path):
    """Of an older folder, which does not say its loss, it is taken for the same."""
    x, y = numbers(40)
    options = {"clients": 2, "batch_size": 8, "epochs": 1, "folder": str(tmp_path / "run")}
    labels = np.zeros(len(y), np.int32)
    plain, smooth = tasks.classification(), tasks.classification(label_smoothing=0.5)
    msjax.train(TWO, (x, labels), task=plain, **options)
    with pytest.raises(ValueError, match="whose run differs in loss"):
        msjax.train(TWO, (x, labels), task=smooth, **options)
    described = json.loads((tmp_path / "run/spec.json").read_text())
    (tmp_path / "run/spec.json").write_text(json.dumps({n: v for n, v in described.items() if n != "loss"}))
    msjax.train(TWO, (x, labels), task=plain, **options)


def test_another_run_is_not_taken_for_that_of_a_folder(unchecked, tmp_path):
    options = {"task": "regression", "clients": 2, "batch_size": 8, "epochs": 1, "folder": str(tmp_path / "run")}
    x, y = numbers(40)
    msjax.train(TWO, (x, y), **options)
    others = {
        "seed": {"seed": 7},
        "optimizer": {"optimizer": msjax.config.OptimConfig(learning_rate=1e-3)},
        "data": {"data": (2 * x, y)},
    }
    for what, change in others.items():
        with pytest.raises(ValueError, match=f"whose run differs in .*{what}"):
            msjax.train(TWO, **{"data": (x, y), **options, **change})
    (tmp_path / "file").write_text("")
    for bad in ("", str(tmp_path / "file")):
        with pytest.raises(ValueError, match=r"folder must be (the path of a folder|a path, got '')"):
            msjax.train(TWO, (x, y), **{**options, "folder": bad})


def test_labels_of_each_pixel_move_with_an_augmentation_of_ones_own(tmp_path):
    options = {"task": tasks.segmentation(2), "seed": 3, **COMMON, "epochs": 1}
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (32, 8, 8, 1), dtype=np.uint8), rng.integers(0, 2, (32, 8, 8), dtype=np.int32)
    moved, stayed = (
        msjax.train(unet(), data, augment=augment, **options)
        for data, augment in (
            ((images, masks), lambda x, y, key: (x[:, :, ::-1], y[:, :, ::-1])),
            ((images[:, :, ::-1], masks[:, :, ::-1]), "none"),
        )
    )
    assert_close(moved.parts[1].params, stayed.parts[1].params, 1e-5)
    assert moved.history[-1]["train"] == pytest.approx(stayed.history[-1]["train"], rel=1e-4)
    for augment, message in (
        ("flip", r'augment must be "none", or a function of \(inputs, labels, key\), for labels of int32'),
        (lambda x, y, key: x, r"augment must return \(inputs, labels\) where it is given labels, got <class"),
        (lambda x, y, key: (x, y * 1.0), r"augment must return labels of the shapes and dtypes .*int32.*, got float32"),
        (lambda x, y, key: (x, y[:, :4]), r"augment must return labels of the shapes and dtypes that it is given"),
    ):
        with pytest.raises(ValueError, match=message):
            msjax.train(unet(), (images, masks), augment=augment, folder=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


def test_labels_out_of_range_are_refused_before_the_first_step():
    x, _ = numbers(20)
    y = np.arange(20, dtype=np.int32) % 4
    with pytest.raises(ValueError, match=r"training data of .*: labels? .*must be in 0\.\.2.*got 3"):
        msjax.train((TWO[0], (affine, Dense(4, 3)())), (x, y), clients=2, batch_size=5)


def test_a_linen_module_that_cannot_be_hashed_is_named():
    class Listed(linen.Module):
        sizes: list

        @linen.compact
        def __call__(self, x):
            return linen.Dense(self.sizes[0])(x)

    with pytest.raises(
        TypeError, match=r"client must have fields that can be hashed, tuples rather than lists; Listed"
    ):
        models.as_parts((Listed([3]), LinenHead()), jax.ShapeDtypeStruct((2, 4), jnp.float32))


QUICK = {"clients": 2, "batch_size": 6, "epochs": 1}


class Two(nnx.Module):
    """A layer that returns two arrays, as a tuple or by name."""

    def __init__(self, by_name):
        self.linear, self.by_name = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), by_name

    def __call__(self, x):
        return {"h": self.linear(x), "skip": x} if self.by_name else (self.linear(x), x)


class Join(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(8, 1, rngs=nnx.Rngs(1))

    def __call__(self, h, skip):
        return self.linear(jnp.concatenate([h, skip], -1))


class TwoLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x), x


class JoinLinen(linen.Module):
    @linen.compact
    def __call__(self, h, skip):
        return linen.Dense(1)(jnp.concatenate([h, skip], -1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnx.Sequential(Two(False), Join()),
        lambda: nnx.Sequential(Two(True), Join()),
        lambda: linen.Sequential([TwoLinen(), JoinLinen()]),
    ],
    ids=["tuple", "dict", "Linen"],
)
def test_what_crosses_a_cut_is_given_to_the_next_layer_as_without_one(make):
    x, model = numbers(6)[0], make()
    parts = models.as_parts(make(), x, cut=1, seed=3)
    found = x
    for part in parts:
        found, _ = part.apply(part.params, part.stats, found, train=False)
    if isinstance(model, nnx.Module):
        want = model(x)
    else:
        layers = [parts[0].params["layers_0"], parts[1].params["layers_0"]]
        want = model.apply({"params": dict(zip(("layers_0", "layers_1"), layers, strict=True))}, x)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    with pytest.raises(TypeError, match="got Doubled"):
        models.as_parts(Doubled([linen.Dense(1)]), x, cut=1)
    own = models.as_part(Doubled([linen.Dense(1)]), x)
    plain = models.as_part(linen.Sequential([linen.Dense(1)]), x)
    doubled, single = (part.apply(own.params, {}, x, train=False)[0] for part in (own, plain))
    np.testing.assert_allclose(doubled, 2 * single, rtol=1e-6)


def test_one_module_within_two_parts_is_told(caplog):
    """Linen ties weights within one model alone. It may have none, so it is not refused."""
    layer, x = linen.Dense(4), numbers(6)[0]
    assert len(models.as_parts(linen.Sequential([Around(layer), Around(layer)]), x, cut=1)) == 2
    assert caplog.text.count("two parts of the model share one Dense; if it has weights, they are not shared") == 1
    models.as_parts(linen.Sequential([Around(layer), Around(linen.Dense(4))]), x, cut=1)
    models.as_parts([Around(layer), functools.partial(ToldNnx(), deterministic=True)], x, cut=1)
    assert len(caplog.records) == 1


def test_statistics_of_numpy_are_not_written_into():
    """As those of a part that was loaded are; Flax would write into them, or fail under a gradient."""
    part = models.as_part(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    part = models.as_part(part._replace(stats=jax.tree.map(np.array, part.stats)))
    before = jax.tree.map(np.copy, part.stats)
    x = numbers(6)[0]
    _, after = part.apply(part.params, part.stats, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, part.stats, before)
    assert np.abs(after["mean"]).max() > 0
    jax.grad(lambda params: part.apply(params, part.stats, x, train=True)[0].sum())(part.params)


def test_what_is_no_part_is_named(unchecked, tmp_path):
    with pytest.raises(TypeError, match=r"^module must be an nnx.Module, .* got int"):
        models.as_part(5)
    save_part(tmp_path / "p", "client", models.ModelPart(affine, Dense(4, 4)(), {}))
    with pytest.raises(TypeError, match=r"^model must be an nnx.Module, .* got int"):
        msjax.load_part(tmp_path / "p", 5)
    with pytest.raises(ValueError, match=r"^inputs must be given for a linen.Module"):
        msjax.load_part(tmp_path / "p", (linen.Dense(4), {"params": {}}))


def test_an_optimizer_may_count_in_python(unchecked):
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.01 * g, grads), state + 1

    rule = optax.GradientTransformation(lambda params: 0, update)
    msjax.train(TWO, numbers(12), optimizer=rule, task="regression", codec=compress.Identity(), **QUICK)


def test_a_run_does_not_give_away_what_a_preset_keeps(tmp_path, monkeypatch):
    """A comparison trains twice; its parts may be made once, when the preset is read."""
    (tmp_path / "mine.py").write_text(KEEPS)
    monkeypatch.chdir(tmp_path)
    cfg = config.load_preset("mine.py")
    losses = [loop.train(from_config.load_run(cfg), quiet=True).history[0]["train"]["loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_a_run_goes_on_where_its_preset_has_moved(unchecked, tmp_path, monkeypatch, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        codec = "\n\nclass Own(compress.Identity):\n    pass\n"
        text = KEEPS.replace("import config, data", "import compress, config, data").replace(
            "PARTS =", f"{codec}\nPARTS ="
        )
        (folder / "mine.py").write_text(text.replace("epochs=1,", "epochs=1, codec=Own(), compare=True,"))
    monkeypatch.chdir(tmp_path)
    run = ["--resume", "runs/a"]
    assert cli.run("train", ["--config", "old/mine.py", "--name", "a"]) == 0
    (old / "mine.py").unlink()
    assert cli.run("train", [*run, "--epochs", "2"]) == 2
    assert cli.run("eval", ["runs/a", "--config", "new/mine.py"]) == 0
    assert cli.run("train", [*run, "--epochs", "2", "--config", "new/mine.py"]) == 0
    assert cli.run("train", [*run, "--epochs", "3"]) == 0  # it is written down
    assert cli.run("eval", ["runs/a"]) == 0 and cli.run("eval", ["runs/a/uncompressed"]) == 0
    capsys.readouterr()


def test_inputs_and_labels_in_tuples_in_a_run_with_a_config(unchecked, tmp_path, monkeypatch):
    """Who builds a part from what is written of the data has them as the model and the loss take them."""
    text = KEEPS.replace("x, (x[:, 0] > 0).astype(np.int32)", "(x, x), (x[:, :1], np.ones(24, np.float32))")
    text = text.replace(
        "def affine(params, x):", "def affine(params, x):\n    x = sum(x) if isinstance(x, tuple) else x"
    )
    text = text.replace("**made)", 'task=config.TaskConfig(name=":make_task"), **made)')
    (tmp_path / "mine.py").write_text(text + TUPLES)
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(config.load_preset("mine.py"), out=str(tmp_path / "runs"))
    folder = RunFolder.create(cfg, "run")
    from_config.train_config(cfg, folder, quiet=True)
    folder.close()
    client, server = msjax.load_pair(tmp_path / "runs" / "run")
    ds = data.from_arrays(((np.ones((3, 4), np.float32),) * 2, np.zeros((3, 1), np.float32)))
    assert predict(Pair(client, server), ds.train_inputs).shape == (3, 2)
    summary = agreement.summary_of(agreement.parse(agreement.describe(RUN_SPEC, client.summary)))
    assert (
        build.build(cfg, summary, samples=12, test_samples=0).spec.labels.structure == client.summary.labels.structure
    )


RUN_SPEC = types.SimpleNamespace(describe=dict)
TUPLES = """
def make_task(summary):
    def loss(outputs, labels):
        target, weight = labels
        return weight * (outputs[:, 0] - target[:, 0]) ** 2

    return tasks.Task("weighted", loss)
"""
KEEPS = """
import jax.numpy as jnp, numpy as np
from msjax import config, data, tasks

def affine(params, x):
    return x @ params["w"]

PARTS = tuple((affine, {"w": jnp.ones(shape) * 0.1}) for shape in ((4, 3), (3, 2)))

def get_config():
    made = {"model": config.ModelConfig(name=":make_model"), "data": config.DataConfig(name=":make_data")}
    return config.Config(clients=2, batch_size=6, epochs=1, **made)

def make_model(summary):
    return PARTS

def make_data():
    x = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    return data.from_arrays((x, (x[:, 0] > 0).astype(np.int32)))
"""


def test_a_trained_part_says_how_its_inputs_are_made(unchecked, tmp_path):
    """Whoever uses it elsewhere has the images as they are; taken so, the outputs would be wrong in silence."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 6, 6, 3)).astype(np.uint8), np.arange(24) % 3
    client = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    server = nnx.Sequential(lambda h: h.mean((1, 2)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    result = msjax.train((client, server), (images, labels), folder=str(tmp_path), **QUICK)
    part = msjax.load_part(tmp_path / "client.safetensors", client)
    assert part.summary.classes == result.summary.classes and part.summary.mean == result.summary.mean is not None
    x = part.summary.normalize(images[:3])
    np.testing.assert_array_equal(x, data.normalize(images[:3], part.summary.mean, part.summary.std))
    h, _ = part.apply(part.params, part.stats, x, train=False)
    outputs, _ = result.server.apply(result.server.params, result.server.stats, h, train=False)
    np.testing.assert_allclose(outputs, result.predict(images[:3]), rtol=1e-5, atol=1e-6)
    with pytest.raises(data.DataError, match="inputs must be given as they are stored, as the data set has not stand"):
        result.predict(images[:3], raw=True)


def test_a_number_of_classes_of_numpy_is_written_with_the_parts(unchecked, tmp_path):
    x, y = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 3
    ds = data.from_arrays((x, y), num_classes=y.max() + 1)
    model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    msjax.train(model, ds, cut=1, codec=compress.Identity(), folder=str(tmp_path), **QUICK)
    assert msjax.load_part(tmp_path / "server.safetensors").summary.num_classes == 3


def test_predictions_of_what_the_data_set_would_not_store(unchecked):
    """Images in floats would be divided by 255 once more; without their only channel they are what was given."""
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6), np.uint8)
    model = nnx.Sequential(nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0)), lambda h: h.mean((1, 2)))
    result = msjax.train(model, (images, np.arange(12) % 2), cut=1, codec=compress.Identity(), **QUICK)
    np.testing.assert_array_equal(result.predict(images[:3]), result.predict(images[:3, ..., None]))
    with pytest.raises(
        ValueError, match=r"inputs must be uint8\[6, 6, 1\] each, as the data set stores them, got float"
    ):
        result.predict(images[:3, ..., None] / np.float32(255))
    for dtype, like, cast in (
        (np.uint8, jax.ShapeDtypeStruct((4,), np.float32), False),
        (np.int32, jax.ShapeDtypeStruct((6, 6, 1), np.float32), False),
        (np.int32, jax.ShapeDtypeStruct((4,), np.float32), True),
        (np.float16, jax.ShapeDtypeStruct((4,), np.float32), True),
        (np.int8, jax.ShapeDtypeStruct((4,), np.int32), True),
        (np.float32, jax.ShapeDtypeStruct((4,), np.int32), False),
        (np.int32, jax.ShapeDtypeStruct((4,), np.bool_), False),
        (np.bool_, jax.ShapeDtypeStruct((6, 6, 1), np.uint8), False),
        (np.bool_, jax.ShapeDtypeStruct((4,), np.float32), True),
    ):
        assert api._may_be_cast(np.dtype(dtype), like) == cast


def test_functions_with_arrays_of_doubles(tmp_path):
    """NumPy's default: what JAX makes of them is trained, and read again into the same parts."""
    rng = np.random.default_rng(0)
    client = (
        lambda params, stats, x, train, key: (x @ params["w"], stats),
        {"w": rng.normal(size=(2, 4))},
        {"n": np.zeros(1)},
    )
    server = (affine, {"w": rng.normal(size=(4, 3)), "b": np.zeros(3)})
    x, y = np.arange(24, dtype=np.float32).reshape(12, 2) / 24, np.arange(12) % 3
    msjax.train((client, server), (x, y), codec=compress.Identity(), folder=str(tmp_path), **QUICK)
    for name, part in (("client", client), ("server", server)):
        assert msjax.load_part(tmp_path / f"{name}.safetensors", part).params["w"].dtype == np.float32


def test_an_optimizer_that_keeps_the_first_parameters(unchecked):
    """As prodigy, dog and madgrad do; a step may not be given one array twice."""
    anchor = optax.GradientTransformation(
        lambda params: dict.fromkeys(("m", "v"), jax.tree.map(jnp.zeros_like, params)) | {"anchor": params},
        lambda grads, state, params: (
            jax.tree.map(lambda g, p, a: -0.1 * (g + p - a), grads, params, state["anchor"]),
            state,
        ),
    )
    x, y = np.arange(24, dtype=np.float32).reshape(12, 2) / 24, np.arange(12) % 3
    model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    result = msjax.train(model, (x, y), cut=1, codec=compress.Identity(), optimizer=anchor, **QUICK)
    assert np.isfinite(result.history[-1]["train"]["loss"])


def test_predictions_of_rows_as_they_were(unchecked):
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    rows = (1000 + 50 * rng.normal(size=(24, 5))).astype(np.float32)
    ds = data.from_arrays((rows, rows[:, 0] / 50 - 20), normalize=True)
    model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
    result = msjax.train(model, ds, cut=2, task="regression", **QUICK)
    stored = result.predict(ds.train.fetch(np.arange(3))[0])
    np.testing.assert_allclose(result.predict(rows[:3], raw=True), stored, rtol=1e-5)
    for names in (None, list("abcde")):
        frame = pandas.DataFrame(rows[:3], columns=names)
        np.testing.assert_allclose(result.predict(frame, raw=True), stored, rtol=1e-5)
    with pytest.raises(data.DataError, match=r"inputs must have 5 columns, got the shape \[3, 4\]"):
        result.predict(rows[:3, :4], raw=True)


def test_clients_have_the_samples_that_they_are_given(unchecked, tmp_path):
    x = np.arange(20, dtype=np.float32)[:, None]
    model = lambda: nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))  # noqa: E731
    plain = {"cut": 1, "task": "regression", "codec": compress.Identity(), "epochs": 1, "batch_size": 10}
    shares = [np.arange(4), np.arange(4, 20)]
    seen = {}

    def of(*shares, **options):
        options = plain | {"clients": len(shares)} | options
        return msjax.train(model(), (x, x[:, 0]), division=shares, **options)

    seen["both"] = of(*shares, folder=str(tmp_path))
    # Each draws 10 of the 20: the first goes through its own more than once.
    assert seen["both"].spec.schedule.samples == 10
    # Ten samples of one client are those of two that hold half of them each, where nothing is random but their order.
    whole, halves = of(np.arange(10), epochs=3), of(np.arange(5), np.arange(5, 10), epochs=3, batch_size=5)
    for a, b in zip(jax.tree.leaves(whole.client.params), jax.tree.leaves(halves.client.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"folder must be new or that of the same run, .* differs in division"):
        of(*shares[::-1], folder=str(tmp_path))
    for wrong, message in (
        ([shares[0]], "division must have the samples of each of 2 clients, got those of 1"),
        ([shares[0], shares[1] + 1], r"division must have indices in 0\.\.19, got 5 to 20 of client 1"),
        ([shares[0], shares[1] - 1], "division must have each sample once, got the index 3 twice"),
        ([shares[0], []], r"division must have integers \(n,\) of each client, one at least, got none of client 1"),
    ):
        with pytest.raises(ValueError, match=message):
            of(*wrong, clients=2)
    with pytest.raises(ValueError, match="division must have the samples of each of 2 clients, got 5"):
        build.divide(data.from_arrays((x, x[:, 0])), 2, alpha=None, seed=0, division=5)
    with pytest.raises(ValueError, match=r"alpha must be None with a division, got 0\.1"):
        of(*shares, alpha=0.1)
