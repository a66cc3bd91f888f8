"""One budget for both ways over the cut: features aim at what gradients leave."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
from msjax import compress, config, models, parts, wire
from msjax.cli import generate, network
from msjax.pair import load_pair, predict
from msjax.runs import RunFolder
from msjax.split import budget, parties
from msjax.split.schedule import Phase
from msjax.training import evaluator, from_config, loaded, loop, program

from .helpers import assert_same_change
from .setups import MODES, SMALL, UNEVEN, built, even, load_program, make_parties

BUDGET = {
    "codec": compress.EntropyMask(bits=3.0),
    "grad_codec": compress.EntropyMask(error=0.3, levels=7, signed=True, rounding="stochastic"),
    "cut_bits": 5.0,
}
"""More than one would choose: so small messages take many bits for their headers."""
CFG = dataclasses.replace(SMALL, model=config.ModelConfig("convnet", width=1.0), **BUDGET)


def test_the_aim_meets_the_budget():
    """Whatever the messages take: more than was aimed at, and gradients that take less and less."""
    spec = built(dataclasses.replace(CFG, cut_bits=3.0), 30).spec
    values = sum(like.size for like in spec.feature_payload(10).likes)
    aim = jnp.broadcast_to(budget.first_up_bits(spec), (2,))
    for step in range(60):
        gradients = np.array([1.4 * 0.9**step + 0.1, 0.5])
        taken = 1.1 * aim + 0.05 + gradients
        aim = budget.next_up_bits(spec, aim, taken * values / 8, 10)
    np.testing.assert_allclose(taken, 3.0, atol=0.02)
    # Not without limit, as gradients get half of the budget at most.
    for _ in range(60):
        aim = budget.next_up_bits(spec, aim, jnp.full(2, 5.0) * values / 8, 10)
    np.testing.assert_allclose(aim, 0.75)
    assert spec.grad_codec.default.bits == 1.5 and spec.grad_codec.default.error == 0.3


def test_a_short_batch_moves_the_aim_by_its_share():
    """The last of an epoch, just before the test: its headers would be most of it."""
    spec = built(dataclasses.replace(CFG, cut_bits=3.0), 30).spec
    aim, values = jnp.full(1, 1.5), spec.feature_payload(1).float_values
    moved = [float((budget.next_up_bits(spec, aim, aim * 0 + 4.0 * n * values / 8, n) - aim)[0]) for n in (10, 1)]
    np.testing.assert_allclose(moved, [-0.2, -0.02], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "spread"),
    [
        (MODES[0], False),
        (MODES[2], True),
        (config.ModeConfig(kind="splitfed", average_steps=2, client_fraction=0.5), False),
        (MODES[4], False),
    ],
    ids=["parallel", "splitfed", "fraction", "sequential and U-shaped"],
)
def test_the_program_equals_the_parties(mode, spread, monkeypatch, tmp_path):
    """With a budget that each client keeps for itself, or begins anew in each turn, and gradients of what was kept."""
    cfg = dataclasses.replace(CFG, mode=mode, grad_kept_only=True, epochs=1, out=str(tmp_path))
    counts = UNEVEN if mode == MODES[0] else even(cfg.clients)
    run = load_program(cfg, monkeypatch, spread=spread, counts=counts)
    state, (*_, last), *_ = loop.train(run, quiet=True)
    server, clients = make_parties(cfg, counts)
    before = server.state.params, clients[0].state.params
    for exchange in parties.run(server, clients):
        if exchange.phase in (Phase.FEATURES, Phase.GRADIENT):
            aims = np.array([clients[n].up_bits for n in exchange.clients])
    assert mode.client_fraction < 1 or len(set(aims.tolist())) == len(aims)
    np.testing.assert_allclose(aims, state.up_bits, atol=0.02)
    trained = clients[server.spec.schedule.test_clients[0]]
    both = server.state.params, trained.state.params
    assert_same_change(both, (state.server.params, state.client.params), before, 0.1)
    assert server.test.means(server.spec.task)["loss"] == pytest.approx(last["test"]["loss"], rel=0.02)


@pytest.mark.parametrize("spread", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tests_are_at_the_bits_of_training(spread, monkeypatch):
    """Each client's at its own, not at those that its codec names: the server has learnt on features with so many."""
    found = []
    for bits, changes in ((None, {}), (0.4, {"cut_bits": None}), (3.0, {"cut_bits": None})):
        codec = CFG.codec if bits is None else dataclasses.replace(CFG.codec, bits=bits)
        run = load_program(dataclasses.replace(CFG, codec=codec, **changes), monkeypatch, spread=spread)
        state, mesh = loaded.placed(run)
        if bits is None:
            state = state._replace(up_bits=jnp.full_like(state.up_bits, 0.4))
        found.append(evaluator.Evaluator(run, mesh)(state)["loss"])
    assert found[0] == found[1] != found[2]


def test_the_aims_of_all_processes_are_gathered(monkeypatch):
    """As `jax.process_count` says that there are two, what the program has on its devices is copied to all of them."""
    run = load_program(CFG, monkeypatch, spread=True)
    state, mesh = loaded.placed(run)
    state = state._replace(up_bits=state.up_bits + jnp.arange(len(state.up_bits), dtype=jnp.float32))
    alone = program.gather(run.spec, state, mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = program.gather(run.spec, state, mesh)
    np.testing.assert_array_equal(found.up_bits, alone.up_bits)
    assert budget.mean_up_bits(found.up_bits) == pytest.approx(3.0 + (CFG.clients - 1) / 2)


def test_a_trained_part_goes_on_at_the_bits_of_training(tmp_path):
    """In predictions, texts and tests over a network: the file of the client's part says how many they are."""
    cfg = dataclasses.replace(CFG, epochs=1, clients=2, out=str(tmp_path))
    folder = RunFolder.create(cfg, "run")
    from_config.train_config(cfg, folder, quiet=True)
    trained, x = load_pair(folder.path), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    aimed = trained.client.up_bits
    assert 2.5 <= aimed <= 10 and abs(aimed - cfg.codec.bits) > 0.3 and trained.server.up_bits is None
    found = predict(trained, x)
    for bits, same in ((aimed, True), (cfg.codec.bits, False)):
        codec = dataclasses.replace(cfg.codec, bits=bits)
        plain = trained.client._replace(up_bits=None, config=dataclasses.replace(cfg, codec=codec, cut_bits=None))
        assert np.array_equal(predict(trained._replace(client=plain), x), found) == same
        assert np.array_equal(first_test_message(plain), first_test_message(trained.client)) == same
    assert generate.codec_of(trained.client).bits == aimed
    # U-shaped, what the server returns goes through this codec, too, and has no part in the budget.
    assert generate.codec_of(trained.client._replace(tail=len)) == cfg.codec


def first_test_message(part):
    """The codes of what `msjax eval --server` sends first."""

    class Remote:
        def answers(self, payloads, *_):
            raise StopAsyncIteration(*payloads)

    with pytest.raises(StopAsyncIteration) as stopped:
        network._evaluate(part, Remote(), network._EvalOptions(part="", server=""))
    return stopped.value.args[0][0].codes


def test_a_part_of_ones_own_says_its_bits(tmp_path):
    from flax import nnx

    client, server = (nnx.Linear(*widths, rngs=nnx.Rngs(0)) for widths in ((6, 300), (300, 3)))
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    options = {"clients": 2, "batch_size": 5, "epochs": 1, "folder": str(tmp_path / "run")}
    codecs = {"codec": compress.EntropyMask(bits=3.0, signed=True), "grad_codec": BUDGET["grad_codec"]}
    with pytest.raises(ValueError, match=r"cut_bits must leave room for codes, got 2.0: .* of 1500 v"):
        msjax.train((client, server), (x, np.arange(40) % 3), cut_bits=2.0, **codecs, **options)
    result = msjax.train((client, server), (x, np.arange(40) % 3), cut_bits=32.0, **codecs, **options)
    saved = [msjax.load_part(tmp_path / "run" / f"{part}.safetensors").up_bits for part in ("client", "server")]
    assert 8 <= result.up_bits <= 64 and saved == [pytest.approx(result.up_bits, rel=1e-5), None]


@pytest.mark.parametrize("up_bits", [float("nan"), float("inf"), 0.0, -1.0, 65.0])
def test_bits_of_a_file_are_checked(up_bits, tmp_path, monkeypatch):
    """They come from whoever made the file."""
    part, file = models.ModelPart(len, {"w": np.zeros(2, np.float32)}, {}), tmp_path / "part.safetensors"

    def save_unchecked(name, up_bits):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "_may_aim", lambda *_: True)
            msjax.save_part(file, name, part, up_bits=up_bits)

    save_unchecked("client", up_bits)
    with pytest.raises(ValueError, match=r"part\.safetensors must have up_bits above 0, at most 64, and only of a"):
        msjax.load_part(file)
    save_unchecked("server", 1.0)
    with pytest.raises(ValueError, match=r"only of a client trained with cut_bits, got 1"):
        msjax.load_part(file)


def test_an_aim_that_is_none_is_refused(unchecked):
    codec, h = compress.EntropyMask(bits=1.0), jnp.ones(4)
    for bits in (0, -1.0, float("nan"), jnp.float32(0)):
        with pytest.raises(ValueError, match="bits must be a number above 0, got"):
            codec.encode_at_bits(h, bits)
    for bits in (jnp.ones(3), "1"):
        with pytest.raises(TypeError, match="bits must be one number, got"):
            codec.encode_at_bits(h, bits)


def test_the_aim_is_what_features_are_coded_at():
    """An array, so that no other program is compiled; of a codec with an error it is the most that they take."""
    h = jax.nn.relu(jax.random.normal(jax.random.key(0), (50_000,)))
    codec = compress.EntropyMask(bits=1.0)
    traces = []

    @jax.jit
    def encode(h, bits):
        traces.append(bits)
        return codec.encode_at_bits(h, bits)

    for bits in (1.2, 2.0):
        payload = encode(h, bits)
        expected = jax.jit(dataclasses.replace(codec, bits=bits).encode)(h)
        jax.tree.map(np.testing.assert_array_equal, payload, expected)
        assert 8 * len(wire.encode(payload, codec, h)) / h.size == pytest.approx(bits, rel=0.06)
    assert len(traces) == 1
    plain = {bits: jax.jit(compress.EntropyMask(bits=bits).encode)(h) for bits in (1.0,)}
    for error, other in ((1e-3, plain[1.0]), (0.5, jax.jit(compress.EntropyMask(error=0.5, levels=15).encode)(h))):
        both = jax.jit(compress.EntropyMask(error=error, bits=1.0, levels=15).encode)(h)
        np.testing.assert_array_equal(both.codes, other.codes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cut_bits": 0.0}, "cut_bits must be a number above 0, at most 32, or None, got 0.0"),
        ({"cut_bits": 33.0}, "cut_bits must be a number above 0, at most 32, or None, got 33.0"),
        ({"codec": compress.TopK()}, "codec must be an EntropyMask where cut_bits is given, got TopK"),
        (
            {"array_codecs": (("a", "EntropyMask()"),), "codec": compress.Identity()},
            r"codec must be an EntropyMask where cut_bits is given, also of arrays that have no name \(the name ''\)",
        ),
        (
            {"grad_codec": compress.Identity()},
            "grad_codec must be an EntropyMask where cut_bits is given, got Identity",
        ),
        (
            {"grad_codec": compress.EntropyMask(bits=1.0, signed=True)},
            "grad_codec must have an error and no bits where cut_bits is given, got EntropyMask",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        built(dataclasses.replace(CFG, **changes), 30)


def test_levels_of_gradients_are_those_of_both_targets():
    """Where they are the codec's own: 63 of the error alone would take a byte a code, and much more than the budget."""
    noise = {"error": 0.01, "signed": True, "rounding": "stochastic"}
    cfg = dataclasses.replace(CFG, cut_bits=1.0, grad_codec=compress.EntropyMask(**noise))
    assert built(cfg, 30).spec.grad_codec.default == compress.EntropyMask(bits=0.5, **noise)
    assert cfg.grad_codec.levels == 63 and built(cfg, 30).spec.grad_codec.default.levels == 15
    cfg = dataclasses.replace(cfg, grad_codec=compress.EntropyMask(levels=7, **noise))
    assert built(cfg, 30).spec.grad_codec.default.levels == 7


def test_a_run_without_it_is_described_as_before():
    assert built(CFG, 30).spec.describe().keys() - built(SMALL, 30).spec.describe().keys() == {"cut_bits"}


def _with_integers(count):
    """Parts whose features are 16 values and so many integers of a sample, the second of no use to the server."""

    def first(params, stats, x, train, key):
        return {"h": x @ params["w"], "ids": jnp.zeros((x.shape[0], count), jnp.int32)}, stats

    def last(params, stats, h, train, key):
        return h["h"] @ params["w"] + h["ids"].sum(), stats

    return models.ModelPart(first, {"w": jnp.ones((4, 16))}, {}), models.ModelPart(last, {"w": jnp.ones((16, 2))}, {})


@pytest.mark.parametrize("cut_bits", [None, 32.0], ids=["codecs", "budget"])
def test_arrays_that_are_not_floating_are_counted_and_are_not_the_budgets(cut_bits):
    samples = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), np.arange(40, dtype=np.int32) % 2
    codecs = BUDGET | {"codec": compress.EntropyMask(bits=4.0, signed=True), "cut_bits": cut_bits}
    runs = [msjax.train(_with_integers(n), samples, **codecs, clients=2, batch_size=10, epochs=1) for n in (2, 500)]
    up, down = ([run.history[-1]["traffic"][f"coded_{name}_bytes"] for run in runs] for name in ("uplink", "downlink"))
    assert up[1] - up[0] == 2 * 2 * 10 * 498 * 4 and down[0] == down[1]
    assert runs[0].spec.feature_payload(10).float_values == runs[1].spec.feature_payload(10).float_values == 160
