"""A run whose numbers are not finite ends at once, and says when, of whom, and what to try."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
from msjax import build, compress, data
from msjax.cli import main as cli
from msjax.distributed.client_run import Refused
from msjax.split.finite import NonFiniteError, check_losses, check_part, check_test_loss

from .network import net
from .setups import MODES, SMALL, SMOOTH


def test_what_is_said():
    losses = np.float32([[1, 2, 3], [1, np.nan, 3], [np.nan] * 3])
    with pytest.raises(NonFiniteError, match=r"loss of client 7 must be finite, got nan in step 41 .*learning rate"):
        check_losses(losses, [5, 7, 9], 40)
    with pytest.raises(NonFiniteError, match="loss of all clients must be finite, got nan in step 42"):
        check_losses(losses[2:], [5, 7, 9], 42)
    with pytest.raises(NonFiniteError, match="test loss must be finite, got inf after epoch 3"):
        check_test_loss(math.inf, 3)
    with pytest.raises(NonFiniteError, match="b/0 of the server part must be finite"):
        check_part("server", {"a": np.arange(3), "b": [np.float32([1, np.inf])]}, 5)
    check_losses(losses[:1], [5, 7, 9], 40)
    check_test_loss(1.0, 1)
    check_part("client", {"a": jnp.bfloat16(1)}, 5)


def linear(params, x):
    return x @ params


PARTS = ((linear, np.eye(4, dtype=np.float32)), (linear, np.eye(4, 3, dtype=np.float32)))
OPTIONS = dict(task="regression", codec=compress.Identity(), clients=2, batch_size=8, epochs=2)


def sets():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(48, n)).astype(np.float32) for n in (4, 3))
    return data.from_arrays((x, y), test=(x[:8], y[:8]))


def test_one_clients_numbers_stop_the_run_and_name_it():
    """Its label is finite, and the square of it is not."""
    ds = sets()
    ds.train.targets[5] = 3e38
    indices, _ = build.divide(ds, 2, alpha=None, seed=0)
    (whose,) = (client for client, own in enumerate(indices) if 5 in own)
    with pytest.raises(NonFiniteError, match=rf"loss of client {whose} must be finite, got inf in step \d"):
        msjax.train(PARTS, ds, **OPTIONS)


def test_a_run_that_diverges_ends_unless_it_may_go_on(tmp_path):
    optimizer = msjax.training.api.OptimConfig(learning_rate=1e38)
    with pytest.raises(NonFiniteError, match=r"loss of all clients must be finite, got (nan|inf) in step"):
        msjax.train(PARTS, sets(), optimizer=optimizer, folder=str(tmp_path / "run"), **OPTIONS)
    assert not (tmp_path / "run" / "summary.json").exists() and not list(tmp_path.rglob("*.safetensors"))
    result = msjax.train(PARTS, sets(), optimizer=optimizer, allow_nonfinite=True, **OPTIONS)
    assert len(result.history) == 2 and math.isnan(result.history[-1]["train"]["loss"])


@pytest.mark.slow
def test_on_the_command_line(tmp_path, capsys):
    options = ("--optim.learning-rate", "1e30", "--no-compare", "--epochs", "1", "--model.width", "0.25")
    assert cli.run("train", [*options, "--out", str(tmp_path), "--name", "run"]) == 2
    assert "loss of all clients must be finite, got nan in step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


pytestmark = pytest.mark.usefixtures("built_once")


def spoil(state):
    """A part of which every number is NaN."""
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
    return state._replace(params=params)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [SMALL, dataclasses.replace(SMOOTH, mode=MODES[1])], ids=["MS", "U-shaped"])
def test_the_server_names_a_client_whose_numbers_are_not_finite(tmp_path, cfg, caplog):
    """That client alone is turned away; the others go on with one that is sound."""
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.run_to(1)
        party = it.loop.clients[2].run.party
        party.state = spoil(party.state)
        it.run(2)
        assert "what a client sends must be finite, got nan" in str(it.failures.pop(2)) and not it.failures
        assert "client 2: what a client sends must be finite" in caplog.text
        it.stores.pop(2).close()
        it.start_client(2)
        it.run()
        it.assert_equal_to_program()


def test_the_server_checks_labels(tmp_path):
    with net(tmp_path, SMALL) as it:
        own_data = it.own_data

        def wrong(client, cfg):
            own, samples = own_data(client, cfg)
            return (data.Arrays(own.inputs, own.targets + 9999 * (client == 1)), samples)

        it.own_data = wrong
        it.start_clients()
        it.run(1)
        assert "labels must be in 0..9" in str(it.failures.pop(1)) and not it.failures


def test_a_servers_part_that_is_not_finite_ends_the_run(tmp_path):
    with net(tmp_path, SMALL) as it:
        it.start_clients()
        it.run_to(1)
        it.server.run.party.state = spoil(it.server.run.party.state)
        it.run()
        assert isinstance(it.failures["server"], NonFiniteError)
        told = {str(it.failures[client]) for client in range(4)}
        assert len(told) == 1 and "loss of all clients must be finite" in told.pop()
        assert {type(it.failures[client]) for client in range(4)} == {Refused}  # to start again does not help


@pytest.mark.slow
def test_who_asks_for_it_goes_on(tmp_path):
    with net(tmp_path, dataclasses.replace(SMALL, allow_nonfinite=True)) as it:
        it.start_clients()
        it.run_to(1)
        it.server.run.party.state = spoil(it.server.run.party.state)
        it.run()
        assert not it.failures and it.epochs == [1, 2]
