"""What large decoders need, from shapes alone: formulas against shapes, published counts, and payloads."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import language, language_sizes
from msjax import config, models, plan
from msjax.optim import make_optimizer
from msjax.split.trees import TreeSpec

from . import decoders

PUBLISHED = {"Llama-3.2-1B": 1_235_814_400, "Qwen3-1.7B": 1_720_574_976}
"""Parameters that transformers counts, with the tied output layer once."""


@pytest.mark.parametrize("case", decoders.CONFIGS)
def test_the_formula_counts_what_the_model_has(case):
    described = models.DecoderConfig.from_json(decoders.CONFIGS[case])
    network = models.decoder(described, length=8)
    client, server = jax.eval_shape(lambda: models.split(network, 1))
    copied = described.vocab_size * described.hidden_size * described.tie_word_embeddings
    found = plan.values(client.params) + plan.values(server.params)
    assert language_sizes.parameters(described) == found - copied


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_networks_at_their_cuts(name):
    cfg = language_sizes.config_of(name, 1, adapters=False)
    described = language_sizes.described(cfg)
    assert language_sizes.parameters(described) == PUBLISHED[name]
    network = models.decoder(described, length=cfg.data.text_length)
    assert [models.resolve_cut(network, cut) for cut in language_sizes.CUTS[name]] == list(language_sizes.CUTS[name])
    assert language_sizes.CUTS[name][-1] == described.num_hidden_layers - 1
    assert (cfg.batch_size, cfg.epochs, cfg.optim.learning_rate, cfg.clients) == (4, 3, 1e-4, 1)


def test_what_the_parties_of_a_small_decoder_need():
    text = json.dumps(models.DecoderConfig.from_json(decoders.CONFIGS["llama 3"]).to_json())
    model = config.ModelConfig(name="decoder", cut="1", decoder=text)
    task, data = config.TaskConfig(name="next_token"), config.DataConfig(text_length=12)
    optim = config.OptimConfig(momentum=0.0, weight_decay=0.0)
    cfg = config.Config(model=model, task=task, data=data, optim=optim, clients=1, batch_size=4)
    found = language_sizes.needs(cfg)
    sides = [found[side] for side in language_sizes.SIDES]
    assert sum(side["trained_values"] for side in sides) == found["parameters"] + 19 * 16  # the table, twice
    for side in sides:
        assert side["weight_bytes"] == side["gradient_bytes"] == 4 * side["trained_values"]
        assert side["optimizer_bytes"] == 4  # the number of steps
        assert side["step_flops"] > 6 * 4 * 12 * 1000  # six for each token and weight of its dense layers
        assert side["seconds"] == side["step_flops"] / 49.47e12
        assert 4 * 12 * 16 * 4 <= side["remat_activation_bytes"] < side["activation_bytes"] / 2
        kept = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
        assert side["bytes"] == sum(side[name] for name in kept)
        assert side["lowered_bytes"] > 10_000
    assert found["label_bytes"] == 4 * 12 * 4
    h = jnp.ones((4, 12, 16))
    for name, sent in found["codecs"].items():
        codec = language.CODECS[name]["codec"]
        if not codec.entropy_coded:
            assert sent["up_bytes"] == plan.nbytes(jax.eval_shape(codec.encode, h, jax.random.key(0))), name
        assert sent["seconds"]["10 Mbit/s"] == pytest.approx(8e-7 * (sent["up_bytes"] + sent["down_bytes"]))
    assert found["codecs"]["EntropyMask 2 up 1.5 down"] | {"seconds": 0} == {
        "up_bytes": 4 * 12 * 16 // 4,
        "down_bytes": 4 * 12 * 16 * 3 // 16,
        "seconds": 0,
    }
    table = language_sizes.table([{"model": "small", "cut": 1, "trained": "all weights", **found}])
    assert f"small {found['parameters']:,}" in table


def test_adapters_leave_the_weights_frozen_in_16_bits():
    run = language_sizes.described_run(language_sizes.config_of("Llama-3.2-1B", 8, adapters=True))
    assert run.spec.features == TreeSpec.of(jax.ShapeDtypeStruct((256, 2048), jnp.bfloat16))
    found = [language_sizes.party(run, side) for side in language_sizes.SIDES]
    table = 128_256 * 2048
    assert sum(side["frozen_values"] for side in found) == PUBLISHED["Llama-3.2-1B"] + table
    # Of each block: rank times inputs and outputs of its seven dense layers.
    a_block = 8 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    assert [side["trained_values"] for side in found] == [8 * a_block, 8 * a_block]
    assert all(side["weight_bytes"] == 2 * side["frozen_values"] + 4 * side["trained_values"] for side in found)


def test_sgd_without_momentum_keeps_none():
    optimizer = make_optimizer(config.OptimConfig(momentum=0.0, weight_decay=0.0), epochs=1, steps_per_epoch=1)
    assert plan.values(jax.eval_shape(optimizer.init, jnp.zeros(100))) == 1  # the number of steps
