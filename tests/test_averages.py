"""What keeps the clients equal, through a codec: in one program, on a mesh, as parties apart, and with faults."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
from msjax import build, compress, data, models, wire
from msjax.runs import RunFolder
from msjax.runs.progress import Progress
from msjax.split import averages, fused, modes, parties
from msjax.split import spec as spec_
from msjax.split.make_spec import init_part
from msjax.split.schedule import Phase
from msjax.split.state import PartState, TrainState, eval_key, train_key
from msjax.split.step import PartUpdate
from msjax.split.traffic import run_traffic
from msjax.training import from_config, loop, saved

from .helpers import assert_close
from .network import net
from .setups import MODES, SMALL, SMOOTH, UNEVEN, built, dataset, load_program, make_parties
from .test_budget import BUDGET

SP = compress.TopK(ratio=0.8)
CODED = compress.EntropyMask(bits=2.0, signed=True)
CFG = dataclasses.replace(SMOOTH, update_codec=SP)
KINDS = [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:3])]


@functools.cache
def finished(mode, update_codec):
    """The parties at the end of the run."""
    server, clients = make_parties(dataclasses.replace(CFG, mode=mode, update_codec=update_codec), UNEVEN)
    for _ in parties.run(server, clients):
        pass
    return server, clients


@pytest.mark.parametrize("mode", KINDS, ids=str)
def test_clients_stay_equal_and_remember_what_was_lost(mode):
    server, clients = finished(mode, SP)
    for client in clients[1:]:
        jax.tree.map(np.testing.assert_array_equal, clients[0].state[:2], client.state[:2])
        jax.tree.map(np.testing.assert_array_equal, clients[0].memory.reference, client.memory.reference)
    errors = [np.asarray(party.memory.error[0]) for party in (server, *clients)]
    assert all(np.abs(error).max() > 0 for error in errors)
    assert len({error.tobytes() for error in errors}) == len(errors)


@pytest.mark.parametrize("mode", KINDS, ids=str)
@pytest.mark.parametrize("spread", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_program_equals_the_parties(mode, spread, monkeypatch, tmp_path):
    cfg = dataclasses.replace(CFG, mode=mode, out=str(tmp_path))
    run = load_program(cfg, monkeypatch, spread=spread)
    state = loop.train(run, quiet=True).state
    server, clients = finished(mode, SP)
    assert_close(server.state, state.server, 1e-5)
    assert_close(clients[-1].state[:2], state.client[:2], 1e-5)
    assert_close(server.memory, state.memory.server, 1e-4)
    errors = jax.tree.map(lambda *leaves: np.stack(leaves), *[client.memory.error for client in clients])
    assert_close(errors, state.memory.client.error, 1e-4)


@pytest.mark.parametrize("mode", [pytest.param(MODES[3], marks=pytest.mark.slow), MODES[4]], ids=str)
def test_what_is_handed_on_in_half_precision(mode, monkeypatch, tmp_path):
    """Each client begins with the rounded part, the optimizer's state too, and tests with its own."""
    cfg = dataclasses.replace(SMOOTH, mode=mode, update_codec=compress.Cast(), out=str(tmp_path))
    state = loop.train(load_program(cfg, monkeypatch, spread=False), quiet=True).state
    server, clients = make_parties(cfg, UNEVEN)
    handed = []
    for exchange in parties.run(server, clients):
        if exchange.phase == Phase.RETURN_PART:
            handed.append(server.part_in_transit)
    assert_close(server.state, state.server, 1e-5)
    assert_close(clients[-1].state[:2], state.client[:2], 1e-5)
    for vector in handed:
        np.testing.assert_array_equal(vector, vector.astype(jnp.bfloat16).astype(np.float32))
    traffic, plain = (run_traffic(built(c, 25).spec, 2) for c in (cfg, dataclasses.replace(SMOOTH, mode=mode)))
    assert 2 * traffic.uplink_synchronization_bytes == plain.uplink_synchronization_bytes > 0


@pytest.mark.usefixtures("built_once")
@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
@pytest.mark.parametrize("update_codec", [SP, compress.RandK(ratio=0.5), CODED], ids=str)
def test_over_a_network_with_faults(tmp_path, mode, update_codec):
    """A client and the server die, and all go back to their checkpoints: the memory is part of these.

    And, in one case, what is left of a budget for the cut.
    """
    cfg = dataclasses.replace(
        SMALL, mode=mode, update_codec=update_codec, epochs=3, **(BUDGET if update_codec == CODED else {})
    )
    with net(tmp_path, cfg, checkpoint_steps=2, disk=True) as it:
        it.start_clients()
        it.run_to(3)
        it.restart(1)
        it.run_to(6)
        it.kill_server()
        it.start_server()
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") > 0


@pytest.mark.usefixtures("built_once")
@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
def test_a_client_that_comes_back_goes_on_with_the_others_part(tmp_path, mode):
    """And, in SplitFed, with what they count the changes of their parts from."""
    cfg = dataclasses.replace(SMALL, mode=mode, update_codec=CODED, epochs=5)
    with net(tmp_path, cfg, latency=0.5, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.start_clients()
        it.run_to(3)
        it.kill(2)
        it.run_to(9)
        it.start_client(2)
        it.run()
        assert not it.failures, it.failures
        assert it.server.membership.active == (0, 1, 2, 3)
        for other in (1, 2, 3):
            jax.tree.map(np.testing.assert_array_equal, it.finals[0].state[:2], it.finals[other].state[:2])
            jax.tree.map(
                np.testing.assert_array_equal, it.finals[0].memory.reference, it.finals[other].memory.reference
            )


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset(60, 30))
    changes = {"clients": 3, "batch_size": 20, "epochs": 2, "update_codec": CODED, "out": str(tmp_path)}
    cfg = dataclasses.replace(SMALL, **changes, **BUDGET)
    folder = RunFolder.create(cfg, "whole")
    whole = from_config.train_config(cfg, folder, quiet=True)
    folder.close()
    original = Progress.step

    def step(self, *args):
        original(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    folder = RunFolder.create(cfg, "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", step)
        with pytest.raises(loop.Interrupted):
            from_config.train_config(cfg, folder, quiet=True)
    assert folder.checkpoints.latest() == 1
    resumed = from_config.train_config(cfg, folder, quiet=True)
    folder.close()
    for name in ("train", "test", "traffic"):
        assert resumed[name] == whole[name]


def test_error_feedback_of_one_sender():
    """What T messages of a constant vector add up to is T times it, but for an error that does not grow with T."""
    spec = built(dataclasses.replace(SMALL, update_codec=compress.TopK(ratio=0.9)), 30).spec
    vectors = tuple(jax.random.normal(jax.random.key(n), e.shape) for n, e in enumerate(averages.no_vectors(spec)))
    encode = jax.jit(functools.partial(averages.encode, spec))
    sums, error = jax.tree.map(jnp.zeros_like, vectors), averages.no_error(spec)
    for step in range(60):
        _, decoded, error = encode(vectors, error, jax.random.key(step))
        sums = jax.tree.map(jnp.add, sums, decoded)
    assert len(error) == 1  # statistics have none
    for total, lost, vector in zip(sums, error, vectors, strict=False):
        np.testing.assert_allclose(total + lost, 60 * vector, rtol=1e-4, atol=1e-3)
        assert np.linalg.norm(lost) < 12 * np.linalg.norm(vector)  # of one in ten kept, ten steps' worth at most


@pytest.mark.parametrize(
    "codec",
    [compress.RandK(ratio=0.9), compress.StochasticUniform(bits=2), dataclasses.replace(CODED, rounding="stochastic")],
    ids=str,
)
def test_an_unbiased_codec_has_no_feedback(codec):
    """Its error may be larger than what it encodes, and would grow from step to step."""
    spec = built(dataclasses.replace(SMALL, update_codec=codec), 30).spec
    assert codec.unbiased and averages.no_error(spec) == ()


@pytest.mark.slow
def test_means_are_those_of_the_updates(monkeypatch):
    """With codecs that lose nothing the averages are those without one, in every mode that averages."""
    monkeypatch.setattr(spec_, "_STATISTICS", compress.Identity())  # no other test has a run with this update_codec
    whole = compress.TopK(ratio=0.0)
    for mode in (MODES[0], MODES[2]):
        ends = []
        for update_codec in (whole, compress.Identity()):
            server, clients = finished(mode, update_codec)
            ends.append((server.state.params, clients[0].state[:2]))
        assert_close(*ends, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
def test_bytes_of_averages(mode):
    """Of plain codecs they follow from shapes; of coded ones the program knows about how long the messages are."""
    cfg = dataclasses.replace(SMALL, mode=mode, update_codec=CODED)
    result = msjax.train(
        _model(), dataset(), codec=compress.Identity(), update_codec=CODED, clients=4, batch_size=10, epochs=1,
        mode=modes.SplitFed(2) if mode.kind == "splitfed" else modes.Parallel(),
    )  # fmt: skip
    traffic = result.history[-1]["traffic"]
    assert "coded_uplink_bytes" not in traffic
    sent = {"up": 0, "down": 0}
    server, clients = _parties_of(result.spec, cfg)
    payload_spec, answer = server.spec.average_payload, server.mean

    def mean(exchange, payloads):
        out = answer(exchange, payloads)
        sent["up"] += sum(map(_coded, payloads, [payload_spec] * len(payloads)))
        sent["down"] += len(payloads) * _coded(out, payload_spec)
        return out

    server.mean = mean
    for _ in parties.run(server, clients):
        pass
    assert traffic["coded_uplink_synchronization_bytes"] == pytest.approx(sent["up"], rel=0.05)
    assert traffic["coded_downlink_synchronization_bytes"] == pytest.approx(sent["down"], rel=0.05)
    plain = run_traffic(built(dataclasses.replace(cfg, update_codec=compress.Identity()), 30).spec, 1)
    assert sent["up"] < plain.uplink_synchronization_bytes / 6  # 2 bits a value, and what each small message costs


def _model():
    return build.make_parts(SMALL, build.DataSummary.of(dataset()))


def _parties_of(spec, cfg):
    ds = dataset()
    indices, _ = build.divide(ds, 4, alpha=None, seed=0)
    client, server = (init_part(spec.optimizer, part) for part in _model())
    shares = [parties.ClientData(data.Arrays(*ds.train.fetch(own)), ds.test) for own in indices]
    made = [parties.Client(n, spec, client, share, 0) for n, share in enumerate(shares)]
    return parties.Server(spec, server, 0), made


def _coded(payload, spec):
    return sum(len(wire.encode(one, c, like)) for one, c, like in zip(payload, spec.codecs, spec.likes, strict=True))


def test_what_does_not_fit_is_refused():
    for changes, said in (
        ({"mode": MODES[3]}, "in sequential mode"),
        ({"update_codec": compress.TopK(granularity="sample")}, 'granularity="tensor"'),
        ({"update_codec": compress.MaskEncoded()}, "update_codec must have signed=True"),
        ({"update_codec": compress.Exact()}, "update_codec must be one of float32 vectors"),
        ({"grad_codec": compress.EntropyMask()}, "grad_codec must have signed=True"),
    ):
        with pytest.raises(ValueError, match=said):
            built(dataclasses.replace(CFG, **changes), 30)
    with pytest.raises(TypeError, match="update_codec must be a codec"):
        msjax.train(_model(), dataset(), update_codec="TopK")


def test_means_over_devices_of_half_precision_are_rounded_once():
    """Of six clients on three devices; rounded on each device as well, the mean would be 1."""
    ulp = 2.0**-7
    weights = jnp.asarray([[1, 1 + ulp], [1, 1 + ulp], [1 + ulp, 1 + ulp]], jnp.bfloat16)
    parts = PartState({"w": weights}, {}, ())
    found = jax.vmap(lambda part: fused.average_parts(part, axis_name="device"), axis_name="device")(parts)
    np.testing.assert_array_equal(found.params["w"], np.full((3, 2), 1 + ulp, jnp.bfloat16))
    assert found.params["w"].dtype == jnp.bfloat16


def test_keys_do_not_depend_on_jaxs_default():
    """With others what is drawn under `vmap` would depend on how clients are grouped."""
    expected = [jax.random.key_data(make(3)) for make in (train_key, eval_key)]
    with jax.default_prng_impl("unsafe_rbg"):
        found = [jax.random.key_data(make(3)) for make in (train_key, eval_key)]
    np.testing.assert_array_equal(found, expected)


def test_a_client_part_without_arrays():
    """There is nothing to average, and so nothing to compress."""
    relu = models.ModelPart(lambda params, stats, x, train, key: (jax.nn.relu(x), stats), {}, {})
    linear = models.ModelPart(
        lambda params, stats, x, train, key: (x @ params["w"], stats), {"w": jnp.ones((4, 2))}, {}
    )
    samples = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32), np.arange(24, dtype=np.int32) % 2
    result = msjax.train((relu, linear), samples, update_codec=SP, clients=2, batch_size=6, epochs=1)
    assert not result.spec.compresses_updates and result.traffic.uplink_synchronization_bytes == 0


def test_a_run_without_it_is_described_as_before():
    """So that folders and clients of earlier versions fit."""
    plain, compressed = (built(cfg, 30).spec for cfg in (SMOOTH, CFG))
    added = compressed.describe().keys() - plain.describe().keys()
    assert added == {"update_codec", "client statistics", "statistics codec"}
    assert plain.average_payload.nbytes == 4 * plain.client_update_values
    state = TrainState(PartState({}, {}, ()), PartState({}, {}, ()), jnp.int32(0))
    assert list(saved.to_save(plain, state)) == ["client", "server", "step"]


def test_statistics_are_sent_as_changes():
    spec = built(CFG, 30).spec
    grads, old = {"w": jnp.ones(3)}, {"mean": jnp.full(2, 5.0), "count": jnp.int32(1)}
    update = PartUpdate(grads, {"mean": jnp.full(2, 5.5), "count": jnp.int32(2)})
    vectors = averages._update_vectors(update, old)
    np.testing.assert_array_equal(vectors[1], [0.5, 0.5])
    mean = averages._mean_update((jnp.zeros(3), jnp.full(2, 0.25)), update, old)
    np.testing.assert_array_equal(mean.stats["mean"], [5.25, 5.25])
    assert int(mean.stats["count"]) == 2 and len(spec.average_payload.likes) == 2


@pytest.mark.parametrize("codec", [SP, dataclasses.replace(CODED, bits=1.0)], ids=str)
def test_running_variances_stay_positive_and_follow_the_data(codec):
    """With error feedback a change that was not sent would be counted again in every step, and overshoot."""
    spec = built(dataclasses.replace(SMALL, update_codec=codec), 30).spec
    grads = jnp.zeros(spec.client_weight_values)
    variances = jnp.geomspace(1e-4, 20.0, spec.client_statistic_values)

    def step(carry, key):
        running, errors, error = carry
        batch = variances * jnp.exp(0.1 * jax.random.normal(key, (4, variances.size)))
        vectors = jnp.stack([grads] * 4), 0.1 * (batch - running)
        sent = averages.send(spec, vectors, errors, jax.random.split(key, 4))
        (_, change), error, _ = averages.answer(spec, averages.over_devices(sent.total, 4, None), error, key)
        return (running + change, sent.error, error), (running + change).min()

    error = averages.no_error(spec)
    start = jnp.ones(variances.size), jax.tree.map(lambda e: jnp.stack([e] * 4), error), error
    (running, _, _), least = jax.jit(functools.partial(jax.lax.scan, step))(
        start, jax.random.split(jax.random.key(0), 120)
    )
    assert least.min() > 0
    np.testing.assert_allclose(running, variances, rtol=0.15)


def test_statistics_of_rounds_are_sent_as_they_are():
    """In a round a variance may fall to nearly nothing, and a relative error of the change would take it below."""
    spec = built(dataclasses.replace(CFG, mode=MODES[2]), 30).spec
    reference = averages.no_vectors(spec)[:1]
    assert spec.mode.own_parts and spec.average_payload.codecs == (SP, compress.Identity())
    stats = jnp.geomspace(1e-6, 1e3, spec.client_statistic_values)
    part = PartState({"w": jnp.ones(spec.client_weight_values)}, {"var": stats}, ())
    payload, memory = averages.encode_part(
        spec, part, averages.Memory(averages.no_error(spec), reference), jax.random.key(0)
    )
    part, memory = averages.decode_part(spec, payload, part, memory)
    np.testing.assert_array_equal(part.stats["var"], stats)
    assert [v.size for v in memory.reference] == [v.size for v in memory.error] == [spec.client_weight_values]
