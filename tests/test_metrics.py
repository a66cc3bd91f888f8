"""Every byte is counted: Traffic against the payloads that are really made."""

import dataclasses
import math

import jax
import pytest

from msjax import compress, config, metrics, parties, train
from msjax.protocol import Phase

from .test_parties import MODES, SMALL, make_parties


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("codec", "mode"),
    [(compress.Identity() if mode.head_cut == "last" else compress.MaskEncoded(ratio=0.9), mode) for mode in MODES],
    ids=str,
)
def test_traffic_is_what_the_parties_send(codec, mode):
    """Over two epochs, the second with a test, and a smaller last step, whose k is rounded down by itself."""
    grad_codec = compress.StochasticUniform(bits=4)
    cfg = dataclasses.replace(SMALL, codec=codec, grad_codec=grad_codec, mode=mode, test_every=2)
    plan, server, clients = make_parties(cfg)
    sent = {"uplink_bytes": 0, "downlink_bytes": 0, "paper_bytes": 0}
    handle = server.handle

    def counting(exchange, messages):
        answers = handle(exchange, messages)
        up, down = ([m.payload for m in group.values()] for group in (messages, answers))
        if exchange.phase != Phase.TEST:
            labels = [m.labels for m in messages.values() if m.labels is not None]
            sent["uplink_bytes"] += nbytes(up) + nbytes(labels)
            sent["downlink_bytes"] += nbytes(down)
        if exchange.phase in (Phase.TEST, Phase.FEATURES):
            sent["paper_bytes"] += nbytes(up)
        return answers

    server.handle = counting
    for _ in parties.run(plan, server, clients):
        pass
    traffic = metrics.run_traffic(clients[0].shapes, 2)
    assert {name: getattr(traffic, name) for name in sent} == sent
    assert (traffic + traffic).uplink_bytes == (traffic * 2).uplink_bytes == 2 * traffic.uplink_bytes
    if mode.head_cut is not None:
        assert traffic.uplink_label_bytes == 0 and traffic.uplink_gradient_bytes > 0
    alone = metrics.epoch_traffic(make_parties(dataclasses.replace(cfg, clients=1))[2][0].shapes, 0)
    assert alone.uplink_synchronization_bytes == alone.downlink_synchronization_bytes == 0


@pytest.mark.parametrize("compressed", [True, False])
def test_papers_accounting_of_an_epoch(compressed):
    """Uplink feature maps, training and test samples: 60,000 × 65,536 bytes for VGG19's shallow cut, 3.662 · 2^30."""
    codec = compress.MaskEncoded()
    cfg = config.Config(codec=codec, clients=1, batch_size=6, epochs=1, eval_compressed=compressed)
    job = train.prepare(cfg)
    traffic = metrics.epoch_traffic(job.shapes, 0)
    tested = traffic.paper_bytes - traffic.uplink_feature_bytes
    if compressed:
        assert tested == 60 * codec.payload_bytes(job.shapes.features(6)) and job.test.count == 60 * 6
    else:
        assert tested == job.test.count * math.prod(job.shapes.features(1).shape) * 4
    assert 3.6615 < 60_000 * 64 * 16 * 16 * 4 / 2**30 < 3.6625
