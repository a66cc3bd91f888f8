"""Training that diverges is found at once, and said of whom."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from msjax.split.trees import is_float, named_leaves

ADVICE = (
    "try a smaller learning rate or a longer warm-up, a codec with a smaller error, inputs of one order of magnitude "
    "or, where they are tokens, such as the model has, and labels that are classes or, where numbers are predicted, "
    "about as large as 1; allow_nonfinite goes on all the same"
)


class NonFiniteError(FloatingPointError):
    """A loss or a parameter is NaN or infinite: what comes after it is worth nothing."""


def check_losses(losses: np.ndarray, clients: Sequence[int], first_step: int) -> None:
    """Raises NonFiniteError where a loss is not finite.

    Args:
      losses: (S, K), each client's mean loss in each step.
      clients: their numbers.
      first_step: of the S steps, from 0.
    """
    losses = np.asarray(losses)
    if np.isfinite(losses).all():
        return
    at = int(np.flatnonzero(~np.isfinite(losses).all(1))[0])
    wrong = np.flatnonzero(~np.isfinite(losses[at]))
    whose = "all clients" if len(wrong) == len(clients) > 1 else f"client {', '.join(str(clients[i]) for i in wrong)}"
    raise NonFiniteError(
        f"the loss of {whose} must be finite, got {losses[at, wrong[0]]} in step {first_step + at} (counted from 0); "
        f"{ADVICE}"
    )


def check_test_loss(loss: float, epoch: int) -> None:
    """Raises NonFiniteError where the test loss after an epoch, counted from 1, is not finite."""
    if not np.isfinite(loss):
        raise NonFiniteError(f"the test loss must be finite, got {loss} after epoch {epoch}; {ADVICE}")


def check_part(part: str, tree: Any, step: int) -> None:
    """Raises NonFiniteError where an array of a trained part is not finite after so many steps."""
    for name, leaf in named_leaves(tree):
        if is_float(leaf) and not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise NonFiniteError(
                f"{name} of the {part} part must be finite, got NaN or Inf after step {step}; {ADVICE}"
            )
