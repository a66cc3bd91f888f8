"""The rate–distortion limit where theory knows it, and the comparison of codecs on a small source."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_maps, rate_distortion
from msjax import config, data, load_part, runs
from msjax.compress import EntropyMask, MaskEncoded
from msjax.training.from_config import train_config


def test_limit_of_a_normal_source():
    """D = 2^(−2R)."""
    h = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32)
    points = [(bits, error) for bits, error in rate_distortion.limit(h) if 0.2 < bits < 3]
    assert len(points) > 5
    for bits, error in points:
        assert error == pytest.approx(4**-bits, rel=0.03)


def test_limit_of_a_coin():
    """Equal numbers of ±1: easier than a normal source of the same energy, and without error at one bit."""
    h = np.tile(np.float32([1, -1]), 5000)
    bits, errors = zip(*sorted(rate_distortion.limit(h)), strict=True)
    assert bits[-1] == pytest.approx(1, abs=0.01) and errors[-1] < 1e-3
    assert all(e <= 4**-b + 1e-6 for b, e in zip(bits, errors, strict=True))


@pytest.mark.slow
def test_no_codec_beats_the_limit_and_the_table_compares():
    h = rate_distortion.synthetic(1 << 16)["relu(normal)"]
    codecs = (MaskEncoded(), EntropyMask(bits=1.0), EntropyMask(bits=2.32), TOPK)
    rows = [{"source": "s", **rate_distortion.measure(h, codec)} for codec in codecs]
    curve = [{"source": "s", "codec": "limit", "bits": b, "error": e} for b, e in rate_distortion.limit(h)]
    for row in rows:
        assert row["error"] > rate_distortion.at(curve, "bits", row["bits"], "error")
    line = rate_distortion.table(rows + curve).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "s" and float(cells[3]) == pytest.approx(rows[0]["error"], rel=0.01)
    assert float(cells[5]) < float(cells[4]) < float(cells[3])
    rate_distortion.plot(rows + curve)


def test_signed_sources_get_signed_codecs():
    assert all(getattr(codec, "signed", True) for codec in rate_distortion.codecs(signed=True))
    assert {type(codec).__name__ for codec in rate_distortion.codecs(signed=False)} >= {"MaskEncoded", "RandK"}


TOPK = rate_distortion.codecs(signed=False)[4]


@pytest.mark.slow
def test_feature_maps_of_a_run(tmp_path):
    """At the cut of the run itself they are the features that its client's part makes; codecs take them."""
    cfg = config.Config(clients=2, batch_size=200, epochs=1, model=config.ModelConfig(width=0.5))
    folder = runs.RunFolder.create(dataclasses.replace(cfg, out=str(tmp_path)), "run")
    train_config(cfg, folder, quiet=True)
    folder.close()
    maps = feature_maps.collect(str(tmp_path / "run"), samples=40)
    assert maps.keys() == {
        f"{cut}/{kind}" for cut in ("shallow", "medium", "deep") for kind in ("features", "gradients")
    }
    part = load_part(tmp_path / "run/client.safetensors")
    images = data.load("digits").train_inputs[:40]
    x = (images / np.float32(255) - np.float32(part.summary.mean)) / np.float32(part.summary.std)
    part = part._replace(**jax.tree.map(jnp.asarray, {"params": part.params, "stats": part.stats}))
    h, _ = part.apply(part.params, part.stats, jnp.asarray(x, jnp.float32), train=True)
    np.testing.assert_allclose(maps["medium/features"], h, rtol=1e-4, atol=1e-5)
    for kind in ("features", "gradients"):
        row = rate_distortion.measure(maps[f"medium/{kind}"], EntropyMask(bits=3.0, levels=31, signed=True))
        assert 0 < row["error"] < 0.1
