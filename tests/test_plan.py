"""What is said of a run before it is begun, against the run: arrays, messages, compiled programs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, compress, config, data, plan, wire
from msjax.cli import main as cli
from msjax.plan._memory import traced_programs
from msjax.split import programs
from msjax.split.state import client_keys
from msjax.split.traffic import epoch_traffic, run_traffic

from . import decoders
from .setups import MODES, SMALL, dataset

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "own_model_over_network.py"
COUNTS = plan.Counts(len(dataset().train), len(dataset().test))


def planned(cfg, **options):
    return plan.plan(cfg, summary=build.DataSummary.of(dataset()), counts=COUNTS, codecs={}, **options)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.kind}-{mode.tail_cut}")
def test_figures_are_those_of_the_run(mode):
    cfg = dataclasses.replace(SMALL, mode=mode)
    found = planned(cfg)
    samples = COUNTS.train // cfg.clients
    built = build.build(cfg, build.DataSummary.of(dataset()), samples=samples, test_samples=COUNTS.test)
    needs, at_client = found.parties, [name for name in found.parties if name != "server"]
    assert ("tail" in needs) == built.spec.u_shaped
    for part, names in ((built.client, at_client), (built.server, ["server"])):
        assert sum(needs[name].trained_values for name in names) == plan.values(part.params)
        assert sum(needs[name].weight_bytes for name in names) == plan.nbytes((part.params, part.stats))
    at_once = 1 if mode.kind == "sequential" else cfg.clients
    assert needs["server"].gradient_bytes == plan.nbytes(built.server.params)
    assert found.epoch_steps * at_once == cfg.clients * -(-samples // cfg.batch_size)
    assert_sent_as_in_the_run(found)
    assert all(operations > 0 for operations in found.operations.values())


def assert_sent_as_in_the_run(found):
    spec, sent = found.run.spec, found.rows[0].sent
    epochs, client_steps = spec.schedule.epochs, spec.schedule.total_steps * found.run.clients
    traffic = run_traffic(spec, epochs)
    assert sent.up_bytes * client_steps == pytest.approx(traffic.uplink_bytes)
    assert sent.down_bytes * client_steps == pytest.approx(traffic.downlink_bytes)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("kind", ["splitfed", "sequential"])
def test_bytes_are_the_mean_over_all_epochs_where_parts_are_handed_on(kind, epochs, capsys):
    """No part is handed on at the very beginning, so the first epoch has fewer bytes down."""
    own = {"client_fraction": 0.5, "average_steps": 2} if kind == "splitfed" else {"turn_steps": 2}
    cfg = dataclasses.replace(SMALL, mode=config.ModeConfig(kind=kind, **own), epochs=epochs)
    found = planned(cfg)
    assert_sent_as_in_the_run(found)
    first = epoch_traffic(found.run.spec, 0).downlink_bytes / found.epoch_steps / found.run.clients
    assert (found.rows[0].sent.down_bytes > first) == (epochs > 1)


def test_the_server_updates_once_whatever_the_number_of_clients():
    """Counted of the program of so many clients."""
    cfg = dataclasses.replace(SMALL, clients=3)
    run = plan.describe_run(cfg, build.DataSummary.of(dataset()), COUNTS)
    lowered = [traced.lower() for party, traced in traced_programs(run, 3) if party == "server"]
    exact = sum(program.cost_analysis()["flops"] for program in lowered)
    one = plan.operations(
        plan.describe_run(dataclasses.replace(cfg, clients=1), build.DataSummary.of(dataset()), COUNTS)
    )
    found = plan.operations(run)["server"]
    assert found == pytest.approx(exact, rel=1e-5)
    updates = 2 * 3 * plan.values(run.parts["server"].params)  # of two more: momentum and step at least
    assert 3 * one["server"] - found > updates


def test_averages_are_counted_with_the_headers_of_their_messages():
    """Those of a small part are a part of the message that shows."""
    codec = compress.EntropyMask(bits=2.0, signed=True, rounding="stochastic")
    found = planned(dataclasses.replace(SMALL, update_codec=codec))
    spec = found.run.spec
    payload, key = spec.average_payload, jax.random.key(0)
    vectors = [jax.random.normal(key, like.shape) for like in payload.likes]
    sent = sum(map(wire_bytes, payload.encode(vectors, key), payload.codecs, payload.likes))
    assert found.rows[0].sent.average_up_bytes == pytest.approx(sent, rel=0.1)


def wire_bytes(payload, codec, like):
    return len(wire.encode(payload, codec, like))


def test_activations_are_what_is_kept_for_the_backward_pass():
    """Of arrays, where the client's program returns them; and not far from what XLA sets aside for a server's step."""
    run = plan.describe_run(dataclasses.replace(SMALL, clients=1), build.DataSummary.of(dataset()), COUNTS)
    built = build.build(SMALL, build.DataSummary.of(dataset()), samples=30, test_samples=0)

    def kept(batch_size):
        x = jnp.zeros((batch_size, 8, 8, 1))
        return plan.nbytes(programs.client_features(built.spec, built.client, x, jax.random.key(0))[1].vjp)

    assert plan.sample_activation_bytes(run, "client") == kept(5) - kept(4) > 8 * 8 * 4

    def set_aside(batch_size):
        like = built.spec.feature_payload(batch_size)
        features = jax.eval_shape(lambda: jnp.zeros((batch_size, *built.spec.features.leaves[0].shape)))
        payload = jax.eval_shape(like.encode, features, jax.random.key(0))
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), payload)
        keys = client_keys(jax.random.key(0), jnp.int32(0), jnp.arange(1))
        y = jax.ShapeDtypeStruct((1, batch_size), np.int32)
        lowered = programs.server_step.lower(built.spec, built.server, stacked, y, keys, batch_size=batch_size)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    by_sample = (set_aside(512) - set_aside(256)) / 256
    assert 0.3 < plan.sample_activation_bytes(run, "server") / by_sample < 3


def test_messages_of_every_codec_beside_the_configs():
    cfg = dataclasses.replace(SMALL, codec=compress.EntropyMask(bits=1.0), clients=4)
    found = plan.plan(cfg, summary=build.DataSummary.of(dataset()), counts=COUNTS)
    rows = {row.name: row.sent for row in found.rows}
    values = 10 * plan.values(found.run.spec.features.batch(1))  # batches of 10
    assert rows["none"].feature_bytes == rows["none"].gradient_bytes == 4 * values
    assert rows["MS"].feature_bytes == 4 * (values // 100) + values / 4
    header = 100, 250  # bytes of a message, with the codec's text and what there is of each array
    assert header[0] < rows["as configured"].feature_bytes - values / 8 < header[1] and not rows["as configured"].exact
    both = rows["EntropyMask, 2 bits up, 1.5 down"]
    assert header[0] < both.feature_bytes - values / 4 < header[1]
    assert header[0] < both.gradient_bytes - values * 1.5 / 8 < header[1]
    assert rows["none"].exact and rows["none"].average_up_bytes == 4 * found.run.spec.client_update_values
    without_aim = plan.sent(plan.with_codecs(found.run.spec, compress.EntropyMask(), compress.Identity()), plan.Link())
    assert without_aim.feature_bytes == wire.most_bytes(compress.EntropyMask(), found.run.spec.features.batch(10))


def test_seconds_are_those_of_the_slower_of_two_links():
    assert plan.Link(100.0).seconds(12.5e6, 1000) == 1.0
    assert plan.Link(100.0, 10_000.0).seconds(12.5e6, 50) == 1.0
    assert plan.Link(100.0, 10_000.0).seconds(12.5e6, 200) == 2.0
    found = planned(SMALL, link=plan.Link(8.0))
    sent = found.rows[0].sent
    assert sent.seconds == pytest.approx((sent.up_bytes + sent.down_bytes) / 1e6)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.kind}-{mode.tail_cut}")
def test_a_budget_is_what_features_and_gradients_take(mode):
    codecs = {"codec": compress.EntropyMask(bits=2.0), "grad_codec": compress.EntropyMask(error=0.3, signed=True)}
    cfg = dataclasses.replace(SMALL, mode=mode, **codecs)
    without, found = planned(cfg), planned(dataclasses.replace(cfg, cut_bits=2.4))
    assert found.cut_bits == pytest.approx(2.4) and without.cut_bits is None and found.too_slow is None
    values = found.run.spec.feature_payload(10).float_values * found.run.spec.schedule.samples / 10 / found.epoch_steps
    if mode.kind == "sequential":
        values *= cfg.clients
    sent, before = found.rows[0].sent, without.rows[0].sent
    assert sent.feature_bytes == pytest.approx(0.6 * 2.4 * values / 8, rel=0.01)
    if mode.tail_cut is None:  # else the tail's gradients are in it
        assert sent.gradient_bytes == pytest.approx(0.4 * 2.4 * values / 8, rel=0.01)
        assert sent.up_bytes - sent.feature_bytes == pytest.approx(before.up_bytes - before.feature_bytes)
    assert sent.average_up_bytes == before.average_up_bytes and sent.seconds < before.seconds


def test_a_budget_follows_the_link_of_a_plan(capsys):
    options = ["--codec", "EntropyMask(bits=2.0)", "--grad-codec", "EntropyMask(error=0.3, signed=True)"]
    options += ["--cut-bits", "2.4", "--cut-seconds", "0.1", "--link-bytes-per-second", "1e5"]
    bits = []
    for mbit in ("100", "1", "0.1"):
        assert cli.run("plan", [*options, "--link-mbit", mbit, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        bits.append(found["cut_bits"])
        assert found["codecs"][0]["sent"]["seconds"] <= 0.1 * 1.01 or found["too_slow"].startswith("cut_seconds=0.1")
    assert bits[0] == pytest.approx(2.4) and bits[1] <= bits[0] and bits[2] == pytest.approx(0.3)
    # Ten clients share the server's.
    assert cli.run("plan", [*options, "--link-mbit", "100", "--server-mbit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut_bits"] == bits[2]
    assert cli.run("plan", [*options, "--link-mbit", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "have 0.3 bits a value together" in text and "As configured, cut_seconds=0.1 cannot be kept" in text


def test_sets_that_are_known_by_name_need_not_be_there():
    cfg = config.Config(data=config.DataConfig(name="imagenet2012", image_size=64))
    summary, counts = plan.describe_data(cfg)
    assert summary.input_shape == (64, 64, 3) and counts == (1_281_167, 50_000) and summary.num_classes == 1000
    assert data.published("digits") is None
    summary, counts = plan.describe_data(config.Config())
    assert summary.input_shape == (8, 8, 1) and counts == (1437, 360)


def test_the_command(tmp_path, capsys):
    assert cli.run("plan", ["--clients", "3", "--link-mbit", "8"]) == 0
    text = capsys.readouterr().out
    assert "3 clients, 16 samples each in a step; 479 samples each in 30 steps an epoch" in text
    assert "EntropyMask, 2 bits" in text and "on 8 Mbit/s" in text
    assert cli.run("plan", ["--clients", "3", "--json", "--link-mbit", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epoch_steps"] == 30 and found["link"] == {"client_mbit": 8.0, "server_mbit": None}
    sent = found["codecs"][0]["sent"]
    assert sent["seconds"] == pytest.approx((sent["up_bytes"] + sent["down_bytes"]) / 1e6)
    assert "Not counted" not in text and "handed on" not in text
    spared = ["--clients-per-group", "2", "--shard-server", "--mode.kind", "splitfed", "--mode.client-fraction", "0.5"]
    assert cli.run("plan", ["--clients", "4", *spared]) == 0
    text = capsys.readouterr().out
    assert "Not counted: shard_server, which divides" in text and "in its first epoch fewer parts" in text
    assert "Not counted: clients_per_group, with which a device of msjax train has the activations of 2 clients" in text
    assert cli.run("plan", ["--config", str(EXAMPLE)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("msjax plan: own_model_over_network.py:make_model, features float32[64]")
    assert str(EXAMPLE.parent) not in text and "cut at" not in text
    # Small numbers are not shown as 0.00.
    row = next(line for line in text.splitlines() if line.startswith("│ client"))
    assert "GB" not in text and "hours" not in text and row.count(" 0.00 ") <= 2, text
    for wrong, message in (
        (["--link-mbit", "0"], "--link-mbit must be a finite number above 0, got 0"),
        (["--samples", "0"], "samples must be an integer of at least 1, got 0"),
        (["--clients", "2000"], "clients must be in 1..1437 (the number of examples), got 2000"),
    ):
        assert cli.run("plan", wrong) == 2
        assert message in capsys.readouterr().err


def test_data_that_are_at_clients_alone_are_described(tmp_path, capsys):
    """As a server's operator plans, who has none."""
    options = ["--data.name", "scans", "--model.name", "resnet20", "--clients", "4", "--batch-size", "32", "--json"]
    elsewhere = ["--input-shape", "64", "64", "1", "--num-classes", "3"]
    assert cli.run("plan", [*options, *elsewhere]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epoch_steps"] is None and found["features"][0][2] == [64, 64, 16]
    summary = plan.describe_elsewhere(SMALL, (8, 8, 1), 10)
    like = plan.plan(SMALL, summary=summary, counts=COUNTS, codecs={})
    assert like.to_json() == planned(SMALL).to_json()
    assert cli.run("plan", [*options, *elsewhere, "--samples", "320", "--test-samples", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch_steps"] == 3
    assert cli.run("plan", [*options, *elsewhere, "--samples", "320", "--test-samples", "64", "--own-data"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch_steps"] == 10
    assert cli.run("plan", ["--clients", "4", "--own-data", "--json"]) == 0  # with those at hand
    assert json.loads(capsys.readouterr().out)["epoch_steps"] == -(-1437 // 16)
    rows = ["--model.name", "mlp", "--data.name", "people.csv", "--task.name", "regression", "--input-shape", "30"]
    assert cli.run("plan", rows) == 0 and "features float32[" in capsys.readouterr().out
    for wrong, message in (
        (["--input-shape", "64", "64", "1"], "num_classes must be given for task.name='classification', got None"),
        (
            ["--input-shape", "64", "64"],
            "--input-shape must be height, width and channels, or a number of columns, got (64, 64)",
        ),
        (["--num-classes", "3"], "--num-classes must go with input_shape, got 3 without it"),
        ([*rows[4:], "--num-classes", "3"], "--num-classes must not be given for task.name='regression', got 3"),
        ([*elsewhere, "--task.name", "segmentation"], "'classification' or 'regression', got 'segmentation'"),
    ):
        assert cli.run("plan", [*options, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_command_of_a_decoder_whose_text_is_not_there(tmp_path, capsys, caplog):
    described = tmp_path / "config.json"
    described.write_text(json.dumps(decoders.CONFIGS["llama 3"]))
    options = ["--model.name", "decoder", "--model.decoder", str(described), "--model.cut", "1", "--clients", "2"]
    options += ["--task.name", "next_token", "--data.text-length", "12", "--batch-size", "4", "--json"]
    options += ["--codec", "MaskEncoded(signed=True)"]
    assert cli.run("plan", options) == 0
    assert "model.weights is not given: all weights of the decoder are drawn at random" in caplog.messages
    found = json.loads(capsys.readouterr().out)
    assert found["epoch_steps"] is None and found["features"] == [["", "float32", [12, 16]]]
    assert found["codecs"][1]["sent"]["feature_bytes"] == 4 * 12 * 16 * 4
    assert cli.run("plan", [*options, "--samples", "80"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch_steps"] == 10
