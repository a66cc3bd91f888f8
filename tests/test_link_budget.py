"""A budget for the cut that follows each client's link."""

import dataclasses

import numpy as np
import pytest

import msjax
from msjax import compress, config
from msjax.distributed import messages
from msjax.distributed.client_program import LinkWatch
from msjax.split import budget, parties
from msjax.split.schedule import Phase
from msjax.training import loop

from .helpers import assert_same_change
from .network import net
from .setups import MODES, UNEVEN, built, dataset, even, load_program, make_parties
from .test_budget import CFG

SPEED = 2e5
SHALLOW = dataclasses.replace(CFG, model=config.ModelConfig("convnet", "shallow", 0.5), clients=2, epochs=1)
SPEC = built(SHALLOW, 60).spec
VALUES = SPEC.features.batch_leaves(10)[0].size
AVERAGE_BYTES = 2 * 4 * SPEC.client_update_values
OTHER_BYTES = 10 * 4 + AVERAGE_BYTES
"""Of labels, and of an average up and down."""


def seconds_of(bits):
    """The time that the messages of a step with a full batch and so many bits a value take at `SPEED`."""
    return (VALUES * bits / 8 + OTHER_BYTES) / SPEED


LINK = dataclasses.replace(SHALLOW, cut_bits=6.0, cut_seconds=seconds_of(4.0))
KNOWN = dataclasses.replace(LINK, link_bytes_per_second=SPEED)


def test_the_budget_is_what_fits_in():
    """From an eighth of what it may be to all of it; all of it where nothing is known of the link."""
    spec = built(LINK, 60).spec
    found = {speed: budget.budget_bits(spec, np.float32(speed)) for speed in (0, SPEED, SPEED / 2, 1, 10 * SPEED)}
    half = 8 * (SPEED / 2 * LINK.cut_seconds - OTHER_BYTES) / VALUES
    expected = {0: 6.0, SPEED: 4.0, SPEED / 2: half, 1: 6.0 / 8, 10 * SPEED: 6.0}
    assert found == pytest.approx(expected, rel=1e-6)
    assert budget.grad_bits(spec, np.float32(SPEED)) == pytest.approx(2.0)
    # A batch is no larger than what a client has.
    assert budget.budget_bits(built(LINK, 5).spec, np.float32(SPEED / 2)) > 1.9 * half
    # U-shaped, what crosses the second cut has its codecs' own bits, of gradients half of the budget; no labels.
    u_shaped = built(dataclasses.replace(LINK, mode=MODES[1]), 60).spec
    others = (
        2 * 4 * u_shaped.client_update_values + u_shaped.tail_feature_payload(10).float_values * (3.0 + 6.0 / 2) / 8
    )
    expected = 8 * (2 * SPEED * LINK.cut_seconds - others) / VALUES
    assert budget.budget_bits(u_shaped, np.float32(2 * SPEED)) == pytest.approx(expected)
    without = built(CFG, 60).spec
    assert budget.grad_bits(without, None) is budget.first_bytes_per_second(without) is None


def test_averages_are_part_of_the_time():
    """As many as there are of them in a step, and as large as their codec makes them."""
    weights, statistics = SPEC.client_weight_values, SPEC.client_statistic_values
    coded = compress.EntropyMask(bits=2.0, signed=True)
    rounds = config.ModeConfig(kind="splitfed", average_steps=4)  # in 6 steps an epoch behind the fourth and the last
    for fields, expected in (
        ({}, AVERAGE_BYTES),
        ({"clients": 1}, 0),
        ({"update_codec": coded}, 2 * (weights * 2.0 / 8 + statistics + 4)),
        ({"update_codec": compress.Cast()}, 2 * (2 * weights + statistics + 4)),
        ({"mode": rounds}, AVERAGE_BYTES * 2 / 6),
        ({"mode": config.ModeConfig(kind="sequential", turn_steps=2)}, 2 * 4 * SPEC.client_state_values / 2),
        # Of a round's one client: fetched twice, returned twice, and once more for the test.
        ({"mode": dataclasses.replace(rounds, client_fraction=0.5)}, 5 * 4 * SPEC.client_state_values / 6),
        ({"mode": rounds, "update_codec": coded}, 2 * (weights * 2.0 / 8 + 4 * statistics) * 2 / 6),
    ):
        spec = built(dataclasses.replace(LINK, **fields), 60).spec
        assert budget.synchronization_bytes(spec) == pytest.approx(expected)


def test_a_link_that_is_too_slow_is_told_once():
    """After some steps without a faster one between them."""
    spec, watch = built(LINK, 60).spec, LinkWatch()
    enough = np.float32((LINK.cut_bits / 8 * VALUES / 8 + OTHER_BYTES) / LINK.cut_seconds)
    slow = np.float32(enough * 0.99)
    speeds = [slow] * 19 + [enough * np.float32(1.01)] + [slow] * 30
    told = [n for n, speed in enumerate(speeds) if watch(spec, speed)]
    assert told == [39]
    said = LinkWatch()
    last = [said(spec, slow) for _ in range(20)][-1]
    assert last.startswith("cut_seconds=") and "the least budget, 0.75 bits both ways, takes about" in last
    assert f"{AVERAGE_BYTES / slow:.2g} s of it for what keeps clients equal" in last
    assert last.endswith("or smaller batches, or give an update_codec. The link's speed was measured, with its latency")
    assert LinkWatch()(built(CFG, 60).spec, None) is None


def test_the_aim_goes_with_the_budget():
    """A link that gets slower is followed at once, not by and by."""
    spec = built(LINK, 60).spec
    sent = np.float32(4.0 * VALUES / 8)
    aim = budget.next_up_bits(spec, np.float32(3.0), sent, 10, (np.float32(4.0), np.float32(1.0)))
    np.testing.assert_allclose(aim, 0.75, rtol=1e-6)


def test_a_speed_is_smoothed():
    """As a ratio, so that one slow message in ten counts as one that is ten times as fast."""
    first = budget.next_bytes_per_second(np.float32(0), 1e6)
    assert first == 1e6
    assert budget.next_bytes_per_second(first, 1e6 * (1 + 1e-9)) == first
    slow, fast = (budget.next_bytes_per_second(first, 1e6 * ratio) for ratio in (0.25, 4.0))
    assert (slow, fast) == (5e5, 2e6)
    for wrong in (None, float("nan"), float("inf"), 0.0, -1.0):
        assert budget.next_bytes_per_second(slow, wrong) == slow
    for _ in range(20):
        slow = budget.next_bytes_per_second(slow, 1e6)
    assert slow == pytest.approx(1e6, rel=1e-4)


class Link:
    """Lines of known speeds: a message takes its bytes over its client's speed, and nothing else takes time."""

    def __init__(self, it, *speeds):
        self.speeds, self.sent = speeds, [{} for _ in speeds]
        it.disturb(self)

    def __call__(self, direction, client, message):
        kind, nbytes = message.WhichOneof("kind"), message.ByteSize()
        at = getattr(message, kind).position if kind in ("request", "answer") else None
        if at is not None and at.phase in (Phase.FEATURES, Phase.AVERAGE):
            self.sent[client][at.step] = self.sent[client].get(at.step, 0) + nbytes
        return (nbytes / self.speeds[client],)


def test_a_network_measures_its_links(tmp_path):
    """Each client its own, whoever waits for whom at the server; and then their messages take the time that is set."""
    with net(tmp_path, dataclasses.replace(LINK, epochs=2)) as it:
        link = Link(it, SPEED, SPEED / 2)
        it.start_clients().run()
        assert not it.failures
        for client, speed in enumerate(link.speeds):
            party = it.finals[client]
            assert party.bytes_per_second == pytest.approx(speed, rel=1e-5)
            sent = list(link.sent[client].values())
            assert len(sent) == 12
            assert sent[0] / speed > 1.3 * LINK.cut_seconds  # nothing was known of the link
            assert sent[-1] / speed == pytest.approx(LINK.cut_seconds, rel=0.15)


def test_a_network_over_a_known_link_equals_one_program(tmp_path):
    """Bit for bit, also where processes are killed: what was measured is part of the checkpoints."""
    with net(tmp_path, KNOWN, checkpoint_steps=2) as it:
        Link(it, SPEED, SPEED)
        it.start_clients()
        it.run_to(3)
        assert it.saved["client0/" + it.run_name][2][-1] == SPEED
        it.restart(0)
        it.run_to(4)
        it.kill_server()
        it.start_server()
        it.run()
        it.assert_equal_to_program()
        _, clients = make_parties(KNOWN)
        assert [it.finals[n].bytes_per_second for n in range(2)] == [client.bytes_per_second for client in clients]


@pytest.mark.slow
def test_a_network_that_hands_parts_on_has_a_budget(tmp_path):
    """U-shaped, too: each turn begins anew, also after a client was killed."""
    with net(tmp_path, dataclasses.replace(KNOWN, mode=MODES[4]), checkpoint_steps=2) as it:
        Link(it, SPEED, SPEED)
        it.start_clients()
        it.run_to(3)
        it.restart(1)
        it.run()
        it.assert_equal_to_program()


def test_a_repeated_request_measures_nothing(tmp_path):
    """Its answer may be to the first, and the time between them is that of no message."""
    with net(tmp_path, LINK) as it:
        Link(it, SPEED, SPEED)
        it.start_clients()
        it.run_to(1)
        it.cut(0)
        it.run()
        assert not it.failures
        assert it.finals[0].bytes_per_second == pytest.approx(SPEED, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "spread"), [(MODES[0], True), (MODES[0], False), (MODES[1], False)])
def test_the_program_equals_the_parties(mode, spread, monkeypatch, tmp_path):
    """With a simulated link, whose budget is less than it might be."""
    cfg = dataclasses.replace(KNOWN, mode=mode, grad_kept_only=True, out=str(tmp_path))
    counts = UNEVEN if mode == MODES[0] and not spread else even(cfg.clients)
    run = load_program(cfg, monkeypatch, spread=spread, counts=counts)
    state = loop.train(run, quiet=True).state
    server, clients = make_parties(cfg, counts)
    before = server.state.params, clients[0].state.params
    for _ in parties.run(server, clients):
        pass
    np.testing.assert_allclose([client.up_bits for client in clients], state.up_bits, atol=0.02)
    assert np.all(np.asarray(state.up_bits) < 4.0)
    both = server.state.params, clients[0].state.params
    assert_same_change(both, (state.server.params, state.client.params), before, 0.1)


def test_gradients_get_half_of_the_budget():
    """Of that of the step, which the client says, not of the most that it might be."""
    cfg = dataclasses.replace(KNOWN, grad_codec=dataclasses.replace(CFG.grad_codec, error=1e-3, levels=15))
    server, clients = make_parties(cfg)
    exchange = next(server.spec.schedule.exchanges())
    sent = {n: client.send(exchange) for n, client in enumerate(clients)}
    sent[1] = sent[1]._replace(grad_bits=np.float32(1.0))
    answers = server.handle(exchange, sent)
    data = [messages.encode(answers[n].payload, server.spec.down(exchange), None) for n in range(2)]
    bits = [8 * len(one) / VALUES for (one,) in data]
    assert bits == pytest.approx([2.0, 1.0], abs=0.25)  # with the headers of such small messages


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cut_seconds": 0.0}, r"cut_seconds must be a number in 1e-30..1e[+]30, or None, got 0.0"),
        ({"cut_seconds": float("inf")}, "cut_seconds must be a finite number or None, got inf"),
        ({"cut_seconds": 1.0, "cut_bits": None}, "cut_seconds must be None without cut_bits, got 1.0"),
        ({"link_bytes_per_second": -1.0}, r"link_bytes_per_second must be a number in 1e-30.* got -1.0"),
        (
            {"link_bytes_per_second": 1e6, "cut_seconds": None},
            "link_bytes_per_second must be None without cut_seconds, got 1000000.0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        built(dataclasses.replace(LINK, **changes), 30)


def test_one_program_must_be_told_its_link(monkeypatch):
    said = "link_bytes_per_second must be given with cut_seconds .* got None"
    with pytest.raises(ValueError, match=said):
        load_program(LINK, monkeypatch, spread=False)
    codecs = {"codec": LINK.codec, "grad_codec": LINK.grad_codec, "cut_bits": 6.0, "cut_seconds": 1.0}
    with pytest.raises(ValueError, match=said):
        msjax.train(_layers(), dataset(), cut=1, clients=2, **codecs)


def test_one_program_says_that_its_link_is_too_slow(caplog, monkeypatch):
    class Begun(Exception):
        """In place of the training."""

    def run(self):
        raise Begun

    monkeypatch.setattr(loop._Loop, "run", run)
    codecs = {"codec": LINK.codec, "grad_codec": LINK.grad_codec, "cut_bits": 6.0, "cut_seconds": 1.0}
    with pytest.raises(Begun):
        msjax.train(_layers(), dataset(), cut=1, clients=2, epochs=1, link_bytes_per_second=100.0, **codecs)
    assert caplog.text.count("cut_seconds=1 cannot be kept on this link") == 1


def _layers():
    from flax import nnx

    rngs = nnx.Rngs(0)
    flatten = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return nnx.Sequential(nnx.Conv(1, 4, (3, 3), rngs=rngs), flatten, nnx.Linear(256, 10, rngs=rngs))


def test_a_server_checks_what_gradients_may_take():
    """A client that could ask for any number could have all gradients sent, or none."""
    server, clients = make_parties(KNOWN)
    exchange = next(server.spec.schedule.exchanges())
    sent = clients[0].send(exchange)
    request = messages.to_request(sent, exchange, server.spec).request
    assert messages.from_request(request, server.spec, exchange).grad_bits == sent.grad_bits == 2.0
    for bits in (0.0, 0.3, 3.1, float("nan")):
        request.grad_bits = bits
        with pytest.raises(messages.ProtocolError, match=r"grad_bits must be in 0.375..3, got"):
            messages.from_request(request, server.spec, exchange)
    without, others = make_parties(CFG)
    request = messages.to_request(others[0].send(exchange), exchange, without.spec).request
    request.grad_bits = 1.0
    with pytest.raises(messages.ProtocolError, match=r"no use for it, got 1.0"):
        messages.from_request(request, without.spec, exchange)


def test_other_runs_are_described_as_before():
    assert built(KNOWN, 30).spec.describe().keys() - built(CFG, 30).spec.describe().keys() == {
        "cut_seconds",
        "link_bytes_per_second",
    }
