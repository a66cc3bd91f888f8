"""The benchmarks run, compare what they say they compare, and record it."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import checkpoints, programs, timing
from msjax import compress


def test_every_round_calls_all_and_the_median_is_each_contenders_own(monkeypatch):
    calls, now = [], [0.0]
    durations = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 10.0, 10.0, 30.0])}  # the first is the warm-up

    def contender(name):
        calls.append(name)
        now[0] += next(durations[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    contenders = {name: lambda name=name: contender(name) for name in "ab"}
    assert timing.interleaved(contenders, repeats=3, warmup=1) == {"a": 2.0, "b": 10.0}
    assert all(sorted(calls[i : i + 2]) == ["a", "b"] for i in range(0, 8, 2))


def test_record_says_what_it_depends_on(tmp_path):
    options = argparse.Namespace(repeats=2, out=tmp_path / "sub" / "x")
    timing.save(options.out, timing.record(options, [{"copy_seconds": 1.5}], wall_seconds=3.21))
    record = json.loads((tmp_path / "sub" / "x.json").read_text())
    assert record["rows"] == [{"copy_seconds": 1.5}] and record["wall_seconds"] == 3.2
    assert record["environment"]["packages"]["jax"] and record["environment"]["cpu_cores"]


def test_a_record_that_goes_on_says_which_calls_made_it(tmp_path):
    """A later call, with options of its own, does not take the place of the first."""
    out = tmp_path / "x"
    for call in range(3):
        made = timing.Continued(out)
        assert made.rows == [{"row": n} for n in range(2 * call)]
        for _ in range(2):  # it may be stopped behind each row
            made.rows.append({"row": len(made.rows)})
            made.save(argparse.Namespace(out=out, ends=call > 0), command=f"call {call}")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["command"] == "call 0" and record["options"] == {"ends": False} and len(record["rows"]) == 6
    further = record["further"]
    assert [(one["command"], one["options"]["ends"], "rows" in one) for one in further] == [
        ("call 1", True, False),
        ("call 2", True, False),
    ]


def test_codecs():
    pytest.importorskip("torch", reason="needs the extra `bench`")
    from benchmarks import codecs

    rows = codecs.measure(1 / 32, "float32", repeats=1)
    assert [row["codec"] for row in rows] == [str(codec) for codec in benchmarks.CODECS]
    assert all(row[f"{op}_seconds"] > 0 for row in rows for op in benchmarks.OPERATIONS)
    assert [row["numpy_encode_seconds"] is not None for row in rows] == [*map(codecs.has_numpy, benchmarks.CODECS)]
    assert len(codecs.table(rows).splitlines()) == 2 + len(rows)
    codecs.plot(rows)


def test_other_codes_in_pytorch_stop_the_benchmark():
    torch = pytest.importorskip("torch", reason="needs the extra `bench`")
    from benchmarks import codecs

    h = jnp.arange(400, dtype=jnp.float32)
    codecs.check_same_codes(h, torch.arange(400.0))
    with pytest.raises(RuntimeError, match="differ"):
        codecs.check_same_codes(h, torch.arange(400.0) + (torch.arange(400) == 100) * 100)


def test_steps():
    torch = pytest.importorskip("torch", reason="needs the extra `bench`")
    from benchmarks import steps

    options = argparse.Namespace(batch=4, clients=2, repeats=1, codecs=["identity", "ms", "everything"])
    rows = [steps.with_codec("resnet18", 10, 32, "deep", 1 / 16, options), steps.beside_torch(1 / 16, options)]
    assert len(steps.table(rows).splitlines()) == 2 + 3
    assert torch.get_num_threads() > 0 and all(row["identity_seconds"] > 0 for row in rows)


def test_wire():
    pytest.importorskip("zstandard", reason="needs the extra `bench`")
    from benchmarks import wire

    h = np.maximum(np.random.default_rng(0).normal(size=20_000), 0).astype(np.float32)
    rows = wire.measure("s", h, wire.CODECS[0], 1)
    assert [row["coder"] for row in rows] == list(wire.CODERS) and all(row["coded_bytes"] > 0 for row in rows)
    ways = [wire.whole_way("s", h, codec, 1) for codec in wire.WHOLE]
    assert all(0 < row["message_bytes"] < h.nbytes and row["receive_seconds"] > 0 for row in ways)
    assert wire.table(rows).count("\n") == 2 and wire.whole_table(ways).count("\n") == 1 + len(wire.WHOLE)


def test_instructions_of_a_program():
    """Those of a loop's condition and body are counted apart, what does nothing by itself not at all."""
    program = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} add(%p, %p)
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %v = f32[8]{0} get-tuple-element(%state), index=1
  %w = f32[8]{0} fusion(%v), kind=kLoop, calls=%fused
  %s = (f32[8]{0}, s32[8]{0}) sort(%w), dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %w)
}

%cond.1 (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%state), kind=kLoop, calls=%other
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %c = s32[] copy(%zero)
  %y = (f32[8]{0}, s32[]) fusion(%x), kind=kInput, calls=%fused
  %loop = (s32[], f32[8]{0}) while(%start), condition=%cond.1, body=%body.1
  ROOT %z = f32[8]{0} bitcast(%y)
}
"""
    assert programs.instructions(program) == (2, 3)


def test_programs():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    row = programs.compiled_for(here, compress.Uniform(), 1 / 32, "float32")
    assert all(row[f"{op}_instructions"] > 0 and row[f"{op}_extra_bytes"] >= 0 for op in benchmarks.OPERATIONS)
    assert len(programs.table([row]).splitlines()) == 3


@pytest.mark.slow
def test_checkpoints():
    options = argparse.Namespace(repeats=1, clients=2, batch=4)
    row = checkpoints.measure("small", options)
    assert row["share_of_a_step"] == pytest.approx(row["save_seconds"] / row["step_seconds"])
    assert min(row["save_seconds"], row["in_one_go_seconds"]) > 0 and row["state_bytes"] > 10**6
    assert len(checkpoints.table([row]).splitlines()) == 3
