"""All that can happen to two or three clients, in any order, until so many faults have come to pass."""

import pytest

from msjax.distributed.transitions import _Transition

from .membership_states import Model, explore


@pytest.mark.parametrize(
    ("kind", "clients", "steps", "limits"),
    [
        ("parallel", 2, 1, {"faults": 2}),
        ("parallel", 2, 2, {"faults": 1, "kills": 1, "ticks": 1}),
        ("parallel", 2, 2, {"faults": 1, "kills": 1, "ticks": 1, "stragglers": "drop", "start_clients": 1}),
        ("turns", 2, 2, {"faults": 1, "kills": 1, "ticks": 1}),
        ("turns", 2, 2, {"faults": 1, "kills": 1, "ticks": 1, "stragglers": "drop", "start_clients": 1}),
        ("rounds", 3, 1, {"faults": 1, "ticks": 1, "stragglers": "drop"}),
    ],
)
def test_whatever_goes_wrong_the_run_ends_with_its_own_weights(kind, clients, steps, limits):
    assert explore(Model(kind, clients, steps, **limits)) > 50


def test_the_model_finds_a_fault(monkeypatch):
    """As if whoever comes back at the end knew where the run is."""
    monkeypatch.setattr(_Transition, "_knows_where_it_is", lambda self, client: True)
    with pytest.raises(AssertionError, match="after: all are ready; "):
        explore(Model("parallel", 2, 1, faults=2))
