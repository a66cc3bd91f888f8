"""The study of features' memory trains as a run does, and says what was measured."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_memory as study
from experiments import feature_memory_page as page
from experiments import feature_memory_training as training
from msjax import build, data
from msjax.compress import FeatureMemory, Identity, MaskEncoded, TopK
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig
from msjax.split.state import TrainState
from msjax.training import loop
from msjax.training.loaded import LoadedRun

SAMPLES = training.CLIENTS * training.BATCH
CFG = Config(
    ModelConfig("mlp", width=0.1),
    DataConfig("breast_cancer"),
    OptimConfig(weight_decay=0.0),
    clients=training.CLIENTS,
    batch_size=training.BATCH,
    epochs=2,
    codec=Identity(),
)
SETTING = training.Setting(CFG, SAMPLES, 100, 50, 1, signed=False)


@functools.cache
def loaded():
    return training.load(SETTING, 0)


@functools.cache
def row(arm):
    return {"setting": "a table"} | study.measure(SETTING, loaded(), arm, 0)


def test_without_compression_it_trains_as_a_run_does():
    """With a memory that loses nothing, too."""
    whole = build.load_data(CFG)
    cut = {"train": whole.train[:SAMPLES], "test": whole.test[:100]}
    dataset = dataclasses.replace(whole, **{name: data.Arrays(*part) for name, part in cut.items()})
    run = loaded()
    state = jax.tree.map(jnp.array, run.state)
    indices, _ = build.divide(dataset, training.CLIENTS, alpha=None, seed=0)
    finished = loop.train(LoadedRun(run.spec, state, dataset, indices, 0, ""), quiet=True)
    found = row(training.Arm(Identity(), True))
    losses = [epoch["train"]["loss"] for epoch in finished.history]
    np.testing.assert_allclose([epoch["train_loss"] for epoch in found["history"]], losses, rtol=1e-5)
    for tested in page.TESTS:
        assert found[tested]["top1_percent"] == pytest.approx(finished.history[-1]["test"]["top1_percent"])
    assert all(epoch["error"] < 1e-12 and epoch["sent"] == 1 for epoch in found["history"])
    first, second = (epoch["change"] for epoch in found["history"])
    assert first == 1 and 0 < second < 1
    assert isinstance(run.state, TrainState)  # which another arm may start from


CODED = training.Arm(MaskEncoded(0.9, bits=1, signed=True), True, MaskEncoded(0.9, bits=4, signed=True))


def test_bits_are_those_of_the_messages():
    first, second = row(CODED)["history"]
    assert second["bits"] < first["bits"] < 32 and first["error"] > 0
    assert 0 < second["error"] < second["change"] < first["change"] == 1
    h = jnp.ones((training.CLIENTS, training.BATCH, 8))
    like, memory = jax.ShapeDtypeStruct(h.shape[1:], h.dtype), FeatureMemory(TopK(ratio=0.5))
    payloads, _ = jax.vmap(lambda h: memory.encode(h, memory.init(training.BATCH, h), jnp.arange(training.BATCH)))(h)
    nominal = training.CLIENTS * memory.payload_bytes(like)
    assert nominal / 2 < training.message_bytes(payloads, memory, like) < nominal + 200 * training.CLIENTS


@pytest.mark.parametrize("all_gradients", [False, True])
def test_of_samples_that_are_not_sent_no_gradient_goes_on(all_gradients):
    """The same step again, from the same weights, changes no features: there the client's weights stay as they are."""
    run, coder = loaded(), FeatureMemory(Identity())
    order = jnp.arange(SAMPLES).reshape(training.CLIENTS, training.BATCH)
    x, y = (jnp.asarray(array)[order] for array in run.train[:])
    slots, key = jnp.tile(jnp.arange(training.BATCH), (training.CLIENTS, 1)), jax.random.key(0)
    memory, moved, sent = training.empty_memory(run, training.Arm(Identity(), True)), [], []
    for _ in range(2):
        args = (run.spec, coder, jax.tree.map(jnp.array, run.state), memory, x, y, slots, key)
        state, memory, _, sums = training.train_step(*args, frozen=False, all_gradients=all_gradients)
        pairs = zip(*(jax.tree.leaves(one.client.params) for one in (run.state, state)), strict=True)
        moved.append([bool((before != after).any()) for before, after in pairs])
        sent.append(float(sums[1]))
    assert sent == [1, 0]
    assert all(moved[0]) and any(moved[1]) == all_gradients


def test_what_is_measured_is_in_the_table_and_the_picture():
    plain = row(training.Arm(Identity(), True))
    diverged = {name: value for name, value in row(CODED).items() if name not in page.TESTS}
    diverged |= {"diverged": True, "all_gradients": True, "history": diverged["history"][:1]}
    text = page.table([plain, row(CODED), diverged])
    assert "| a table | none |" in text and "| a table | MS 4 bits, then MS 1 bits, memory |" in text
    assert "MS 4 bits, then MS 1 bits, memory, with all gradients | – | – | – | – | – | diverged in epoch 2 |" in text
    assert len(page.plot([plain, row(CODED), diverged]).axes) == 2


def test_every_setting_is_one_that_can_be_built():
    options = argparse.Namespace(data_dir="a")
    for setting in study.settings(options).values():
        assert setting.samples % SAMPLES == setting.test_samples % setting.test_batch == 0
        named = [tuple(training.named(arm).values()) for arm in study.arms(signed=setting.signed)]
        assert len(set(named)) == len(named)
        assert [training.arm_of(training.named(arm)) for arm in study.arms(signed=setting.signed)] == study.arms(
            signed=setting.signed
        )
