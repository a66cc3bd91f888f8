"""Keys and values that are kept: the logits are those without, whatever the texts are padded with."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import models

from . import decoders, language

GOLDEN = json.loads(decoders.GOLDEN.read_text())["cases"]
CASES = ("llama 3", "qwen 2.5", "qwen 3", "llama with biases")
LENGTHS = np.int32([4, 9])
"""Of two prompts; what is behind is decoded token by token."""


def model(case="llama 3", **options):
    described = models.DecoderConfig.from_json(decoders.CONFIGS[case])
    return models.decoder(described, **({"length": decoders.TOKENS.shape[1]} | options))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return language.weights_of(tmp_path_factory, model)


def decoded(parts, tokens, capacity=16, padding=0):
    """Logits (n, length, vocabulary) that are known: of each text's last prompt token, and those behind it."""
    caches = [models.make_cache(part, len(tokens), capacity) for part in parts]
    x = np.where(np.arange(12) < LENGTHS[:, None], tokens[:, :12], padding).astype(np.int32)
    new, found, fresh = jnp.asarray(LENGTHS), {}, True
    for at in range(tokens.shape[1] - LENGTHS.max()):
        h = jnp.asarray(x)
        for i, part in enumerate(parts):
            last = not any(models.attends(other) for other in parts[i + 1 :])
            count = jnp.ones_like(new) if h.shape[1] == 1 else new
            h, caches[i] = models.extend_cached(part, h, caches[i], count, fresh=fresh, last=last)
        assert h.shape[1] == 1
        for row, length in enumerate(LENGTHS):
            found[row, length - 1 + at] = h[row, 0]
        x, new, fresh = tokens[np.arange(len(tokens)), LENGTHS + at][:, None], jnp.ones(2, jnp.int32), False
    return found, caches


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", [None, (1, "last")], ids=["whole", "U-shaped"])
def test_logits_are_those_without(case, cuts, weights):
    whole = weights(case)
    parts = (whole,) if cuts is None else models.split(model(case), cuts[0], tail_cut=cuts[1], weights=whole)
    found, caches = decoded(parts, decoders.TOKENS)
    assert len(found) == 8
    for (row, position), logits in found.items():
        np.testing.assert_allclose(logits, GOLDEN[case]["logits"][row][position], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(caches[0].lengths, LENGTHS + 3)


def test_what_a_text_is_padded_with_changes_nothing(weights):
    parts = models.split(model(), 1, weights=weights("llama 3"))
    zeros, _ = decoded(parts, decoders.TOKENS)
    others, _ = decoded(parts, decoders.TOKENS, padding=7)
    assert all((zeros[place] == others[place]).all() for place in zeros)


@pytest.mark.parametrize("cut", [0, 3])
def test_a_part_without_attention_keeps_nothing(cut, weights):
    parts = models.split(model(), cut, weights=weights("llama 3"))
    empty = parts[0 if cut == 0 else 1]
    assert not models.attends(empty) and models.cache_bytes(empty, 2, 16) == 8
    found, _ = decoded(parts, decoders.TOKENS)
    for (row, position), logits in found.items():
        np.testing.assert_allclose(logits, GOLDEN["llama 3"]["logits"][row][position], rtol=0, atol=1e-4)


def test_a_cache_is_as_large_as_is_said():
    client, _ = models.split(model("qwen 3", dtype=jnp.bfloat16), 2)
    cache = models.make_cache(client, 3, 16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == models.cache_bytes(client, 3, 16)
    assert {leaf.shape for leaf in cache.keys.values()} == {(3, 16, 2, 8)}


def test_adapters_apply(weights):
    lora = models.LoRA(rank=2, alpha=6.0, targets=models.TARGETS)
    network = model(lora=lora)
    parts = models.split(network, 1, weights=weights("llama 3"))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype)  # noqa: E731
    parts = tuple(part._replace(params=jax.tree.map(draw, part.params)) for part in parts)
    found, _ = decoded(parts, decoders.TOKENS)
    x = jnp.asarray(decoders.TOKENS)
    for part in parts:
        x, _ = jax.jit(functools.partial(part.apply, train=False))(part.params, part.stats, x)
    assert np.abs(x - np.float32(GOLDEN["llama 3"]["logits"])).max() > 0.1
    for (row, position), logits in found.items():
        np.testing.assert_allclose(logits, x[row, position], rtol=0, atol=1e-4)
    together = {name: tree for part in parts for name, tree in part.params.items()}
    stats = {name: tree for part in parts for name, tree in part.stats.items()}
    merged = models.with_adapters_merged(network, together, stats)
    base = models.split(models.base(network), 1)
    base = tuple(part._replace(params={name: merged[name] for name in part.params}) for part in base)
    again, _ = decoded(base, decoders.TOKENS)
    assert all(np.allclose(again[place], found[place], rtol=0, atol=1e-4) for place in found)


def test_what_does_not_fit_is_refused(weights):
    whole = weights("llama 3")
    with pytest.raises(ValueError, match="x must have at most 8 tokens, as the cache has room for, got 13"):
        models.extend_cached(whole, jnp.asarray(decoders.TOKENS), models.make_cache(whole, 2, 8), jnp.asarray(LENGTHS))
    other, _ = models.split(models.build("convnet", input_shape=(8, 8, 1), num_classes=2), 1)
    with pytest.raises(ValueError, match="part must be of a decoder"):
        models.make_cache(other, 1, 8)


# -- How a token is chosen. -------------------------------------------------------------------------------------------


def drawn(rule, logits, draws=2000):
    """How often each token is chosen, of all draws."""
    logits = jnp.tile(jnp.float32(logits), (draws, 1))
    return np.bincount(rule.choose(logits, jax.random.key(0)), minlength=logits.shape[1]) / draws


def test_the_largest_is_chosen_where_there_is_no_temperature():
    logits = jnp.float32([[0, 3, 3, 1], [9, 8, 7, 6]])
    assert models.Sampling().choose(logits).tolist() == [1, 0] and models.Sampling().candidates == 1
    values, tokens = models.largest(logits, 2)
    assert (values.tolist(), tokens.tolist()) == ([[3, 3], [9, 8]], [[1, 2], [0, 1]])


def test_tokens_come_as_often_as_they_are_probable():
    logits = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    for rule, expected in [
        (models.Sampling(1.0), [0.1, 0.5, 0.15, 0.25]),
        (models.Sampling(1.0, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (models.Sampling(1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
        (models.Sampling(1.0, top_p=0.8), [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (models.Sampling(1.0, top_p=0.1), [0, 1, 0, 0]),
        (models.Sampling(0.5, top_k=3), np.float32([0, 0.25, 0.0225, 0.0625]) / 0.335),
        (models.Sampling(1.0, top_k=2, top_p=0.5), [0, 1, 0, 0]),
    ]:
        found = drawn(rule, logits)
        np.testing.assert_allclose(found, expected, atol=0.04, err_msg=str(rule))  # 3.6 standard errors
        assert ((found == 0) == (np.float32(expected) == 0)).all()
    logits = jnp.float32([[0.0, 1.0, 2.0, 3.0]])
    for temperature in (1e-40, 1e-30):  # as good as 0, and no infinities
        assert models.Sampling(temperature).choose(logits, jax.random.key(0)).tolist() == [3]
    assert models.Sampling(1.0, top_k=2).candidates == 2 and models.Sampling(1.0).candidates is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": 2}, "top_k must be None where temperature is 0, which draws nothing, got 2"),
        ({"top_p": 0.5}, "top_p must be None where temperature is 0, which draws nothing, got 0.5"),
    ],
)
def test_rules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.Sampling(**options)
    with pytest.raises(ValueError, match="key must be a JAX random key"):
        models.Sampling(1.0).choose(jnp.zeros((1, 2), jnp.float32))
