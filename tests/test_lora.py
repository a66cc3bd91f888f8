"""Adapters: what they add, what is trained and what stays, what is averaged, and the weights that they become."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from msjax import data, models, tasks
from msjax import train as train_model
from msjax.compress import Identity
from msjax.parts import _NamedApply

from . import decoders

GOLDEN = json.loads(decoders.GOLDEN.read_text())["cases"]
LORA = models.LoRA(rank=2, alpha=6.0, targets=models.TARGETS)


def model(case="llama 3", lora=LORA, **options):
    described = models.DecoderConfig.from_json(decoders.CONFIGS[case])
    return models.decoder(described, **({"length": 13, "lora": lora} | options))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = decoders.tensors(GOLDEN["llama 3"]["shapes"])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(decoders.CONFIGS["llama 3"]))
    return folder


def parts_of(folder, network, cut=1):
    return models.split(network, cut, seed=0, weights=models.load_weights(folder, network))


@functools.partial(jax.jit, static_argnums=0)
def logits(applies, states):
    x = jnp.asarray(decoders.TOKENS)
    for apply, (params, stats) in zip(applies, states, strict=True):
        x, _ = apply(params, stats, x, train=False)
    return x


def run(parts):
    return np.asarray(logits(tuple(part.apply for part in parts), [(part.params, part.stats) for part in parts]))


def moved(parts):
    """The parts with adapters that change something."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype)

    return tuple(part._replace(params=jax.tree.map(draw, part.params)) for part in parts)


def test_a_network_starts_as_it_is_without_adapters(folder):
    parts = parts_of(folder, model())
    np.testing.assert_allclose(run(parts), GOLDEN["llama 3"]["logits"], rtol=0, atol=1e-5)
    assert np.abs(run(moved(parts)) - run(parts)).max() > 0.1


def test_adapters_alone_have_gradients_and_all_else_is_bits(folder):
    client, server = parts_of(folder, model())
    for part, blocks in ((client, {"decoder1"}), (server, {"decoder2", "decoder3"})):
        assert set(part.params) == blocks
        leaves = jax.tree.leaves_with_path(part.params)
        assert {path[-1].key for path, _ in leaves} == {"lora_a", "lora_b"}
        assert all(leaf.dtype == jnp.float32 for _, leaf in leaves) and len(leaves) == 14 * len(blocks)
        assert all(leaf.dtype == jnp.uint32 for leaf in jax.tree.leaves(part.stats))
    network = model()
    found = models.count_params(network)
    assert found == sum(leaf.size for part in (client, server) for leaf in jax.tree.leaves(part.params))
    half, _ = parts_of(folder, model(dtype="bfloat16"))
    assert all(leaf.dtype == jnp.uint16 for leaf in jax.tree.leaves(half.stats))
    whole = models.whole(network, seed=0)
    np.testing.assert_allclose(run([whole]), run(models.split(network, 2, seed=0)), rtol=0, atol=1e-6)


def test_only_the_targets_have_adapters(folder):
    client, _ = parts_of(folder, model(lora=models.LoRA(rank=3)))
    found = client.params["decoder1"]
    assert set(found) == {"self_attn"} and set(found["self_attn"]) == {"q_proj", "v_proj"}
    assert found["self_attn"]["v_proj"]["lora_a"].shape == (16, 3)
    assert found["self_attn"]["v_proj"]["lora_b"].shape == (3, 8)
    assert not found["self_attn"]["q_proj"]["lora_b"].any()
    assert 0.2 < jnp.abs(found["self_attn"]["q_proj"]["lora_a"]).max() <= 0.25  # 1/√16


def test_adapters_draw_dropout_in_training_alone(folder):
    (client, _), (plain, _) = (parts_of(folder, model(lora=dataclasses.replace(LORA, dropout=p))) for p in (0.5, 0.0))
    client, plain = moved([client])[0], moved([plain])[0]
    x = jnp.asarray(decoders.TOKENS)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def features(apply, train, key):
        return apply(client.params, client.stats, x, train=train, key=key)[0]

    one, again, other = (features(client.apply, True, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - other).max() > 1e-3
    without = features(plain.apply, True, jax.random.key(1))
    np.testing.assert_allclose(features(client.apply, False, None), without, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="key must be given when train is True, for the dropout in decoder1; got None"):
        client.apply(client.params, client.stats, x, train=True)


@pytest.mark.parametrize("cut", [1, 3])
def test_merged_weights_compute_the_same_and_are_written_tied_as_they_were(folder, tmp_path, cut):
    network = model()
    parts = moved(parts_of(folder, network, cut))
    want = run(parts)
    params, stats = ({k: v for part in parts for k, v in getattr(part, name).items()} for name in ("params", "stats"))
    models.save_weights(tmp_path / "out", network, params, stats)
    assert models.DecoderConfig.load(tmp_path / "out") == models.DecoderConfig.load(folder)
    plain = model(lora=None)
    np.testing.assert_allclose(run([models.load_weights(tmp_path / "out", plain)]), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail_cut", [None, pytest.param("last", marks=pytest.mark.slow)])
def test_clients_average_the_adapters_alone(tail_cut, folder):
    """Trained by two clients, which leaves the base as it was, bit for bit, and counts no byte of it."""
    network = model(length=12)
    parts = models.split(network, 1, tail_cut=tail_cut, weights=models.load_weights(folder, network))
    tokens = np.tile(np.arange(3, 19, dtype=np.int32), 20)[: 13 * 12 + 1]
    blocks = tuple(tokens[at : at + 13 * 12].reshape(13, 12) for at in (0, 1))
    train, test = data.Arrays(*(b[:8] for b in blocks)), data.Arrays(*(b[8:] for b in blocks))
    options = {"task": tasks.next_token(), "codec": Identity(), "clients": 2, "batch_size": 4, "epochs": 3}
    options |= {"optimizer": optax.adam(0.02), "quiet": True}
    copied = (blocks[0][:8], np.where(np.arange(12) < 9, blocks[0][:8], -100))
    with pytest.raises(ValueError, match=r"labels must be the tokens behind those of the inputs .*, got the inputs"):
        train_model(parts, copied, **options)
    result = train_model(parts, data.Dataset("text", train, test, None, None, None), **options)
    assert jax.tree.structure(result.parts) == jax.tree.structure(parts)
    adapters = sum(leaf.size for part in parts[::2] for leaf in jax.tree.leaves(part.params))
    assert result.spec.client_update_values == adapters and result.spec.client_statistic_values == 0
    for before, after in zip(parts, result.parts, strict=True):
        jax.tree.map(np.testing.assert_array_equal, after.stats, before.stats)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after.params, before.params)))
    losses = [row["train"]["loss"] for row in result.history]
    assert losses[-1] < losses[0]


def test_a_client_with_adapters_may_have_a_tail_of_its_own(folder):
    """Its frozen arrays are found by their own names, the tail's under one that they all share."""
    client, server = models.split(model(length=12), 1, weights=models.load_weights(folder, model(length=12)))
    tail = (lambda params, h: h * params["scale"], {"scale": jnp.ones(decoders.CONFIGS["llama 3"]["vocab_size"])})
    tokens = np.tile(np.arange(3, 19, dtype=np.int32), 20)[: 13 * 12 + 1]
    blocks = tuple(tokens[at : at + 13 * 12].reshape(13, 12) for at in (0, 1))
    options = {"task": tasks.next_token(), "codec": Identity(), "clients": 2, "batch_size": 4, "epochs": 1}
    result = train_model((client, server, tail), blocks, optimizer=optax.adam(0.02), quiet=True, **options)
    trained, _, last = result.parts
    assert trained.params.keys() == client.params.keys() and float(np.abs(last.params["scale"] - 1).max()) > 0
    jax.tree.map(np.testing.assert_array_equal, trained.stats, client.stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"alpha": 0.0}, r"alpha must be above 0 and finite, got 0\.0"),
        ({"targets": ("lm_head",)}, r"targets must be a tuple of some of q_proj, .*, got \('lm_head',\)"),
        ({"targets": ()}, r"targets must be a tuple of some of q_proj, .*, got \(\)"),
        ({"targets": "q_proj"}, "targets must be a tuple of some of q_proj, .*, got 'q_proj'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_what_is_no_adapter_is_one_error(options, message):
    with pytest.raises(ValueError, match=message):
        models.LoRA(**options)


def test_a_part_that_was_read_says_what_never_changes(folder):
    """So that it can be trained on."""
    network = model(length=12)
    client, *_ = models.split(network, 1, weights=models.load_weights(folder, network))
    read = _NamedApply("client", client.apply, None)
    assert models.constants_of(read) == models.constants_of(client.apply) != frozenset()
    assert read.draws_by_place


def test_targets_may_come_in_a_list():
    assert models.LoRA(targets=["q_proj"]) == models.LoRA(targets=("q_proj",))
    hash(models.LoRA(targets=["q_proj"]))
