"""Who holds which examples, and in what order each client goes over its own."""

import math
from collections.abc import Sequence

import numpy as np

# Keep the streams of random numbers apart that are drawn from one user seed.
_PARTITION, _EPOCH = 1, 2
_LEAST_ALPHA, _MOST_ALPHA = 1e-300, 1e300


def _check_alpha(alpha):
    try:
        is_valid = not isinstance(alpha, str | bool) and 0 < float(alpha) < math.inf
    except (TypeError, ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"alpha must be positive and finite, or None for an even partition, got {alpha!r}")


def partition(
    labels: np.ndarray | Sequence[int] | int, num_clients: int, *, alpha: float | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Divide a data set among clients: one int32 array of indices each, no index twice.

    `alpha=None`: even (the paper): a seeded shuffle cut into shards of exactly floor(N / K); the N mod K left over are
    not used. `alpha > 0`: label skew: each class is divided by a draw from Dirichlet(alpha, ..., alpha), smaller is
    more skewed (Yurochkin et al. 2019, arXiv:1905.12022; Li et al. 2021, arXiv:2102.02079), and a large one is even in
    every class. Every example is used.

    The least share is min(10, N // K) examples. A small alpha gives many clients nothing at all, and a client that
    holds nothing cannot take part, so one with fewer is filled up from the clients that hold most. Where those papers'
    programs draw again until each client has 10, this ends for every alpha, and for K close to N.

    Args:
        labels: class of each example [N]; for an even partition labels [N, ...] of any kind, or their number N.
        num_clients: K, 1 <= K <= N.
        alpha: None, or Dirichlet's parameter, any positive float.
        seed: chooses who holds what.

    Raises:
        ValueError: K or alpha is out of range, or `alpha` is given and `labels` are no classes.
    """
    if isinstance(labels, int | np.integer):
        n = int(labels)
    else:
        labels = np.asarray(labels)
        n = len(labels)
    if not 1 <= num_clients <= n:
        raise ValueError(f"num_clients must be in 1..{n} (the number of examples), got {num_clients}")
    rng = np.random.default_rng([_PARTITION, seed])
    if alpha is None:
        shard = n // num_clients
        return list(rng.permutation(n)[: shard * num_clients].reshape(num_clients, shard).astype(np.int32))
    _check_alpha(alpha)
    if isinstance(labels, int | np.integer):
        raise ValueError("labels must be given for a Dirichlet partition (alpha), got only their number")
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"labels must be classes, integers of shape (N,), for a Dirichlet partition (alpha), got {labels.dtype} "
            f"{labels.shape}: alpha=None divides examples with any labels, and division= of msjax.train as you say"
        )
    # Beyond these the draw overflows (its sum is infinite, and all shares are 0) or underflows, and is as here anyway.
    alpha = min(max(float(alpha), _LEAST_ALPHA), _MOST_ALPHA / num_clients)
    held: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for own, part in zip(held, np.split(members, cuts), strict=True):
            own.extend(part.tolist())
    for own in held:
        rng.shuffle(own)
    smallest = min(10, n // num_clients)
    for own in held:
        while len(own) < smallest:
            own.append(max(held, key=len).pop())
    return [np.asarray(own, np.int32) for own in held]


def epoch_indices(client_indices: Sequence[np.ndarray], num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Each client's order over its examples for one epoch: int32 [K, num_samples].

    A permutation of a client's examples where it holds `num_samples`; a random subset of more; of fewer, as many rounds
    as are needed, each with a new shuffle. Depends on (seed, epoch, client) alone, so an interrupted run finds the same
    order again.

    Args:
        client_indices: which examples each client holds, as `partition` gives them.
        num_samples: how many each client draws.
        seed, epoch: choose the order.

    Raises:
        ValueError: `num_samples` is not positive, or a client holds nothing.
    """
    rows = (
        epoch_order(indices, num_samples, seed=seed, epoch=epoch, client=k) for k, indices in enumerate(client_indices)
    )
    return np.stack(list(rows))


def epoch_order(indices: np.ndarray, num_samples: int, *, seed: int, epoch: int, client: int) -> np.ndarray:
    """One client's row of `epoch_indices`, which needs no other client's indices."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if len(indices) == 0:
        raise ValueError(f"client {client} must hold examples, got none")
    rng = np.random.default_rng([_EPOCH, seed, epoch, client])
    rounds = -(-num_samples // len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(rounds)])[:num_samples].astype(np.int32)
