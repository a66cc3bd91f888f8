"""Who holds which examples, and in what order each client goes over its own."""

from collections.abc import Sequence

import numpy as np

# Keep the streams of random numbers apart that are drawn from one user seed.
_PARTITION, _EPOCH = 1, 2


def partition(
    labels: np.ndarray | Sequence[int] | int, num_clients: int, *, alpha: float | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Divide a data set among clients: one int32 array of indices each, no index twice.

    `alpha=None`: even (the paper): a seeded shuffle cut into shards of exactly floor(N / K); the N mod K left over are
    not used. `alpha > 0`: label skew: each class is divided by a draw from Dirichlet(alpha, ..., alpha), smaller is
    more skewed (Yurochkin et al. 2019, arXiv:1905.12022; Li et al. 2021, arXiv:2102.02079). Every example is used. A
    client with fewer than min(10, N // K) examples is filled up to that from the clients that hold most, so that no
    draw leaves one empty.

    Args:
        labels: [N] class of each example; for an even partition the number N is enough.
        num_clients: K, 1 <= K <= N.

    Raises:
        ValueError: K or alpha is out of range, or `labels` is a number or not one-dimensional where labels are needed.
    """
    if isinstance(labels, int | np.integer):
        if alpha is not None:
            raise ValueError("a Dirichlet partition needs the label of each example, got only their number")
        n = int(labels)
    else:
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise ValueError(f"labels must be one-dimensional, got shape {labels.shape}")
        n = len(labels)
    if not 1 <= num_clients <= n:
        raise ValueError(f"num_clients must be in 1..{n} (the number of examples), got {num_clients}")
    rng = np.random.default_rng([_PARTITION, seed])
    if alpha is None:
        shard = n // num_clients
        return list(rng.permutation(n)[: shard * num_clients].reshape(num_clients, shard).astype(np.int32))
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, or None for an even partition, got {alpha}")
    pools: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for pool, part in zip(pools, np.split(members, cuts), strict=True):
            pool.extend(part.tolist())
    for pool in pools:
        rng.shuffle(pool)
    smallest = min(10, n // num_clients)
    for pool in pools:
        while len(pool) < smallest:
            pool.append(max(pools, key=len).pop())
    return [np.asarray(pool, np.int32) for pool in pools]


def epoch_indices(pools: Sequence[np.ndarray], num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Each client's order over its pool for one epoch: int32 [K, num_samples].

    A permutation of the pool where it has `num_samples` examples; a random subset of a larger one; of a smaller one, as
    many rounds as are needed, each with a new shuffle. Depends on (seed, epoch, client) alone, so an interrupted run
    finds the same order again.

    Raises:
        ValueError: `num_samples` is not positive, or a pool is empty.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    return np.stack([epoch_order(p, num_samples, seed=seed, epoch=epoch, client=k) for k, p in enumerate(pools)])


def epoch_order(pool: np.ndarray, num_samples: int, *, seed: int, epoch: int, client: int) -> np.ndarray:
    """One client's row of `epoch_indices`, which needs no other client's pool."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(pool) == 0:
        raise ValueError(f"the pool of client {client} is empty")
    rng = np.random.default_rng([_EPOCH, seed, epoch, client])
    rounds = -(-num_samples // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(rounds)])[:num_samples].astype(np.int32)
