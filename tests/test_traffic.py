"""Every byte is counted: Traffic against the payloads that are really made."""

import dataclasses
import math

import jax
import pytest

from msjax import compress, config, models
from msjax.split import parties, traffic
from msjax.split.schedule import Phase
from msjax.training.from_config import load_run

from .setups import MODES, SMALL, UNEVEN, built, make_parties


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("codec", "mode"),
    [
        pytest.param(
            compress.Identity() if mode.tail_cut == "last" else compress.MaskEncoded(ratio=0.9),
            mode,
            marks=[] if mode == MODES[3] else [pytest.mark.slow],
        )
        for mode in MODES
    ],
    ids=str,
)
def test_traffic_is_what_the_parties_send(codec, mode):
    """Over two epochs, the second with a test, and a smaller last step, whose k is rounded down by itself."""
    grad_codec = compress.StochasticUniform(bits=4)
    cfg = dataclasses.replace(SMALL, codec=codec, grad_codec=grad_codec, mode=mode, test_every=2)
    server, clients = make_parties(cfg, UNEVEN)
    sent = {
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "uplink_test_bytes": 0,
        "downlink_test_bytes": 0,
        "paper_bytes": 0,
    }
    handle = server.handle

    def counting(exchange, messages):
        answers = handle(exchange, messages)
        up, down = ([m.payload for m in group.values()] for group in (messages, answers))
        kind = "test_bytes" if exchange.phase == Phase.TEST else "bytes"
        labels = [m.labels for m in messages.values() if m.labels is not None]
        sent[f"uplink_{kind}"] += nbytes(up) + nbytes(labels)
        sent[f"downlink_{kind}"] += nbytes(down)
        if exchange.phase in (Phase.TEST, Phase.FEATURES):
            sent["paper_bytes"] += nbytes(up)
        return answers

    server.handle = counting
    for _ in parties.run(server, clients):
        pass
    found = traffic.run_traffic(server.spec, 2)
    assert {name: getattr(found, name) for name in sent} == sent
    assert (found + found).uplink_bytes == (found * 2).uplink_bytes == 2 * found.uplink_bytes
    if mode.tail_cut is not None:
        assert found.uplink_label_bytes == 0 and found.uplink_gradient_bytes > 0
    alone = traffic.epoch_traffic(built(dataclasses.replace(cfg, clients=1), *UNEVEN).spec, 0)
    assert alone.uplink_synchronization_bytes == alone.downlink_synchronization_bytes == 0


@pytest.mark.parametrize("compressed", [True, False])
def test_papers_accounting_of_an_epoch(compressed):
    """Uplink feature maps, of training and of test samples."""
    codec = compress.MaskEncoded()
    cfg = config.Config(codec=codec, clients=1, batch_size=6, epochs=1, eval_compressed=compressed)
    run = load_run(cfg)
    found = traffic.epoch_traffic(run.spec, 0)
    tested, count = found.paper_bytes - found.uplink_feature_bytes, len(run.dataset.test)
    (like,) = run.spec.features.batch_leaves(6)
    if compressed:
        assert tested == 60 * codec.payload_bytes(like) and count == 60 * 6
    else:
        assert tested == count * run.spec.features.nbytes


def test_the_papers_bytes_of_an_epoch_of_vgg19():
    """60,000 images of CIFAR-10 behind the shallow cut: 3.662 · 2^30 bytes, as its Table 1 says."""
    model = models.build("vgg19", input_shape=(32, 32, 3), num_classes=10)
    (shallow,) = [cut for cut in models.list_cuts(model) if cut.name == "shallow"]
    assert 60_000 * math.prod(shallow.shape) * 4 / 2**30 == pytest.approx(3.662, abs=5e-4)
