"""Plain PyTorch beside msjax: one method, whichever program computes it. Needs PyTorch and no prepared data."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import beside_pytorch, beside_pytorch_training
from msjax import build, data
from msjax.optim import make_optimizer
from msjax.split.state import TrainState
from msjax.training import loaded, loop

EPOCH_STEPS = 4


def random_images():
    """80 images to train on and 20 to test on, of ten classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 100).astype(np.int32)
    train, test = (data.Arrays(images[part], labels[part]) for part in (slice(80), slice(80, None)))
    return data.Dataset("random", train, test, 10, np.float32([0.5] * 3), np.float32([0.25] * 3), "crop_flip")


def run_of(name, **optim):
    """Two clients of 40 images, ten a step, on a narrow ResNet9 at its medium cut."""
    cfg = beside_pytorch_training.config_of(name, 0, None)
    model = dataclasses.replace(cfg.model, width=1 / 16)
    cfg = dataclasses.replace(cfg, model=model, clients=2, batch_size=10, optim=dataclasses.replace(cfg.optim, **optim))
    dataset = random_images()
    indices, samples = build.divide(dataset, cfg.clients, alpha=None, seed=0)
    built = build.build(cfg, build.DataSummary.of(dataset), samples=samples, test_samples=len(dataset.test))
    state = TrainState(built.client, built.server, jax.numpy.int32(0))
    return loaded.LoadedRun(built.spec, state, dataset, indices, 0, "test"), cfg


@pytest.mark.slow
def test_both_take_the_same_steps():
    """Without a codec whose codes rounding could change, two steps lead to the same weights and statistics."""
    pytest.importorskip("torch", reason="needs the extra `bench`")
    run, cfg = run_of("none")
    ours = beside_pytorch_training.Ours(run)
    first = beside_pytorch_training.by_torch_names(ours.state)
    theirs = beside_pytorch_training.in_pytorch(ours.state, cfg)
    for number, batch in zip(range(2), ours.batches(), strict=False):
        for group in theirs.optimizer.param_groups:
            group["lr"] = beside_pytorch_training.rate(cfg.optim, number, EPOCH_STEPS, EPOCH_STEPS * cfg.epochs)
        losses = theirs.step(*ours.augmented(batch))
        np.testing.assert_allclose(losses, ours.step(batch)[0], rtol=1e-4)
    found = theirs.network.state_dict()
    for name, want in beside_pytorch_training.by_torch_names(ours.state).items():
        moved = (want - first[name]).norm()
        assert moved > 0 and (found[name] - want).norm() < 0.01 * moved, name


def test_the_table_says_which_network():
    """The first rows of the record do not name theirs."""
    row = {"codec": "none", "steps": 2, "last_loss": 2.5}
    row |= {name: 0.25 for n in ("losses", "weights_1", "weights_2") for name in (n, f"{n}_again")}
    own = row | {"network": "vgg19", "msjax_step_seconds": 9.5, "torch_step_seconds": 10.5}
    first, second = beside_pytorch.table([row, own]).splitlines()[2:]
    assert first.startswith("| ResNet18 of a quarter of the width | none | 2 | ") and first.endswith(
        "| 2.500 | – | – |"
    )
    assert second.startswith("| VGG19 at full width | none | 2 | ") and second.endswith("| 2.500 | 9.50 | 10.50 |")


@pytest.mark.slow
def test_what_a_training_tells():
    pytest.importorskip("torch", reason="needs the extra `bench`")
    run, cfg = run_of("MS", learning_rate=1e-3)
    found = beside_pytorch_training.train(run, cfg, EPOCH_STEPS + 1)
    assert found["steps"] == EPOCH_STEPS + 1 and found["msjax_step_seconds"] > 0 and found["torch_step_seconds"] > 0
    assert len(found["epochs"]) == 2
    for epoch in found["epochs"]:
        assert epoch["torch_loss"] == pytest.approx(epoch["msjax_loss"], rel=1e-3)
    assert found["torch_top1_percent"] == pytest.approx(found["msjax_top1_percent"], abs=5.1)  # one image of twenty
    rows = [found | {"codec": "MS", "seed": 0}]
    assert beside_pytorch_training.table(rows).splitlines()[2].startswith("| MS | 1 | ")


@pytest.mark.slow
def test_msjax_goes_as_its_loop_goes():
    """Step by step the same batches, keys and numbers as `loop.train`."""
    run, cfg = run_of("MS")
    ours = beside_pytorch_training.Ours(run_of("MS")[0])
    for batch in ours.batches():
        ours.step(batch)
    finished = loop.train(run, quiet=True)
    assert ours.test() == finished.history[-1]["test"]["top1_percent"]
    for mine, theirs in zip(jax.tree.leaves(jax.device_get(ours.state)), jax.tree.leaves(finished.state), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert cfg.epochs * EPOCH_STEPS == run.spec.schedule.total_steps


def test_learning_rates_are_those_of_msjax():
    optim = beside_pytorch_training.config_of("MS", 0, None).optim
    rule = make_optimizer(
        dataclasses.replace(optim, momentum=0.0, nesterov=False, weight_decay=0.0), epochs=3, steps_per_epoch=7
    )
    weights = jax.numpy.zeros(())
    state = rule.init(weights)
    for step in range(21):
        update, state = rule.update(jax.numpy.ones(()), state, weights)
        assert beside_pytorch_training.rate(optim, step, 7, 21) == pytest.approx(-float(update), abs=1e-7)


@pytest.mark.parametrize("name", beside_pytorch.CODECS)
def test_codecs_of_pytorch_decode_as_msjax_does(name):
    torch = pytest.importorskip("torch", reason="needs the extra `bench`")
    from experiments import pytorch_method

    h = np.maximum(np.random.default_rng(0).normal(size=(4, 8, 8, 16)), 0).astype(np.float32)
    given = torch.from_numpy(h).requires_grad_()
    out = pytorch_method.codec(beside_pytorch.CODECS[name])(given)
    np.testing.assert_allclose(
        out.detach().numpy(), beside_pytorch.CODECS[name].roundtrip(jax.numpy.asarray(h)), rtol=1e-5, atol=1e-6
    )
    out.sum().backward()
    np.testing.assert_array_equal(given.grad.numpy(), np.ones_like(h))
