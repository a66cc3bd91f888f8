"""What of a client's request the server refuses; and random numbers, codecs and checkpoints by place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import compress
from msjax.distributed import messages
from msjax.distributed.rpc import split_pb2 as pb
from msjax.split.metrics import MetricSums
from msjax.split.modes import Parallel, Sequential, SplitFed
from msjax.split.parties import Message
from msjax.split.payloads import Codecs, PayloadSpec, leaf_key
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.state import tail_key
from msjax.split.trees import TreeSpec

from .setups import MODES, SMALL, built

PLAIN = dataclasses.replace(SMALL, codec=compress.Identity())


def first(spec, phase):
    return next(exchange for exchange in spec.schedule.exchanges() if exchange.phase == phase)


def request(spec, exchange):
    """A sound one, of zeros."""
    payload, labels, metrics = None, None, None
    if (up := spec.up(exchange)) is not None:
        payload = tuple(compress.DensePayload(np.zeros(like.shape, like.dtype)) for like in up.likes)
    if exchange.phase == Phase.FEATURES and spec.sends_labels:
        labels = np.arange(spec.schedule.batch_size_of(exchange), dtype=np.int32)
    if exchange.phase == Phase.RESULT:
        sums = {name: np.full(like.shape, 3, like.dtype) for name, like in spec.metric_sums_like.items()}
        metrics = MetricSums(1.5, 10, sums)
    return messages.to_request(Message(payload, labels, metrics), exchange, spec, generation=1).request


@pytest.mark.parametrize(
    ("mode", "phase", "change", "says"),
    [
        (0, Phase.FEATURES, lambda r: r.labels.pop(), "labels must have 1 arrays, got 0"),
        (0, Phase.FEATURES, lambda r: r.labels.append(b""), "labels must have 1 arrays, got 2"),
        (0, Phase.FEATURES, lambda r: r.labels.__setitem__(0, bytes(39)), "labels must be 40 bytes, got 39"),
        (0, Phase.AVERAGE, lambda r: r.labels.append(bytes(40)), "labels in an exchange that has none"),
        (1, Phase.RESULT, lambda r: r.labels.append(bytes(40)), "labels in an exchange that has none"),
        (
            1,
            Phase.RESULT,
            lambda r: r.payload.append(b""),
            "arrays in the payload of this exchange must be none, got 1",
        ),
        (1, Phase.RESULT, lambda r: r.metrics.values.append(0.0), "metrics must have 4 values, got 5"),
        (1, Phase.RESULT, lambda r: r.ClearField("metrics"), "metrics must have 4 values, got 0"),
    ],
)
def test_a_request_must_be_what_its_exchange_calls_for(mode, phase, change, says):
    spec = built(dataclasses.replace(PLAIN, mode=MODES[mode]), 30).spec
    exchange = first(spec, phase)
    sound = request(spec, exchange)
    found = messages.from_request(sound, spec, exchange)
    if phase == Phase.FEATURES:
        np.testing.assert_array_equal(found.labels, np.arange(10))
    if phase == Phase.RESULT:
        assert (found.metrics.loss, found.metrics.samples) == (1.5, 10)
        assert all((value == 3).all() for value in found.metrics.sums.values())
    change(sound)
    with pytest.raises(messages.ProtocolError, match=says):
        messages.from_request(sound, spec, exchange)


def test_an_exchange_is_of_those_who_take_part_in_it():
    schedule = Schedule(Sequential(), 2, 4, 0, 2, 1)
    turn = Exchange(0, Phase.FEATURES, (0,))
    assert messages.from_position(schedule, messages.to_position(turn), 0) == turn
    for client, position in ((1, messages.to_position(turn)), (0, pb.Position(step=4, phase=Phase.FEATURES))):
        with pytest.raises(messages.ProtocolError, match=f"no exchange .* of client {client}"):
            messages.from_position(schedule, position, client)


# -- Payloads. -----------------------------------------------------------------------------------------------------


def test_what_draws_random_numbers_in_a_step_draws_its_own():
    """Arrays of the same message, the same array at the other cut, and its gradient."""
    key = jax.random.key(0)
    drawn = [leaf_key(key, place) for place in range(4)]
    drawn += [leaf_key(tail_key(key), place) for place in range(4)]
    drawn += list(map(compress.downlink_key, drawn))
    assert len({tuple(jax.random.key_data(key).tolist()) for key in drawn}) == len(drawn)
    tree = {"a": jnp.ones((1, 64)), "b": jnp.ones((1, 64))}
    spec = TreeSpec.of_batch(tree, 1, "features")
    codecs = Codecs(compress.RandK(0.5))
    up, down = PayloadSpec.of_features(spec, codecs, 1), PayloadSpec.of_gradients(spec, codecs, 1)
    sent = [up.decode(up.encode(tree, key)), down.decode(down.encode(list(tree.values()), key))]
    kept = {tuple(np.flatnonzero(leaf)) for leaf in jax.tree.leaves(sent)}
    assert len(kept) == 4 and {len(positions) for positions in kept} == {32}


def test_codecs_by_name_are_those_of_inference_too():
    codecs = Codecs.of({"": compress.RandTopK(), "skip": compress.RandTopK(ratio=0.5)})
    tested = codecs.at_inference()
    assert [type(codec) for codec in tested.all] == [compress.TopK, compress.TopK]
    assert dict(tested.named)["skip"].ratio == 0.5


# -- When there is a test, and a checkpoint. -----------------------------------------------------------------------


def steps(schedule, every):
    return [step for step in range(schedule.total_steps + 1) if schedule.may_checkpoint(step, every)]


def test_checkpoints_are_where_the_mode_allows():
    """The beginning needs none, and the end has one."""
    for mode in (Parallel(), SplitFed()):
        assert steps(Schedule(mode, 2, 6, 0, 2, 3), 4) == [4, 8, 9]
    assert steps(Schedule(Sequential(turn_steps=2), 2, 6, 0, 2, 1), 1) == [2, 4, 5, 6]
    # Of the beginnings of turns or rounds the first in each so many steps.
    assert steps(Schedule(Sequential(turn_steps=1), 2, 12, 0, 2, 2), 5) == [5, 10, 15, 20, 24]
    assert steps(Schedule(Sequential(), 2, 12, 0, 2, 2), 7) == [12, 18, 24]
    assert steps(Schedule(SplitFed(100, 0.5), 4, 12, 0, 2, 6), 10) == [12, 24, 30, 36]
    assert steps(Schedule(Sequential(), 1, 6, 0, 2, 3), 4) == [4, 8, 9]


def test_the_last_epoch_has_a_test_whatever_came_before():
    tested = lambda **options: [Schedule(Parallel(), 2, 6, **options).tests_after(epoch) for epoch in range(5)]  # noqa: E731
    numbers = {"batch_size": 2, "epochs": 5}
    assert tested(test_samples=4, test_every=2, **numbers) == [False, True, False, True, True]
    assert not any(tested(test_samples=0, **numbers))


def test_splitfed_averages_at_the_end_of_an_epoch_in_any_case():
    schedule = Schedule(SplitFed(average_steps=2), 2, 6, 0, 2, 2)
    averages = [exchange.step for exchange in schedule.exchanges() if exchange.phase == Phase.AVERAGE]
    assert averages == [1, 2, 4, 5]
    for mode in (SplitFed(), Parallel()):
        alone = Schedule(mode, 1, 6, 0, 2, 2)
        assert {exchange.phase for exchange in alone.exchanges()} == {Phase.FEATURES}
