"""The server's part on many devices: the same numbers as on one, and less of it on each."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shards as benchmark
from experiments import language_sizes
from msjax import compress, config, models
from msjax.runs import RunFolder
from msjax.split import parties, shards
from msjax.training import loop, program, saved
from msjax.training.devices import share_of_process

from . import decoders
from .helpers import assert_close, assert_same, assert_same_change
from .setups import MODES, SMOOTH, UNEVEN, even, load_program, make_parties
from .test_budget import BUDGET

SP = compress.TopK(ratio=0.8)


@pytest.fixture
def four_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", functools.partial(lambda of, *args: of(*args)[:4], jax.devices))


def test_arrays_are_cut_along_their_largest_axis_that_the_devices_divide():
    assert shards.shard_axis((256, 2048), 8) == 1
    assert shards.shard_axis((2048, 256), 8) == 0
    assert shards.shard_axis((1000, 4001), 8) == 0
    assert shards.shard_axis((1001, 4001), 8) is None
    assert shards.shard_axis((1023,), 1) is None and shards.shard_axis((1024,), 8) == 0


@pytest.mark.parametrize(
    ("shape", "share"), [((8, 6), (1, 6)), ((4, 4), (1, 2)), ((1, 16), (1, 2)), ((3, 6), (3, 3)), ((12,), (3,))]
)
def test_batches_are_spread_over_clients_then_samples(shape, share):
    """As far as eight devices divide them."""
    assert shards.batch_sharding(shards.mesh_of(), shape).shard_shape((*shape, 5)) == (*share, 5)


def test_one_process_reads_the_samples_of_all_clients():
    """Also where these are fewer than the devices that its server's part is sharded over, or do not divide them."""
    assert [share_of_process(clients, shards.mesh_of()) for clients in (1, 8, 10)] == [
        slice(0, 1),
        slice(0, 8),
        slice(0, 10),
    ]


CASES = {
    "parallel": {},
    "three clients": {"clients": 3},
    "in groups": {"clients": 8, "clients_per_group": 1},
    "averages compressed": {"update_codec": SP},
    "budget": BUDGET,
    "U-shaped": {"mode": MODES[1]},
    "SplitFed": {"mode": MODES[2]},
    "SplitFed, averages compressed, in groups": {
        "clients": 8,
        "clients_per_group": 1,
        "mode": MODES[2],
        "update_codec": SP,
    },
    "sequential": {"mode": MODES[3]},
}


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    "case", [case if case == "parallel" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_gives_the_numbers_of_one_device(case, monkeypatch):
    """Up to the order of sums: every array to 1e-5 of its norm; see `tolerance` of `setups` for codecs with edges."""
    cfg = dataclasses.replace(SMOOTH, **CASES[case])
    counts = UNEVEN if case == "parallel" else even(cfg.clients)
    run = load_program(cfg, monkeypatch, spread=False, counts=counts)
    states = run.state, jax.tree.map(jnp.array, run.state)  # a run gives its state away
    before = jax.tree.map(np.asarray, run.state.server.params)
    one, many = (
        loop.train(run._replace(state=state, shard_server=shard), quiet=True)
        for state, shard in zip(states, (False, True), strict=True)
    )
    tolerance = 0.1 if case == "budget" else 1e-3 if "compressed" in case else 1e-5
    assert_close(many.state, one.state, tolerance)
    assert_same_change(many.state.server.params, one.state.server.params, before, max(tolerance, 1e-3))
    for mine, other in zip(many.history, one.history, strict=True):
        assert mine["test"] == pytest.approx(other["test"], rel=tolerance)
        assert mine["train"] == pytest.approx(other["train"], rel=tolerance)


APART = ["parallel", *(pytest.param(case, marks=pytest.mark.slow) for case in ("U-shaped", "budget"))]


@pytest.mark.parametrize("case", APART)
def test_a_server_apart_gives_the_numbers_of_one_device(case):
    """As `msjax serve` has it; three clients are not spread over the four devices, but their samples are."""
    cfg = dataclasses.replace(SMOOTH, clients=3, epochs=1, **CASES[case])
    counts = UNEVEN if case == "parallel" else even(cfg.clients)
    (one, of_one), (server, of_many) = (make_parties(cfg, counts) for _ in range(2))
    many = parties.Server(server.spec, server.state, cfg.seed, mesh=shards.mesh_of(jax.devices()[:4]))
    for party, clients in ((one, of_one), (many, of_many)):
        for _ in parties.run(party, clients):
            pass
    tolerance = 0.1 if case == "budget" else 1e-5
    assert_close(many.state, one.state, tolerance)
    assert_close(many.test, one.test, tolerance)
    assert is_sharded(many.state.params) and not is_sharded(one.state.params)


def is_sharded(tree):
    """Whether each large array is in four parts, one on each of four devices."""
    large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= shards.LEAST_VALUES]
    return bool(large) and all(4 * leaf.addressable_shards[0].data.size == leaf.size for leaf in large)


@pytest.mark.usefixtures("four_devices")
def test_checkpoints_are_read_with_another_number_of_devices(monkeypatch, tmp_path):
    """Sharded over four, over two, and not at all: the same bits."""
    run = load_program(dataclasses.replace(SMOOTH, epochs=1), monkeypatch, spread=False)
    folder = RunFolder.create(config.Config(out=str(tmp_path)), "run")
    trained = loop.train(run._replace(shard_server=True), folder, quiet=True).state
    for devices in (4, 2, 1):
        mesh = shards.mesh_of(jax.devices()[:devices])
        again = run._replace(state=jax.tree.map(jnp.zeros_like, trained))
        first = program.place(run.spec, again.state, mesh, shard_server=mesh is not None)
        state = saved.restore(folder, again, first, mesh)[0]
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.server.params)} == {devices}
        assert_same(jax.device_get(state.server), trained.server)
    folder.close()


@pytest.mark.slow
def test_what_a_device_holds_of_a_large_part_falls_with_the_devices():
    """Qwen3-1.7B behind its first block, with AdamW, by shapes: an eighth on each of eight devices."""
    cfg = language_sizes.config_of("Qwen3-1.7B", 1, adapters=False)
    cfg = dataclasses.replace(cfg, optim=config.OptimConfig(kind="adamw"))
    server = language_sizes.described_run(cfg).parts["server"]
    whole = benchmark.held(None, server)
    assert whole > 12 * 1.6e9
    for devices in (2, 4, 8):
        held = benchmark.held(shards.mesh_of(jax.devices()[:devices]), server)
        assert held == pytest.approx(whole / devices, rel=1e-3)


@pytest.mark.slow
def test_a_servers_program_needs_less_on_each_of_more_devices():
    """What the compiler allots for a decoder's step: arguments, results and all between."""
    text = json.dumps(models.DecoderConfig.from_json(WIDE).to_json())
    options = {"model": config.ModelConfig(name="decoder", cut="1", decoder=text), "clients": 1, "batch_size": 4}
    cfg = config.Config(task=config.TaskConfig(name="next_token"), data=config.DataConfig(text_length=16), **options)
    run = language_sizes.described_run(cfg)
    spec, server = run.spec, run.parts["server"]
    needed = {}
    for devices in (1, 4):
        found = benchmark.compiled(spec, server, shards.mesh_of(jax.devices()[:devices]), 4).memory_analysis()
        needed[devices] = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    assert needed[4] < 0.5 * needed[1]


WIDE = decoders.CONFIGS["llama 3"] | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
