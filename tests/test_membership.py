"""Membership by examples: each corner that a fault, or a deployer, has found."""

import dataclasses

import pytest

from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed.events import ExchangeInfo
from msjax.distributed.membership import Membership, Policy, Stage, Tally

from .membership_run import AVERAGE, FEATURES, TAKE, Run, of

# -- The beginning. ------------------------------------------------------------------------------------------------


def test_training_begins_when_all_clients_are_ready():
    run = Run(works=False)
    assert of(run.join(0), do.WelcomeClient) == [do.WelcomeClient(0, 1)]
    assert do.Inform("client 0 is ready; training waits for clients [1, 2]") in run.ready(0)
    run.come(1), run.join(2)
    assert run.stage is Stage.GATHERING
    assert run.ready(2) == [do.RestoreCheckpoint(again=False)]
    assert of(run.work(), do.StartClient) == [do.StartClient(c, c + 1, 0, afresh=True) for c in range(3)]
    assert run.stage is Stage.COLLECTING and run.state.generation == 7


def test_a_client_that_leaves_before_the_start_is_waited_for():
    run = Run()
    run.come(0), run.come(1), run.leave(1), run.come(2)
    assert run.stage is Stage.GATHERING
    run.come(1)
    assert run.stage is Stage.COLLECTING


def test_who_is_not_ready_is_said_after_every_deadline():
    run = Run()
    run.come(1)
    for _ in range(2):
        assert not of(run.wait(9.0), do.Warn)
        (said,) = of(run.wait(1.0), do.Warn)
        assert said.text == "training waits for clients [0, 2] to be ready: start those that do not run"
    assert run.stage is Stage.GATHERING


@pytest.mark.parametrize("begun", [False, True])
def test_a_session_that_is_never_ready_is_closed_after_the_deadline_and_its_place_is_free(begun):
    """One that loads its data for long finds that out, connects again, and is ready at once."""
    run = Run()
    if begun:
        run.begin().leave(0)
    run.join(0, instance="hangs")
    name = run.session(0).name
    assert run.state.wake_at == 10.0
    assert do.CloseSession(name) in run.wait(10.0)
    assert run.session(0) is None
    assert of(run.join(0, instance="another"), do.WelcomeClient)


def test_a_client_that_has_not_heard_of_the_start_is_told_again_and_nobody_goes_back():
    run = Run().begin()
    run.leave(0)
    assert of(run.come(0), do.StartClient, do.RestoreCheckpoint) == [do.StartClient(0, 4, 0, afresh=True)]


def test_ready_said_twice_is_heard_once():
    run = Run().begin()
    assert run.ready(0) == []


def test_those_who_cannot_go_on_from_the_checkpoint_are_let_in_like_dropped_ones():
    """A server that was started again from a checkpoint of when client 2 was away."""
    run = Run(checkpoint=(2, (0, 1))).begin()
    assert of(run.log, do.StartClient) == [do.StartClient(0, 1, 2, afresh=True), do.StartClient(1, 2, 2, afresh=True)]
    assert run.state.active == (0, 1)
    assert of(run.go_to((2, AVERAGE)).send(0, 1), do.StartClient) == []
    assert of(run.log, do.Advance)[-1].asks_part_of == 0
    assert do.StartClient(2, 3, 3, part_from=0) in run.send(0, part=True)


def test_those_who_have_the_checkpoint_are_waited_for_where_too_few_of_them_are_here():
    """A server that was started again, and those come first who cannot go on from the checkpoint."""
    run = Run(checkpoint=(2, (0,)), stragglers="drop", start_clients=1)
    (said,) = of(run.come(1), do.Warn)
    assert said.text == "of those who have the checkpoint too few are here: training waits for clients [0]"
    assert run.state.active == (0,) and run.stage is Stage.COLLECTING
    assert of(run.come(0), do.StartClient) == [do.StartClient(0, 2, 2, afresh=True)]
    run.go_to((2, AVERAGE))
    assert of(run.log, do.Advance)[-1].clients == (0,)


def test_one_that_has_not_come_yet_is_not_waited_for_where_all_go_back():
    run = Run(start_clients=2)
    run.come(0), run.come(1)
    run.go_to((1, FEATURES)).crash(1)
    assert run.state.active == (0, 1)
    assert of(run.send(0, 1), do.Advance)[0].clients == (0, 1)


# -- Exchanges. ----------------------------------------------------------------------------------------------------


def test_an_exchange_is_advanced_when_the_last_message_is_in():
    run = Run(works=False).begin()
    run.work()
    first = run.state.exchange
    assert run.send(2, 0) == []
    assert run.send(1) == [do.Advance(first, (0, 1, 2), None)]
    assert of(run.work(), do.SendAnswer) == [do.SendAnswer(c, c + 1) for c in range(3)]
    assert run.state.exchange.key == (0, AVERAGE)


def test_a_message_that_comes_before_its_exchange_is_kept():
    run = Run("turns").begin()
    assert run.send(1, key=(1, TAKE)) == []
    run.go_to((0, AVERAGE + 1))
    assert [a.exchange.key for a in of(run.send(0), do.Advance)] == [(0, AVERAGE + 1), (1, TAKE)]


def test_a_message_of_a_client_that_has_left_counts():
    run = Run().begin()
    run.send(0)
    run.leave(0)
    said = run.send(1, 2)
    assert of(said, do.Advance)[0].clients == (0, 1, 2)
    assert do.SendAnswer(0, None) in said  # it is kept for it
    run.reconnect(0)
    assert run.send(0, key=(0, FEATURES)) == [do.ResendAnswer(0, 4)]


def test_the_caller_cannot_take_exchanges_out_of_order():
    run = Run(works=False).begin()
    with pytest.raises(ValueError, match="stage must be advancing for this event, got restoring"):
        run.say(ev.Computed())
    with pytest.raises(ValueError, match="at least one, got none"):
        run.say(ev.Restored(2, ()))
    run.work()
    run.send(0, 1, 2)
    with pytest.raises(ValueError, match=r"above that of the last exchange, answered, got \(0, 3\)"):
        run.say(ev.Opened(run.exchanges[1]))
    run.say(ev.Computed())
    with pytest.raises(ValueError, match=r"above that of the last exchange, answered, got \(0, 2\)"):
        run.say(ev.Opened(run.exchanges[0]))


# -- Repeats and late copies. --------------------------------------------------------------------------------------


def test_what_was_answered_is_answered_again_and_what_is_older_is_ignored():
    run = Run().begin()
    run.send(0, 1, 2)
    assert run.send(0, key=(0, FEATURES)) == [do.ResendAnswer(0, 1)]
    run.send(0, 1, 2)
    assert run.send(0, key=(0, FEATURES)) == []
    assert run.send(0, key=(0, AVERAGE)) == [do.ResendAnswer(0, 1)]


def test_an_old_copy_does_not_undo_the_message_that_waits():
    run = Run().begin().go_to((1, FEATURES))
    run.send(0)
    run.send(0, key=(0, FEATURES)), run.send(0, key=(0, AVERAGE))
    assert run.state.clients[0].message == (1, FEATURES)


def test_a_repeat_while_its_answer_is_computed_changes_nothing():
    run = Run(works=False).begin()
    run.work()
    run.send(0, 1, 2)
    assert run.send(0) == []
    assert of(run.work(), do.SendAnswer, do.ResendAnswer) == [do.SendAnswer(c, c + 1) for c in range(3)]
    assert run.state.clients[0].message is None


def test_messages_of_an_older_session_or_before_the_start_message_are_ignored():
    run = Run().begin()
    run.join(0, generation=7)
    assert run.say(ev.Requested(0, 1, 7, (0, FEATURES))) == []
    assert run.send(0) == []  # not ready yet
    run.send(1, 2)
    assert run.state.exchange.key == (0, FEATURES)


def test_an_answer_is_not_sent_before_the_client_knows_where_the_run_is():
    run = Run().begin()
    run.send(0, 1)
    run.join(0, generation=7)
    assert do.SendAnswer(0, None) in run.send(2)


# -- Connections. --------------------------------------------------------------------------------------------------


def test_a_client_that_has_kept_its_memory_stays_where_it_is():
    run = Run().begin().go_to((2, AVERAGE))
    run.leave(1)
    assert of(run.reconnect(1), do.StartClient, do.RestoreCheckpoint) == [do.StartClient(1, 4, 0)]


def test_a_client_without_memory_takes_all_back_to_the_checkpoint_in_a_new_generation():
    run = Run().begin().go_to((2, AVERAGE))
    run.checkpoint = (2, None)
    run.send(0)
    said = run.crash(1)
    assert of(said, do.RestoreCheckpoint) == [do.RestoreCheckpoint(again=True)]
    assert [a.step for a in of(said, do.StartClient)] == [2, 2, 2]
    assert run.state.generation == 8 and run.state.exchange.key == (2, FEATURES)
    assert run.send(0, generation=7) == [] and run.state.clients[0].message is None
    assert of(run.send(0, 1, 2), do.Advance)[0].exchange.key == (2, FEATURES)


def test_one_that_was_away_when_all_went_back_is_told_when_it_comes():
    run = Run().begin().go_to((1, FEATURES))
    run.leave(0)
    run.crash(1)
    assert of(run.come(0, generation=7), do.StartClient) == [do.StartClient(0, 5, 0, afresh=True)]


def test_memory_that_is_lost_while_an_answer_is_computed_takes_all_back_after_it():
    run = Run(works=False).begin()
    run.work()
    run.send(0, 1, 2)
    assert not of(run.crash(1), do.RestoreCheckpoint)
    assert of(run.work(), do.RestoreCheckpoint)


def test_of_two_live_processes_with_one_client_id_the_second_is_refused():
    run = Run().begin()
    said = run.join(1, instance="another process")
    assert of(said, do.RefuseSession) == [
        do.RefuseSession(4, "client_id must be of one process at a time, got 1, which another process has")
    ]
    assert run.session(1).name == 2
    run.say(ev.Left(1, 4))  # of the refused one: not of the first
    run.say(ev.Requested(1, 4, 7, (0, FEATURES)))
    assert run.session(1).name == 2 and run.state.clients[1].message is None


def test_a_second_process_that_tries_again_and_again_is_told_of_once():
    run = Run().begin()
    turned_away = [of(run.join(0, instance=name), do.RefuseSession, do.Warn) for name in ("b", "b", "b", "c")]
    assert [len(said) for said in turned_away] == [2, 1, 1, 2]


def test_a_process_replaces_its_own_older_session():
    run = Run().begin()
    said = run.join(1)
    assert do.CloseSession(2) in said and do.WelcomeClient(1, 4) in said
    run.say(ev.Left(1, 2))
    assert run.session(1).name == 4


def test_a_new_process_takes_over_once_the_first_is_known_to_be_dead():
    run = Run().begin().go_to((1, FEATURES))
    assert of(run.join(1, instance="new"), do.RefuseSession)
    run.leave(1)
    assert of(run.join(1, instance="new"), do.WelcomeClient)
    assert of(run.ready(1), do.RestoreCheckpoint)


def test_who_breaks_the_protocol_is_turned_away_alone():
    run = Run()
    run.come(0), run.come(1)
    assert run.say(ev.Requested(0, 1, 7, (0, FEATURES))) == [do.CloseSession(1, "a request before the start")]
    assert run.goodbye(1) == [do.CloseSession(2, "a goodbye before the end")]
    run.begin()
    assert run.say(ev.BrokeProtocol(0, run.session(0).name, "no such exchange"))[0].fault == "no such exchange"
    assert run.stage is Stage.COLLECTING


# -- The end. ------------------------------------------------------------------------------------------------------


def test_the_run_is_over_when_all_have_said_goodbye():
    run = Run().begin().go_to_end()
    assert of(run.log, do.TellEnd) == [do.TellEnd(c, c + 1, dropped=False) for c in range(3)]
    assert run.goodbye(0) == run.goodbye(1) == []  # they stay
    closed = [action(session) for session in (1, 2, 3) for action in (do.TellOver, do.CloseSession)]
    assert run.goodbye(2) == [*closed, do.Finish()] and run.stage is Stage.OVER


def test_goodbyes_are_waited_for_as_long_as_the_deadline():
    run = Run().begin().go_to_end()
    run.goodbye(0)
    assert run.state.wake_at == 10.0
    said = run.wait(10.0)
    assert do.Warn("clients [1, 2] did not say that they have kept their parts") in said
    assert len(of(said, do.CloseSession)) == 3 and said[-1] == do.Finish()


def test_one_whose_last_answer_was_lost_asks_again_and_hears_of_the_end_again():
    run = Run().begin().go_to_end()
    run.leave(0)
    assert of(run.reconnect(0), do.StartClient, do.TellEnd) == [do.TellEnd(0, 4, dropped=False)]
    last = run.exchanges[-1].key
    assert run.send(0, key=last) == [do.ResendAnswer(0, 4), do.TellEnd(0, 4, dropped=False)]


def test_one_without_memory_may_have_a_checkpoint_of_the_end():
    run = Run().begin().go_to_end()
    told = of(run.crash(0, saved_step=4), do.StartClient, do.TellEnd)
    assert told == [do.StartClient(0, 4, 4), do.TellEnd(0, 4, dropped=False)]


def test_one_that_died_before_it_had_kept_its_part_takes_all_back_from_the_end():
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    run.goodbye(1)
    run.leave(0)
    run.join(0, instance="another")
    stale = ev.SaidGoodbye(2, 3, run.state.generation)
    said = run.ready(0, saved_step=2)
    assert of(said, do.StartClient, do.TellEnd) == [
        do.StartClient(c, s, 2, afresh=True) for c, s in ((0, 4), (1, 2), (2, 3))
    ]
    assert run.stage is Stage.COLLECTING and run.state.generation == 8
    assert run.say(stale) == []  # of the end before: it was on its way
    run.go_to_end()
    assert run.goodbye(0) == run.goodbye(1) == [] and run.goodbye(2)[-1] == do.Finish()


def test_those_that_go_back_from_the_end_are_waited_for():
    """One has lost its part, and the line of another, which has kept its own, is cut."""
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    run.goodbye(1)
    run.leave(1)
    assert not of(run.crash(0, saved_step=2), do.StartClient, do.TellEnd, do.RestoreCheckpoint)
    assert of(run.reconnect(1), do.RestoreCheckpoint) and run.stage is Stage.COLLECTING
    run.go_to_end()
    for client in run.everyone:
        run.goodbye(client)
    assert run.stage is Stage.OVER


def test_one_that_is_started_again_after_its_goodbye_hears_that_it_has_its_part():
    """Not that training has ended without it, as its new process knows of nothing but its checkpoint of the end."""
    run = Run().begin().go_to_end()
    run.goodbye(0)
    run.leave(0)
    run.join(0, instance="another")
    run.goodbye(1)
    run.goodbye(2)
    assert run.stage is Stage.ENDING
    assert of(run.ready(0, saved_step=4), do.StartClient, do.TellEnd, do.Finish) == [
        do.StartClient(0, 4, 4),
        do.TellEnd(0, 4, dropped=False),
        do.Finish(),
    ]


def test_what_clients_hear_before_all_go_back_is_of_the_end_before():
    """Else one that hears of the end takes this for the new generation's, and does not go back with the others."""
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    run.leave(1)
    run.crash(0, saved_step=2)
    run.works = False  # as the server does, once the messages are sent
    said = run.come(1, saved_step=4, instance="another")
    assert of(said, do.StartClient, do.RestoreCheckpoint) == [do.StartClient(1, 5, 4), do.RestoreCheckpoint(again=True)]
    assert run.state.generation == 7
    run.say(ev.SaidGoodbye(1, 5, 7))
    assert of(run.work(), do.StartClient) and run.state.generation == 8


def test_nobody_goes_back_where_that_would_not_help():
    """It has no checkpoint to go back to either: its folder is gone."""
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    told = of(run.crash(0, saved_step=1), do.StartClient, do.TellEnd)
    assert told == [do.StartClient(0, 4, 4), do.TellEnd(0, 4, dropped=False)] and run.stage is Stage.ENDING


def test_one_that_lost_its_part_hears_so_where_others_do_not_come_back():
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    run.goodbye(1)
    run.leave(1)
    run.crash(0, saved_step=2)
    said = run.wait(10.0)
    assert of(said, do.StartClient) == [do.StartClient(0, 4, 4, afresh=True)]  # it has no checkpoint of that step
    assert do.Warn("clients [0, 2] did not say that they have kept their parts") in said and said[-1] == do.Finish()


def test_nobody_goes_back_for_a_part_that_is_no_result():
    run = Run("turns", steps=4, checkpoint=(2, None)).begin().go_to_end()
    assert run.keepers == (0,)
    told = of(run.crash(2, saved_step=2), do.StartClient, do.TellEnd)
    assert told == [do.StartClient(2, 4, 4), do.TellEnd(2, 4, dropped=False)] and run.stage is Stage.ENDING


def test_where_late_clients_are_dropped_nobody_goes_back_for_one_at_the_end():
    run = Run(stragglers="drop", checkpoint=(2, None)).begin().go_to_end()
    assert of(run.crash(0, saved_step=2), do.StartClient, do.TellEnd) == [do.TellEnd(0, 4, dropped=True)]
    run.goodbye(1)
    assert run.goodbye(2)[-1] == do.Finish()


def test_a_client_that_was_dropped_and_not_let_in_is_told_so_and_not_waited_for():
    run = Run(stragglers="drop").begin().go_to((3, AVERAGE))
    run.send(0, 1)
    run.wait(10.0)
    run.go_to_end()
    assert do.TellEnd(2, 3, dropped=True) in run.log
    run.goodbye(0)
    assert run.goodbye(1)[-1] == do.Finish()


def test_one_that_comes_after_the_end_finds_a_closed_door():
    run = Run().begin().go_to_end()
    for client in run.everyone:
        run.goodbye(client)
    assert run.join(0) == [do.CloseSession(4)]
    assert run.join(0, generation=7) == [do.TellOver(5), do.CloseSession(5)]
    assert run.say(ev.Left(0, 4)) == [] and run.state.wake_at is None


def test_a_run_that_is_at_its_end_already_tells_those_who_come():
    run = Run(checkpoint=(4, None)).begin()
    assert run.stage is Stage.ENDING and len(of(run.log, do.TellEnd)) == 3


# -- Stops. --------------------------------------------------------------------------------------------------------


def test_a_stop_is_heeded_at_the_next_opportunity():
    run = Run()
    run.join(0)
    assert run.say(ev.StopAsked("enough")) == [
        do.TellFailure(1, "enough"),
        do.CloseSession(1),
        do.StopRun("enough"),
    ]
    run = Run(works=False).begin()
    assert run.say(ev.StopAsked("enough")) == []
    assert of(run.work(), do.StopRun)
    run = Run(works=False).begin()
    run.work()
    run.send(0, 1, 2)
    assert run.say(ev.StopAsked("enough")) == [] == run.say(ev.StopAsked("more"))
    said = run.work()
    assert of(said, do.SendAnswer) and said[-1] == do.StopRun("enough")


def test_a_stop_at_the_end_is_one_while_parts_are_not_kept():
    """The run can be resumed: no summary says that it has ended."""
    run = Run().begin().go_to_end()
    run.goodbye(0)
    said = run.say(ev.StopAsked("enough"))
    assert said[-1] == do.StopRun("enough") and do.TellFailure(1, "enough") in said


@pytest.mark.parametrize("works", [True, False])
def test_all_hear_of_a_server_that_fails(works):
    run = Run(works=works).begin()
    run.join(0)
    said = run.say(ev.Failed("a shape that does not fit"))
    assert len(of(said, do.TellFailure)) == 3 and said[-1] == do.StopRun("a shape that does not fit")


# -- Arguments. ----------------------------------------------------------------------------------------------------


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="deadline_seconds must be above 0, got 0"):
        Policy(deadline_seconds=0)
    with pytest.raises(ValueError, match="min_clients must be at least 1, got 0"):
        Policy(min_clients=0)
    with pytest.raises(ValueError, match="clients must be at least 1, got 0"):
        Membership.begin(Policy(), clients=0, generation=1, now=0.0)
    with pytest.raises(ValueError, match="generation must be at least 1, got 0"):
        Membership.begin(Policy(), clients=1, generation=0, now=0.0)


def test_stragglers_must_be_known(unchecked):
    with pytest.raises(ValueError, match="stragglers must be wait, drop or stop, got 'kick'"):
        Policy(stragglers="kick")


def test_states_are_values():
    """An equal state is the same state: it can be kept, compared and replayed."""
    run, again = Run().begin(), Run().begin()
    run.send(0), again.send(0)
    assert run.state == again.state and hash(run.state) == hash(again.state)
    assert ExchangeInfo((0, 1), 0, (0,)) == ExchangeInfo((0, 1), 0, (0,))


def test_nobody_goes_back_for_one_that_has_no_checkpoint_to_go_back_to():
    """The others keep their steps, and wait for a process of it that has its folder."""
    run = Run().begin().go_to((3, FEATURES))
    run.checkpoint = (2, None)
    run.send(0, 1, 2)
    said = run.crash(1)
    (closed,) = of(said, do.CloseSession)
    assert not of(said, do.RestoreCheckpoint, do.StartClient) and run.state.generation == 7
    assert "must have its checkpoint of step 2, to which all would go back with it, got one of step 0" in closed.fault
    assert of(run.come(1, saved_step=2, instance="with its folder"), do.RestoreCheckpoint)


def test_one_without_the_checkpoint_is_let_in_with_a_part_where_a_server_comes_again():
    run = Run(stragglers="drop", start_clients=3, checkpoint=(2, None))
    for client, saved in ((0, 2), (1, 0), (2, 3)):
        said = run.come(client, saved_step=saved)
    assert of(said, do.StartClient) == [do.StartClient(c, s, 2, afresh=True) for c, s in ((0, 1), (2, 3))]
    assert run.state.clients[1].returning
    said = run.send(0, 2) + run.send(0, 2)
    assert of(said, do.Advance)[-1].asks_part_of == 0
    assert do.StartClient(1, 2, 3, part_from=0) in run.send(0, part=True)


@pytest.mark.parametrize("dropped", [False, True])
def test_in_turns_the_server_gives_the_last_one_its_part_once_more(dropped):
    """It has that part, and whoever died or was dropped keeps it all the same."""
    run = Run("turns", stragglers="drop", steps=4).begin().go_to_end()
    assert run.keepers == (0,)
    run.goodbye(1)
    run.leave(0)
    if dropped:
        first, *others = run.state.clients
        clients = (dataclasses.replace(first, active=False), *others)
        run.state = dataclasses.replace(run.state, clients=clients, tally=Tally.over(clients, run.state.exchange))
    told = of(run.come(0, instance="another"), do.StartClient, do.TellEnd)
    assert told == [do.StartClient(0, 4, 4, afresh=True), do.TellEnd(0, 4, dropped=False)]
    run.goodbye(2)
    assert run.stage is Stage.OVER if dropped else run.goodbye(0)[-1] == do.Finish()


@pytest.mark.parametrize("comes", [True, False])
def test_a_part_that_one_alone_has_is_waited_for_at_the_end(comes):
    run = Run("turns", steps=4).begin().go_to_end()
    run.leave(0)
    for client in (1, 2):
        run.goodbye(client)
    said = run.wait(10.0)
    assert (
        "the run waits for one of clients [0] to keep the trained part, which nobody else has: start it"
        in said[-1].text
    )
    assert run.stage is Stage.ENDING and run.wait(10.0) and run.stage is Stage.ENDING
    if comes:
        run.come(0, saved_step=4, instance="another")
        assert run.goodbye(0)[-1] == do.Finish()
    else:  # whoever asks for a stop knows that nobody will come
        assert run.say(ev.StopAsked("by a signal"))[-1] == do.Finish()


@pytest.mark.parametrize("comes", [True, False])
def test_a_part_is_waited_for_where_the_one_that_is_there_lacks_its_own(comes):
    run = Run(clients=2, checkpoint=(2, None)).begin().go_to_end()
    run.leave(1)
    assert not of(run.crash(0, saved_step=2), do.StartClient, do.RestoreCheckpoint)
    assert (
        "start clients [1] again, and all go back; or Ctrl-C" in run.wait(10.0)[-1].text and run.stage is Stage.ENDING
    )
    if comes:
        assert of(run.come(1, saved_step=2, instance="another"), do.RestoreCheckpoint)
    else:  # the last checkpoint stays, from which the run can go on without the other
        assert isinstance(run.say(ev.StopAsked("by a signal"))[-1], do.StopRun)


def test_those_that_died_at_the_end_go_back_together_where_late_clients_are_dropped():
    """Who is away itself does not count among those without whom the run could end."""
    for comes in (True, False):
        run = Run(clients=2, stragglers="drop", checkpoint=(2, None)).begin().go_to_end()
        run.leave(1)
        assert not of(run.crash(0, saved_step=2), do.StartClient, do.TellEnd, do.RestoreCheckpoint)
        said = run.come(1, saved_step=2, instance="another") if comes else run.wait(10.0)
        assert of(said, do.RestoreCheckpoint) and run.state.active == ((0, 1) if comes else (0,))


def test_one_that_was_dropped_in_the_last_test_is_waited_for_though_all_others_have_gone():
    """The server has its part."""
    run = Run("turns", stragglers="drop", steps=4).begin().go_to_end()
    first, *others = run.state.clients
    clients = (dataclasses.replace(first, active=False, session=None), *others)
    run.state = dataclasses.replace(run.state, clients=clients, tally=Tally.over(clients, run.state.exchange))
    run.goodbye(1), run.goodbye(2)
    assert run.stage is Stage.ENDING
    told = of(run.come(0, instance="another"), do.StartClient, do.TellEnd)
    assert told[0].afresh and not told[1].dropped
    assert run.stage is Stage.OVER


def test_one_that_was_let_in_after_the_checkpoint_and_dies_is_let_in_again():
    """It never had that checkpoint, so it is not told to bring it."""
    run = Run(start_clients=2)
    for client in (0, 1):
        run.come(client)
    run.checkpoint = (1, (0, 1))
    run.go_to((1, FEATURES))
    run.come(2)
    for _ in range(3):
        run.send(0, 1)
    run.send(0, part=True), run.send(1, 2)
    assert run.state.active == (0, 1, 2)
    said = run.crash(2)
    assert of(said, do.RestoreCheckpoint) and not of(said, do.CloseSession)
    assert run.state.active == (0, 1) and run.state.clients[2].returning


def test_one_that_has_kept_its_part_lacks_nothing():
    run = Run(checkpoint=(2, None)).begin().go_to_end()
    run.goodbye(0)
    said = run.crash(0, saved_step=2)
    assert not of(said, do.RestoreCheckpoint) and run.stage is Stage.ENDING
