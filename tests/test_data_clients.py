"""Who holds which examples, and in what order."""

import hashlib

import numpy as np
import pytest

from msjax import data


@pytest.mark.parametrize("count, clients", [(100, 10), (103, 10), (7, 7), (5, 1)])
def test_even_partition(count, clients):
    client_indices = data.partition(np.zeros(count, np.int32), clients, seed=3)
    assert [len(p) for p in client_indices] == [count // clients] * clients
    joined = np.concatenate(client_indices)
    assert len(set(joined.tolist())) == len(joined) and joined.min() >= 0 and joined.max() < count
    assert all(p.dtype == np.int32 for p in client_indices)
    np.testing.assert_array_equal(joined, np.concatenate(data.partition(count, clients, seed=3)))
    if count > 7:
        assert (joined != np.concatenate(data.partition(count, clients, seed=4))).any()


def skew(labels, client_indices):
    """Mean total-variation distance between each client's label shares and the whole set's."""
    whole = np.bincount(labels, minlength=10) / len(labels)
    shares = [np.bincount(labels[p], minlength=10) / len(p) for p in client_indices]
    return np.mean([np.abs(s - whole).sum() / 2 for s in shares])


def test_dirichlet_partition():
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    skews = []
    for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0):
        client_indices = data.partition(labels, 20, alpha=alpha, seed=1)
        assert sorted(np.concatenate(client_indices).tolist()) == list(range(5000))
        assert min(map(len, client_indices)) >= 10
        skews.append(skew(labels, client_indices))
        again = data.partition(labels, 20, alpha=alpha, seed=1)
        assert all((a == b).all() for a, b in zip(client_indices, again, strict=True))
    assert skews == sorted(skews, reverse=True) and skews[0] > 0.7 and skews[-1] < 0.1
    assert [len(p) for p in data.partition(labels[:20], 20, alpha=0.05)] == [1] * 20


def digest(client_indices):
    held = np.concatenate([np.r_[len(own), own] for own in client_indices]).astype("<i4")
    return hashlib.sha256(held.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1e-12, "18adcd39af7a3a91"),
        (0.01, "68d3f8a8a5a3ea19"),
        (0.1, "8f4021d808c779f6"),
        (0.5, "36a114f090836caf"),
        (1.0, "aee1a4274b16854f"),
        (10.0, "7d9f8f7b3ec852bf"),
        (1e6, "17d6bd77bd29507f"),
    ],
)
def test_dirichlet_partition_stays_the_same(alpha, expected):
    """If this fails: recorded runs and runs to be resumed have other shares, so the draw must not change."""
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    assert digest(data.partition(labels, 7, alpha=alpha, seed=3)) == expected


@pytest.mark.parametrize("clients", [2, 10, 100])
def test_large_alpha_is_even(clients):
    labels = np.arange(1000) % 5
    for alpha in (1e20, 1e299, 1e305, 1e307, 1.7e308, np.finfo(np.float64).max, 10**300):
        held = data.partition(labels, clients, alpha=alpha)
        assert sorted(np.concatenate(held).tolist()) == list(range(1000))
        counts = np.stack([np.bincount(labels[own], minlength=5) for own in held])
        assert np.abs(counts - 200 / clients).max() <= 1


def test_small_alpha_gives_a_class_to_one_client():
    labels = np.arange(1000) % 200  # many classes, so that no client has to be filled up
    for alpha in (1e-300, 1e-306, 1e-310, 5e-324):
        held = data.partition(labels, 4, alpha=alpha)
        counts = np.stack([np.bincount(labels[own], minlength=200) for own in held])
        assert set(counts.ravel().tolist()) == {0, 5}
        assert min(map(len, held)) / 5 > 30 and max(map(len, held)) / 5 < 70  # any client is as likely as another


def test_partition_errors():
    with pytest.raises(ValueError, match=r"num_clients must be in 1..3 .*got 4"):
        data.partition(np.zeros(3), 4)
    with pytest.raises(ValueError, match="got 0"):
        data.partition(3, 0)
    for alpha in (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 10**400, "much", True):
        with pytest.raises(ValueError, match="alpha must be positive and finite, or None for an even partition, got "):
            data.partition(np.zeros(30), 3, alpha=alpha)
    with pytest.raises(ValueError, match=r"labels must be given for a Dirichlet partition \(alpha\)"):
        data.partition(30, 3, alpha=1.0)
    for labels in (np.zeros((30, 3), np.int32), np.linspace(0, 1, 30)):
        with pytest.raises(ValueError, match=r"labels must be classes, integers of shape \(N,\).*got (int32|float64)"):
            data.partition(labels, 3, alpha=1.0)
        assert [len(held) for held in data.partition(labels, 3)] == [10] * 3  # an even one takes labels of any kind


def test_epoch_indices():
    client_indices = data.partition(100, 4, seed=0)
    order = data.epoch_indices(client_indices, 25, seed=5, epoch=2)
    assert order.shape == (4, 25) and order.dtype == np.int32
    for row, held in zip(order, client_indices, strict=True):
        assert sorted(row) == sorted(held)
    np.testing.assert_array_equal(order, data.epoch_indices(client_indices, 25, seed=5, epoch=2))
    assert (order != data.epoch_indices(client_indices, 25, seed=5, epoch=3)).any()
    assert (order != data.epoch_indices(client_indices, 25, seed=6, epoch=2)).any()
    np.testing.assert_array_equal(
        order[:2], data.epoch_indices(client_indices[:2], 25, seed=5, epoch=2)
    )  # client by client


def test_epoch_indices_of_unequal_amounts():
    client_indices = [np.arange(3), np.arange(10, 30)]
    short, long = data.epoch_indices(client_indices, 8, seed=0, epoch=0)
    assert sorted(short[:3]) == sorted(short[3:6]) == [0, 1, 2] and len(set(short[6:])) == 2
    assert len(set(long)) == 8 and set(long) <= set(range(10, 30))
    with pytest.raises(ValueError, match="client 1 must hold examples, got none"):
        data.epoch_indices([np.arange(3), np.arange(0)], 2, seed=0, epoch=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        data.epoch_indices(client_indices, 0, seed=0, epoch=0)
