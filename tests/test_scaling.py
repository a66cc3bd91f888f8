"""The page on scaling: each figure is what its formula gives, and the formulas are what they say."""

import pytest

from experiments import scaling
from msjax import plan


def test_formulas():
    assert scaling.ring_seconds(100, 2, 50) == 2.0 and scaling.ring_seconds(80, 8, 70) == pytest.approx(2.0)
    peak = scaling.assumed("peak of an accelerator")
    assert scaling.compute_seconds(peak) * scaling.assumed("share of the peak that a step reaches") == pytest.approx(1)
    assert scaling.assumed("a client's link") == 1e8 and scaling.assumed("the server's link") == 1e10
    assert [scaling.number(x) for x in (0.00123456, 1234567.0, 12.0)] == ["0.00123", "1,230,000", "12"]


def test_tables_take_their_places():
    page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    assert scaling.with_tables(page, {"x": "new"}) == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb"
    with pytest.raises(ValueError, match="a place for the table 'y'"):
        scaling.with_tables(page, {"y": ""})


@pytest.mark.slow
def test_the_page_has_what_the_formulas_give():
    """If the change was meant: python -m experiments.scaling."""
    text = scaling.PAGE.read_text()
    assert scaling.with_tables(text, scaling.tables()) == text
    values = 28 * 28 * 128  # of a sample's features at the medium cut
    found = scaling.network("medium")
    assert plan.values(found.run.spec.features.batch(1)) == values
    # ResNet34 of torchvision, whose shortcuts of its first stage have no parameters either.
    assert sum(needs.trained_values for needs in found.needs.values()) == 21_797_672
    averages = 4 * found.run.spec.client_update_values
    it = scaling.over_network("medium", 8, "MS")
    samples = 1_281_167 // 8
    full, rest = divmod(samples, 256)
    assert (it.epoch_steps, it.batch_size) == (full + 1, 256)
    features = sum(4 * (n * values // 100) + n * values / 4 for n in [256] * full + [rest])
    sent = (features + 4 * samples) / it.epoch_steps + averages, 4 * values * samples / it.epoch_steps + averages
    assert (it.sent.up_bytes, it.sent.down_bytes) == pytest.approx(sent)
    assert it.client_link_seconds == pytest.approx(8 * sum(sent) / 1e8)
    assert it.server_link_seconds == pytest.approx(8 * it.client_link_seconds / 100)
    many = scaling.over_network("medium", 100_000, "none")
    assert (many.epoch_steps, many.batch_size) == (1, 12)
    assert many.sent.up_bytes == 12 * 4 * (values + 1) + averages
    one, other = (scaling.on_accelerators("medium", devices) for devices in scaling.ACCELERATORS)
    assert one.bytes == other.bytes and one.ring_seconds * 450 / 7 * 8 == pytest.approx(
        other.ring_seconds * 50 / 63 * 64
    )
