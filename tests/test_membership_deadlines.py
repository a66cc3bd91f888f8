"""Who takes part in a run: deadlines, those who are dropped, and how they come back."""

import pytest

from msjax.distributed import actions as do
from msjax.distributed.membership import Stage

from .membership_run import AVERAGE, FEATURES, TAKE, TEST, Run, of

# -- Deadlines. ----------------------------------------------------------------------------------------------------


def test_the_clock_of_an_exchange_runs_from_its_first_message():
    run = Run(stragglers="stop").begin()
    assert run.state.wake_at is None
    run.wait(100.0)
    run.send(0)
    assert run.state.wake_at == 110.0
    assert not of(run.wait(9.9), do.StopRun)
    why = "clients [1, 2] did not answer within 10.0 s, and policy.stragglers is stop"
    assert of(run.wait(0.1), do.StopRun) == [do.StopRun(why)]


def test_the_clock_of_an_exchange_of_one_client_runs_from_its_beginning():
    run = Run("turns", stragglers="stop").begin()
    assert of(run.wait(10.0), do.StopRun)


def test_the_clock_runs_for_those_who_wait_for_a_later_exchange():
    """A test by clients 0 and 1, which are both gone: client 2 has sent its features of the next step."""
    run = Run(stragglers="drop").begin().go_to((1, TEST))
    assert run.state.wake_at is None
    run.send(2, key=(2, FEATURES))
    said = run.wait(10.0)
    assert [(a.exchange.key, a.clients) for a in of(said, do.Advance)] == [((1, TEST), ()), ((2, FEATURES), (2,))]


@pytest.mark.parametrize("kind", ["parallel", "turns"])
def test_the_clock_runs_where_all_that_are_waited_for_are_away(kind):
    """Nobody else may have anything to say; while one of them is there it may be at work for long."""
    run = Run(kind, stragglers="stop").begin()
    if kind == "parallel":
        run.leave(0), run.leave(1)
        assert run.state.wake_at is None
        run.leave(2)
        assert run.state.wake_at == 10.0
        run.reconnect(1)
        assert run.state.wake_at is None
        run.leave(1)
    else:
        run.leave(0)
    assert of(run.wait(10.0), do.StopRun)


def test_what_waited_while_the_server_was_at_work_did_not_come_late():
    """Deadlines are judged when the caller says that time has passed, which it does once it has handed all in."""
    run = Run(stragglers="drop").begin()
    run.send(0)
    run.now += 60.0
    assert run.send(1) == []
    assert of(run.send(2), do.Advance)[0].clients == (0, 1, 2)


def test_wait_says_who_is_late_after_every_deadline():
    run = Run(stragglers="wait").begin()
    run.send(0)
    for _ in range(2):
        assert run.wait(10.0) == [do.CountStragglers(2), do.Warn("step 0 waits for clients [1, 2]")]
    assert of(run.send(1, 2), do.Advance)[0].clients == (0, 1, 2)


def test_stop_tells_everyone():
    run = Run(stragglers="stop").begin()
    run.send(0, 1)
    said = run.wait(10.0)
    assert {a.session for a in of(said, do.TellFailure)} == {1, 2, 3}
    assert said[-1] == do.StopRun("clients [2] did not answer within 10.0 s, and policy.stragglers is stop")
    assert run.stage is Stage.OVER


def test_drop_goes_on_without_the_late():
    run = Run(stragglers="drop").begin()
    run.send(0, 1)
    said = run.wait(10.0)
    assert said[0] == do.CountStragglers(1) and of(said, do.Advance)[0].clients == (0, 1)
    assert run.state.active == (0, 1)
    assert of(run.send(0, 1), do.Advance)[0].clients == (0, 1)


@pytest.mark.parametrize(("min_clients", "dropped"), [(1, True), (2, True), (3, False)])
def test_min_clients_is_how_few_may_be_left_behind_a_deadline(min_clients, dropped):
    """Two of three are left: as many as `min_clients` are enough."""
    run = Run(stragglers="drop", min_clients=min_clients).begin()
    run.send(0, 1)
    assert bool(of(run.wait(10.0), do.Advance)) == dropped
    assert run.state.active == ((0, 1) if dropped else (0, 1, 2))


@pytest.mark.parametrize(("min_clients", "dropped"), [(1, True), (2, True), (3, False)])
def test_min_clients_is_how_few_may_be_left_by_one_that_lost_its_memory(min_clients, dropped):
    run = Run(stragglers="drop", min_clients=min_clients).begin().go_to((1, FEATURES))
    assert bool(of(run.crash(2), do.RestoreCheckpoint)) != dropped
    assert run.state.active == ((0, 1) if dropped else (0, 1, 2))


def test_min_clients_counts_those_whose_turn_it_is_not():
    run = Run(stragglers="drop", min_clients=3).begin().go_to((1, TEST))
    run.send(0)
    run.wait(10.0)
    assert run.state.active == (0, 1, 2)
    run = Run("turns", stragglers="drop", min_clients=2).begin()
    run.wait(10.0)
    assert run.state.active == (1, 2)
    run.wait(10.0)
    assert run.state.active == (1, 2)


def test_exchanges_of_dropped_clients_alone_are_passed_over():
    run = Run("turns", stragglers="drop").begin()
    said = run.wait(10.0)
    assert [(a.exchange.key[1], a.clients) for a in of(said, do.Advance)] == [(TAKE, ()), (FEATURES, ()), (4, ())]
    assert run.state.exchange.key == (1, TAKE)


def compiled_slowly(**policy):
    """A run whose clients took 30 seconds for the first message, all at once; client 2 is new at the second step."""
    run = Run(**{"steps": 8, **policy}).begin()
    run.wait(30.0)
    run.go_to((1, FEATURES))
    run.crash(2)
    return run


@pytest.mark.parametrize("stragglers", ["drop", "stop", "wait"])
def test_a_process_to_which_an_exchange_is_new_has_as_long_as_all_had_at_first(stragglers):
    run = compiled_slowly(stragglers=stragglers, min_clients=3)
    run.send(0, 1)
    assert of(run.wait(10.0), do.CountStragglers, do.Warn, do.StopRun) == []
    assert run.state.wake_at == run.now + 30.0
    assert of(run.wait(30.0), do.CountStragglers) == [do.CountStragglers(1)]


def test_a_process_that_is_gone_has_no_time_to_compile():
    run = compiled_slowly(stragglers="stop")
    run.leave(2)
    run.send(0, 1)
    assert of(run.wait(10.0), do.StopRun)


def test_a_process_that_has_compiled_is_late_as_before():
    run = compiled_slowly(stragglers="drop", min_clients=3)
    run.go_to((2, FEATURES))
    run.send(0, 1)
    run.wait(10.0)
    assert do.Warn("step 2 waits for clients [2], as policy.min_clients is 3") in run.log


# -- Coming back. --------------------------------------------------------------------------------------------------


def dropped(key, *, client=2, kind="parallel", **policy):
    """A run that has gone on without a client at the exchange of `key`."""
    run = Run(kind, stragglers="drop", steps=8, **policy).begin().go_to(key)
    run.send(*[c for c in run.state.exchange.clients if c != client])
    run.wait(10.0)
    assert client not in run.state.active
    return run


def test_a_dropped_client_comes_back_with_the_part_that_another_brings():
    run = dropped((0, FEATURES))
    assert run.send(2, key=(0, FEATURES)) == []  # late, and alive
    assert of(run.send(0, 1), do.Advance)[0].asks_part_of == 0
    said = run.send(1)
    assert not of(said, do.StartClient)
    assert do.StartClient(2, 3, 1, part_from=0) in run.send(0, part=True)
    assert run.state.exchange.key == (1, FEATURES)  # it is waited for
    assert of(run.send(2), do.Advance)[0].clients == (0, 1, 2)


def test_after_a_test_the_part_comes_with_the_features_and_not_before():
    """Who takes part in the test is asked by its answer, who does not by that of the average."""
    run = dropped((1, FEATURES), client=0)
    run.send(0)
    asked = of(run.send(1, 2), do.Advance)[0]
    assert asked.exchange.key == (1, AVERAGE) and asked.asks_part_of == 2
    run = dropped((1, AVERAGE))
    run.send(2)
    asked = of(run.send(0, 1), do.Advance)[0]
    assert asked.exchange.key == (1, TEST) and asked.asks_part_of == 0


def test_a_dropped_client_that_says_nothing_is_not_let_in():
    """Its line is open, but nothing comes: to wait for it once more would take a deadline in every other step."""
    run = dropped((0, FEATURES)).go_to((4, FEATURES))
    assert all(a.asks_part_of is None for a in of(run.log, do.Advance))
    run.leave(2)
    run.reconnect(2)
    run.send(0, 1), run.send(0, 1)
    assert of(run.log, do.Advance)[-1].asks_part_of == 0


def test_the_messages_of_a_dropped_client_do_not_count():
    run = dropped((0, FEATURES))
    run.send(2, key=(0, AVERAGE)), run.send(2, key=(0, FEATURES))
    assert run.state.clients[2].message is None
    assert of(run.send(0, 1), do.Advance)[0].clients == (0, 1)


def test_one_that_lost_its_memory_comes_back_like_a_dropped_one_where_enough_are_left():
    run = Run(stragglers="drop").begin().go_to((1, FEATURES))
    run.send(0, 2)
    said = run.crash(2)
    assert not of(said, do.RestoreCheckpoint, do.StartClient)
    assert of(run.send(1), do.Advance)[0].clients == (0, 1)


def test_a_message_that_the_lost_client_alone_held_up_advances():
    run = Run(stragglers="drop").begin()
    run.send(0, 1, 2)
    run.send(0, 1)
    assert of(run.crash(2), do.Advance)[0].clients == (0, 1)


def test_all_go_back_where_enough_wait_to_be_let_in_and_those_who_could_are_away():
    """All lost power; each that came back was dropped while another might still come, and the last one does not."""
    run = Run(stragglers="drop").begin().go_to((2, FEATURES))
    run.checkpoint = (1, None)
    run.send(0, 1)
    for client in run.everyone:
        run.leave(client)
    for client in (0, 1):
        said = run.come(client, saved_step=1, instance=f"another of {client}")
        assert not of(said, do.StartClient, do.RestoreCheckpoint)
    assert run.state.active == (2,)
    said = run.wait(10.0)
    assert do.Warn("step 2 cannot go on without clients [2], but others could: all go back") in said
    assert [(a.client, a.step) for a in of(said, do.StartClient)] == [(0, 1), (1, 1)]
    assert run.state.exchange.step == 1 and run.state.generation == 8
    run.send(0, 1)
    assert of(run.wait(10.0), do.Advance)[0].clients == (0, 1) and run.state.active == (0, 1)


def test_nobody_goes_back_while_too_few_are_there_or_one_that_is_needed_is():
    run = Run(stragglers="drop", min_clients=2, clients=4).begin().go_to((1, FEATURES))
    run.send(0, 1, 2, 3)
    for client in run.everyone:
        run.leave(client)
    run.come(0, instance="another of 0")
    assert run.state.active == (1, 2, 3)
    assert not of(run.wait(10.0), do.RestoreCheckpoint)
    run.reconnect(1)
    assert run.wait(10.0) == [
        do.CountStragglers(3),
        do.Warn("step 1 waits for clients [1, 2, 3], as policy.min_clients is 2"),
    ]


def test_nobody_goes_back_to_a_checkpoint_that_those_who_wait_do_not_have():
    """The line of the others is cut, and they have lost nothing."""
    run = Run(stragglers="drop").begin()
    run.send(0, 2), run.wait(10.0)
    run.checkpoint = (1, (0, 2))
    run.go_to((2, FEATURES))
    run.come(1, instance="another of 1")
    run.leave(0), run.leave(2)
    for _ in range(2):
        assert do.Warn("step 2 waits for clients [0, 2], as policy.min_clients is 1") in run.wait(10.0)
    run.reconnect(0), run.reconnect(2)
    assert of(run.send(0, 2), do.Advance)[0].exchange.key == (2, FEATURES)


def test_nobody_goes_back_where_those_who_have_the_checkpoint_are_fewer_than_min_clients():
    """Client 1 is here with the latest part, and came in after the checkpoint."""
    run = Run(stragglers="drop", min_clients=2, checkpoint=(0, None)).begin().go_to((2, FEATURES))
    run.checkpoint = (2, (0, 2))
    run.go_to((2, AVERAGE))
    run.send(1)
    run.leave(2), run.crash(0)
    assert not of(run.wait(10.0), do.RestoreCheckpoint) and 1 in run.state.active


def test_the_clock_runs_on_where_the_one_who_waits_loses_its_memory():
    """The other is there and says nothing: there is a warning after every deadline."""
    run = Run(clients=2, stragglers="drop").begin()
    run.send(0)
    run.crash(0)
    for _ in range(2):
        assert do.Warn("step 0 waits for clients [1], as policy.min_clients is 1") in run.wait(10.0)


def test_what_all_were_away_for_is_not_taken_for_lateness():
    """How long the first exchange takes is learned all the same."""
    run = Run(stragglers="drop").begin()
    for client in run.everyone:
        run.leave(client)
    run.wait(10.0)
    for client in run.everyone:
        run.reconnect(client)
    run.now += 30.0
    run.send(*run.everyone)
    assert run.state.first_seconds


def test_nobody_goes_back_to_a_checkpoint_that_only_one_who_is_away_has():
    run = Run(stragglers="drop", checkpoint=(2, (0,))).begin()
    run.leave(0)
    assert run.wait(10.0) == [
        do.CountStragglers(1),
        do.Warn("step 2 waits for clients [0], as policy.min_clients is 1"),
    ]


def test_the_donor_dies_and_another_is_asked():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    assert run.state.donor == 0
    run.crash(0)
    run.go_to((1, TEST))
    assert of(run.send(1), do.Advance)[0].asks_part_of == 1
    said = run.send(1, part=True)
    assert [(a.client, a.part_from) for a in of(said, do.StartClient)] == [(0, 1), (2, 1)]


def test_a_donor_that_dies_during_a_test_is_replaced_at_once():
    run = dropped((1, FEATURES), client=0)
    run.send(0), run.send(1, 2)
    assert run.state.donor == 2 and run.state.exchange.key == (1, TEST)
    run.crash(2)
    assert of(run.send(1), do.Advance)[0].asks_part_of == 1


def test_a_donor_that_brings_nothing_is_asked_anew():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    assert not of(run.send(0, 1), do.StartClient)
    run.go_to((1, TEST))
    assert of(run.send(0, 1), do.Advance)[0].asks_part_of == 0


def test_who_has_gone_again_is_not_let_in_and_not_waited_for():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    run.leave(2)
    assert of(run.send(1), do.StartClient) == []
    assert of(run.send(0, part=True), do.Advance)[0].clients == (0, 1)


def test_one_that_has_joined_but_is_not_ready_is_not_let_in():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    run.join(2, generation=7)
    assert of(run.send(0, part=True), do.StartClient) == []
    assert do.StartClient(2, 4, 1, part_from=0) in run.ready(2)  # the exchange is still open


def test_one_that_is_let_in_has_as_long_as_the_others_had_but_only_once():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    run.wait(9.0)
    run.send(0, part=True)
    assert run.state.wake_at == run.now + 10.0
    run.wait(9.0)
    run.crash(2)
    run.send(2)
    run.crash(2)
    assert run.state.wake_at == run.now + 1.0
    run.send(1)
    assert of(run.wait(1.0), do.Advance)[0].clients == (0, 1)


def test_one_that_was_let_in_and_did_not_hear_of_it_is_let_in_again():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    run.send(0, part=True)
    run.leave(2)
    assert do.StartClient(2, 4, 1, part_from=0) in run.reconnect(2)
    assert do.StartClient(2, 5, 1, part_from=0) in run.crash(2)
    run.send(1, 2)  # now it must know itself where it is
    assert not of(run.crash(2), do.StartClient)


def test_a_late_copy_from_before_it_was_dropped_does_not_count_after_it_is_let_in():
    run = dropped((0, FEATURES))
    run.send(2)
    run.send(0, 1)
    run.send(0, part=True)
    run.send(2, key=(0, FEATURES))
    assert run.state.clients[2].message is None
    run.send(2), run.send(2, key=(0, FEATURES))
    assert run.state.clients[2].message == (1, FEATURES)


def test_what_was_answered_before_a_client_was_dropped_is_not_answered_after_it_is_let_in():
    run = dropped((1, FEATURES))
    run.send(2)
    run.go_to((2, FEATURES))
    run.send(run.state.donor, part=True)
    assert run.state.clients[2].active
    assert run.send(2, key=(0, AVERAGE)) == []


def test_in_turns_a_dropped_client_comes_back_when_its_own_begins():
    run = dropped((0, FEATURES), client=0, kind="turns")
    run.send(0, key=(0, FEATURES))
    said = []
    while run.state.exchange.key != (3, TAKE):
        said += run.send(*run.state.exchange.clients)
    assert of(said, do.StartClient) == [do.StartClient(0, 1, 3)]
    assert of(run.send(0), do.Advance)[0].clients == (0,)


def test_a_client_that_was_let_in_after_the_checkpoint_is_let_in_again_after_going_back():
    """It has no checkpoint of that step."""
    run = dropped((0, FEATURES), min_clients=3, clients=4)
    run.checkpoint = (1, (0, 1, 3))
    run.send(2)
    run.send(0, 1, 3)
    run.send(0, part=True), run.send(1, 2, 3)
    assert run.state.active == (0, 1, 2, 3)
    run.crash(1)  # four are more than enough
    said = run.crash(3, saved_step=1)
    assert [(a.client, a.step) for a in of(said, do.StartClient)] == [(0, 1), (1, 1), (3, 1)]
    run.send(0, 1, 3)
    assert of(run.send(0, 1, 3), do.Advance)[0].asks_part_of == 3
