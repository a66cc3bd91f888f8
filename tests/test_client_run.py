"""A client's way through its exchanges, with a party that computes nothing: what it takes, repeats, saves and drops."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from msjax import __version__, compress, config, data
from msjax.build import DataSummary
from msjax.distributed import agreement, client_program, messages
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.client_program import ClientProgram, keep_part_of_another_run, own_config
from msjax.distributed.client_run import ClientRun, Interrupted, Refused
from msjax.distributed.options import ClientOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.session import ClientSession, Own
from msjax.parts import part_run_id, save_trained, served_run_id
from msjax.split.modes import Parallel
from msjax.split.parties import Message
from msjax.split.schedule import Phase, Schedule
from msjax.split.state import PartState
from msjax.training.from_config import load_run

from .memory_network import Clock
from .network import RUN
from .setups import SMALL, dataset


def test_a_folder_is_of_one_client(tmp_path):
    """Whose checkpoints another client would else go on from, in silence."""

    def open_store(client):
        return ClientProgram(ClientOptions(client_id=client, state=str(tmp_path)))._open_store(RUN)

    open_store(0).close()
    store = open_store(1)  # where there is nothing yet
    store.save(2, {"a": np.zeros(1)})
    store.wait()
    store.close()
    open_store(1).close()
    with pytest.raises(ValueError, match=r"state must be a client's own folder, got '.*' for client 0, where client 1"):
        open_store(0)
    (tmp_path / "checkpoints" / f"{RUN}.client").unlink()  # of a version that wrote none
    open_store(0).close()


def test_a_part_of_another_run_is_not_replaced(tmp_path):
    file, other = tmp_path / "client.safetensors", "0" * 31 + "2"
    keep_part_of_another_run(file, RUN)  # nothing is there
    summary = DataSummary.of(dataset())
    names = {"run_id": served_run_id(RUN, 7), "step": 1}
    save_trained(file, "client", PartState({"a": np.zeros(1)}, {}, ()), SMALL, summary, **names)
    written = file.read_bytes()
    keep_part_of_another_run(file, RUN)  # the same run again
    assert file.read_bytes() == written
    keep_part_of_another_run(file, other)
    file.write_text("not a part")
    keep_part_of_another_run(file, other)
    found = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert found == {f"client-{RUN}.safetensors": written, "client-unknown.safetensors": b"not a part"}


def test_a_client_whose_disk_is_full_tries_until_it_has_kept_its_part(tmp_path, monkeypatch, caplog):
    pauses, full = [], iter(2 * [OSError(28, "No space left on device")])
    program = ClientProgram(ClientOptions(client_id=0, state=str(tmp_path)), sleep=pauses.append)
    program._schedule, program._cfg, program._summary = Party.schedule, SMALL, DataSummary.of(dataset())

    def save(path, *args, **names):
        for error in full:
            raise error
        save_trained(path, *args, **names)

    monkeypatch.setattr(client_program, "save_trained", save)
    program.session.name, program.session.run = RUN, SimpleNamespace(generation=7)
    party = SimpleNamespace(keeps_result=True, up_bits=None, state=PartState({"a": np.zeros(1)}, {}, ()))
    program._save_part(party)
    assert pauses == [30.0, 30.0] and part_run_id(tmp_path / "client.safetensors") == served_run_id(RUN, 7)
    assert caplog.text.count("client.safetensors cannot be written: [Errno 28] No space left on device") == 2


class Spec:
    """Exchanges that carry nothing."""

    schedule, mode = Schedule(Parallel(), 2, 4, 12, 2, 2), Parallel()
    sends_labels, metric_sums_like, labels, cut_seconds = False, {}, None, None

    def up(self, exchange):
        return None

    down = up


class Party:
    """Of two clients the first, with two steps an epoch, each of features and an average, and three rounds of tests."""

    spec, schedule, client_id = Spec(), Schedule(Parallel(), 2, 4, 12, 2, 2), 0
    needed = keeps_result = True

    def __init__(self):
        self.state, self.begun = "initial", 0

    def exchanges(self, start=0):
        return self.schedule.exchanges(start)

    def begin(self):
        self.begun += 1

    def needs_state(self, at):
        return self.needed

    def may_checkpoint(self, exchange, every):
        return exchange.phase == Phase.FEATURES and self.schedule.may_checkpoint(exchange.step, every)

    def checkpoint(self):
        return self.state

    def go_back(self, checkpoint):
        self.state = checkpoint

    def prepare(self, exchange):
        pass

    def send(self, exchange):
        return Message()

    def receive(self, exchange, message, *, bytes_per_second=None):
        self.state = exchange.position


class Store:
    """Checkpoints in a dict; with `slow` complete only once they are waited for."""

    def __init__(self):
        self.saved, self.begun, self.full, self.slow = {}, {}, False, False

    def steps(self):
        return sorted(self.saved)

    def save(self, step, state):
        if self.full:
            raise OSError(28, "No space left on device")
        self.wait()
        self.begun[step] = state
        if not self.slow:
            self.wait()

    def check(self):
        pass

    def wait(self):
        self.saved |= self.begun
        self.begun = {}

    def restore(self, step, like):
        return self.saved[step]

    def prune(self, kept):
        self.saved = {step: state for step, state in self.saved.items() if step in kept}

    def drop_after(self, step):
        self.saved = {saved: state for saved, state in self.saved.items() if saved <= step}


@pytest.fixture
def run():
    """A client that has been told to start, in generation 1."""
    it = ClientRun(Party(), Store())
    it.checkpoint_steps = 1
    it.start(pb.Start(generation=1))
    return it


def answer(run, *, exchange=None, generation=1, saved_step=0):
    return pb.Answer(
        generation=generation, position=messages.to_position(exchange or run.exchange), saved_step=saved_step
    )


def go_to(run, *position):
    while run.exchange.position != position:
        assert run.take(answer(run)) is not None
    return run


def test_an_answer_counts_once_and_in_its_place_and_generation(run):
    first = run.exchange
    assert run.take(answer(run, generation=2)) is None
    assert run.take(answer(run, exchange=first._replace(step=1))) is None
    assert run.take(answer(run)) == first and run.party.state == first.position
    second = run.exchange
    assert run.take(answer(run, exchange=first)) is None
    assert run.exchange == second and run.party.state == first.position
    run.start(pb.Start(generation=2))
    assert run.take(answer(run, exchange=first, generation=1)) is None
    assert run.take(answer(run, exchange=first, generation=2)) == first


def test_a_start_of_the_same_generation_is_heard_once(run):
    """The server repeats it over every new connection; the request under way is repeated as it was."""
    request = go_to(run, 1, Phase.AVERAGE, 0).request
    begun, state = run.party.begun, run.party.state
    run.start(pb.Start(generation=1, step=0))
    assert (run.request, run.party.begun, run.party.state) == (request, begun, state)


def test_a_new_generation_goes_back_to_the_checkpoint(run):
    saved = go_to(run, 1, Phase.FEATURES, 0).party.state
    go_to(run, 1, Phase.TEST, 0)
    run.start(pb.Start(generation=2, step=1))
    assert run.party.state == saved and run.exchange.position == (1, Phase.FEATURES, 0)
    assert run.request.request.generation == 2
    run.start(pb.Start(generation=3, step=0))
    assert run.party.state == "initial"


def test_a_request_that_was_made_early_is_of_its_generation_alone(run):
    """In a test the next request is made while the one before is on its way."""
    go_to(run, 1, Phase.TEST, 0).prepare()
    run.start(pb.Start(generation=2, step=1))
    request = run.request.request
    assert (request.generation, request.position.phase) == (2, Phase.FEATURES)
    go_to_test = [run.take(answer(run, generation=2)) for _ in range(2)]
    assert [exchange.phase for exchange in go_to_test] == [Phase.FEATURES, Phase.AVERAGE]
    run.prepare()
    run.take(answer(run, generation=2))
    assert messages.to_position(run.exchange) == run.request.request.position


def test_what_was_saved_on_a_way_that_was_left_is_saved_anew(run):
    """The steps from a checkpoint on may give another part, as where a client was dropped in between."""
    go_to(run, 3, Phase.FEATURES, 0)
    run._store.saved[2] = "what was left"
    run.start(pb.Start(generation=2, step=1))
    assert run._store.steps() == [1]
    while run.exchange.position != (2, Phase.FEATURES, 0):
        run.take(answer(run, generation=2))
    assert run._store.steps() == [1, 2] and run._store.saved[2] != "what was left"


def test_what_was_saved_of_a_step_is_saved_anew_where_anothers_part_comes_at_it(run):
    """As one that was dropped and is let in: its own part of this step is of another way."""
    go_to(run, 3, Phase.FEATURES, 0)
    run._store.saved[3] = "of another way"
    run.party.adopt = lambda part, step: setattr(run.party, "state", "another's")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "decode_part", lambda data, spec: data)
        run.start(pb.Start(generation=2, step=3, part=b"part"))
    assert run._store.saved[3] == "another's" and run.request.request.saved


def test_older_checkpoints_that_cannot_be_deleted_are_told_of_once(run, monkeypatch, caplog):
    def prune(kept):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(run._store, "prune", prune, raising=False)
    go_to(run, 1, Phase.FEATURES, 0)
    for _ in range(2):
        assert run.take(answer(run, saved_step=1)) is not None
    assert caplog.text.count("checkpoints other than of steps 1 cannot be deleted: [Errno 39] Directory not empty") == 1


def test_without_the_checkpoint_a_client_goes_on_only_where_its_part_does_not_count(run):
    with pytest.raises(Refused, match="this client has no checkpoint of step 3, where the run is"):
        run.start(pb.Start(generation=2, step=3))
    run.party.needed = False
    run.start(pb.Start(generation=3, step=3))
    assert run.party.state == "initial" and run.exchange.step == 3


def test_what_the_server_has_saved_is_kept_and_what_is_older_is_not(run):
    assert not run.request.request.saved  # before the first step there is nothing to save
    go_to(run, 3, Phase.FEATURES, 0)
    assert run.request.request.saved and run._store.steps() == [1, 2, 3]
    assert run._initial is not None
    run.take(answer(run, saved_step=1))
    assert run._store.steps() == [1, 2, 3] and run._initial is None  # nobody goes back to it any more
    run.take(answer(run, saved_step=2))
    assert run._store.steps() == [2, 3]


def test_a_client_that_is_let_in_again_keeps_what_the_server_may_be_writing(run):
    """It has said that it has its checkpoint of step 3, and was dropped then, while another's was not complete."""
    run.party.schedule = Schedule(Parallel(), 2, 20, 0, 2, 1)
    run.start(pb.Start(generation=2))
    while run.exchange.step < 4:
        run.take(answer(run, generation=2, saved_step=min(run.exchange.step, 2)))
    assert run._store.steps() == [2, 3, 4]  # and 4 is of the way that is left
    run.checkpoint_steps = 9
    run.party.adopt = lambda part, step: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "decode_part", lambda data, spec: data)
        run.start(pb.Start(generation=2, step=4, part=b"part"))
    run.take(answer(run, generation=2, saved_step=2))
    assert run._store.steps() == [2, 3]
    run.take(answer(run, generation=2, saved_step=3))
    assert run._store.steps() == [3]


def test_a_client_keeps_three_checkpoints_where_another_cannot_save_its_own(run):
    """The server completes none any more: what it may have is the last, or one of the two that were due since."""
    run.party.schedule = Schedule(Parallel(), 2, 20, 0, 2, 1)
    run.start(pb.Start(generation=2))
    while run.exchange.step < 9:
        run.take(answer(run, generation=2, saved_step=2 if run.exchange.step > 2 else 0))
    assert run._store.steps() == [2, 7, 8, 9]  # 9 is new, and what is sent with it is not answered yet
    run.take(answer(run, generation=2, saved_step=2))
    assert run._store.steps() == [2, 8, 9]


def test_a_client_says_where_it_could_not_save(run):
    run._store.full = True
    assert not go_to(run, 1, Phase.FEATURES, 0).request.request.saved
    run._store.full = False
    assert go_to(run, 2, Phase.FEATURES, 0).request.request.saved
    assert run._store.steps() == [2]


def test_a_client_says_what_is_complete_and_not_what_it_has_begun(run):
    run._store.slow = True
    request = go_to(run, 1, Phase.FEATURES, 0).request.request
    assert request.saved and request.saved_step == 0
    run._store.wait()
    assert run.request.request.saved_step == 0 and go_to(run, 1, Phase.AVERAGE, 0).request.request.saved_step == 1
    # Step 2's is not complete when step 3's is begun, which waits for it.
    assert go_to(run, 2, Phase.AVERAGE, 0).request.request.saved_step == 1
    assert go_to(run, 3, Phase.FEATURES, 0).request.request.saved_step == 2
    run.start(pb.Start(generation=2, step=2))  # who goes back waits for what was begun
    assert run.party.state == (1, Phase.TEST, 2) and run.request.request.saved_step == 2
    run.start(pb.Start(generation=3, step=1))
    assert run.request.request.saved_step == 1


def test_the_end_is_saved_though_no_step_follows(run):
    while not run.done:
        run.take(answer(run))
    assert run._store.steps()[-1] == 4 and run.request is None
    run.start(pb.Start(generation=1, step=4))
    assert run.done


def test_a_clients_pace_begins_anew_where_it_goes_back():
    program = ClientProgram(ClientOptions(client_id=0))
    run, party = SimpleNamespace(generation=1), SimpleNamespace(spec=Spec(), bytes_per_second=None)
    program._schedule, program.session = Spec.schedule, SimpleNamespace(run=run, party=party)
    first, *_ = Spec.schedule.exchanges(0)
    paces = []
    for run.generation in (1, 1, 2):
        program._tell(first)
        paces.append(program._pace)
    assert paces[0] is paces[1] is not paces[2]
    program._tell(first._replace(step=4))  # the steps between were others', as in turns
    assert program._pace._steps == 4


# -- The session around it. ----------------------------------------------------------------------------------------


COUNTS = {"samples": 4, "test_samples": 12}


def welcome(checkpoint_steps=1, **fields):
    text = json.dumps(config.to_json(config.without_paths(SMALL)))
    fields = {"protocol": 5, "run": RUN, "config": text, "checkpoint_steps": checkpoint_steps, **fields}
    return pb.FromServer(welcome=pb.Welcome(**fields))


@pytest.fixture
def session():
    """Connected and welcomed, at second 100."""
    it = ClientSession(
        0,
        lambda cfg: Own(4, 12, "{}"),
        lambda *args: Party(),
        lambda name: Store(),
        clock=Clock(100.0),
        answer_seconds=20.0,
        draw=lambda: 1.0,
    )
    assert [message.WhichOneof("kind") for message in it.on_connected()] == ["hello"]
    assert [message.WhichOneof("kind") for message in it.on_message(welcome())] == ["ready"]
    return it


def test_what_a_client_waits_for_and_how_long(session):
    """For the start however long it takes, for an answer for its time, for the end again."""
    assert session.next_deadline is None
    (request,) = session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1)))
    assert request.WhichOneof("kind") == "request" and session.next_deadline == 120.0
    while session.run.request is not None:
        session._clock.now += 1.0
        list(session.on_message(pb.FromServer(answer=answer(session.run))))
        assert session.next_deadline in (session._clock.now + 20.0, None)
    (goodbye,) = session.on_message(pb.FromServer(finished=pb.Finished()))
    assert goodbye.WhichOneof("kind") == "goodbye" and session.next_deadline is None
    session.on_lost(ConnectionLost("the line was cut"))
    assert not session.done and session.next_deadline == session._clock.now + 0.1
    assert not list(session.on_message(pb.FromServer(finished=pb.Finished(over=True)))) and session.done


def test_a_client_of_a_run_that_the_server_has_begun_with_other_samples_must_be_started_again(session):
    """It has built its schedule already."""
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    with pytest.raises(Refused, match="anew with 16 samples to train and 12 to test on, and this client with 4 and 12"):
        list(session.on_message(pb.FromServer(start=pb.Start(samples=16, test_samples=12, generation=2))))


def test_a_client_of_a_run_that_the_server_has_given_more_epochs_must_be_started_again(session):
    list(session.on_message(welcome()))
    session.on_lost(ConnectionLost("away"))
    list(session.on_connected())
    text = json.dumps(config.to_json(config.without_paths(dataclasses.replace(SMALL, epochs=9))))
    with pytest.raises(Interrupted, match="the run's config was changed, as to more epochs"):
        list(session.on_message(welcome(config=text)))


def test_a_client_that_may_not_ask_yet_waits_with_its_request_however_long_it_takes(session):
    """As where a server was started again, or has dropped it, and others have to come first."""
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    for _ in range(3):
        session._clock.now += 10.0
        session.on_lost(ConnectionLost("the server is gone"))
        list(session.on_connected())
        list(session.on_message(welcome()))
        assert session.next_deadline is None
        session._clock.now += 3000.0
    (request,) = session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=2)))
    assert request.WhichOneof("kind") == "request" and session.next_deadline == session._clock.now + 20.0


@pytest.mark.parametrize(
    "is_heard, why",
    [
        (False, "the server has been away, or turned this client away, for"),  # the line stands, nobody is behind it
        (True, "but no new answer has come for"),
    ],
)
def test_a_client_that_has_asked_in_vain_gives_up(session, is_heard, why):
    start = pb.FromServer(start=pb.Start(**COUNTS, generation=1))
    list(session.on_message(start))
    with pytest.raises(ConnectionError, match=why):
        for _ in range(100):
            session._clock.now = session.next_deadline
            session.on_lost(ConnectionLost("no answer within 20 s"))
            list(session.on_connected())
            for message in (welcome(), start) if is_heard else ():
                list(session.on_message(message))


@pytest.mark.parametrize("has_come", [False, True])
def test_a_client_says_where_its_link_may_be_too_slow_for_its_request(session, caplog, has_come):
    (request,) = session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1)))
    if has_come:
        list(session.on_message(pb.FromServer(received=pb.Received())))
    session._clock.now = session.next_deadline
    session.on_lost(ConnectionLost("no answer within 20 s"))
    size, speed = f"{request.ByteSize() / 1e6:,.1f}", f"{request.ByteSize() / 20e6:.3g}"
    told = f"has not said that the request of {size} MB has come; if the link takes less than {speed} MB/s, answer_sec"
    assert (told in caplog.text) != has_come


def test_a_client_keeps_its_part_once_and_again_where_all_had_to_go_back(session):
    kept = []
    session._on_end = lambda party: kept.append(session.run.generation)
    for generation in (1, 2):
        list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=generation))))
        while session.run.request is not None:
            list(session.on_message(pb.FromServer(answer=answer(session.run, generation=generation))))
        for _ in range(2):
            list(session.on_message(pb.FromServer(finished=pb.Finished())))
    assert kept == [1, 2] and not session.done


@pytest.mark.parametrize("how", ["refused", "another run"])
def test_a_client_that_has_kept_its_part_has_not_failed(session, caplog, how):
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    while session.run.request is not None:
        list(session.on_message(pb.FromServer(answer=answer(session.run))))
    list(session.on_message(pb.FromServer(finished=pb.Finished())))
    if how == "refused":
        session.on_lost(ConnectionLost("no such token", final=True))
    else:
        session.on_lost(ConnectionLost("the server is gone"))
        list(session.on_connected())
        other = welcome()
        other.welcome.run = "0" * 31 + "2"
        (goodbye,) = session.on_message(other)
        assert goodbye.goodbye.error
    assert session.done and "the server did not say that all clients have their parts" in caplog.text


def test_a_client_that_cannot_keep_its_part_says_so(session):
    def full(party):
        raise OSError(28, "No space left on device")

    session._on_end = full
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    while session.run.request is not None:
        list(session.on_message(pb.FromServer(answer=answer(session.run))))
    answers = session.on_message(pb.FromServer(finished=pb.Finished()))
    assert next(answers).goodbye.error == "it cannot keep its part (OSError)"
    with pytest.raises(OSError, match="No space left"):
        next(answers)


def test_a_client_that_still_waits_for_an_answer_asks_again_where_it_hears_of_the_end(session):
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    (again,) = session.on_message(pb.FromServer(finished=pb.Finished()))
    assert again == session.run.request and not session.done


@pytest.mark.parametrize(("version", "told"), [("9.1", True), (__version__, False), ("", False)])
def test_unlike_versions_are_told(caplog, tmp_path, version, told):
    client = ClientSession(0, lambda cfg: Own(4, 12, "{}"), lambda *args: Party(), lambda run: Store())
    (hello,) = client.on_connected()
    assert hello.hello.version == __version__
    for _ in range(2):
        list(client.on_message(welcome(version=version)))
    assert caplog.text.count("the server has msjax 9.1, and this client") == told


def test_a_server_that_was_started_anew_says_how_often_to_save(session):
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=1))))
    session.on_lost(ConnectionLost("the server is gone"))
    (hello,) = session.on_connected()
    assert (hello.hello.run, hello.hello.generation) == (RUN, 1)
    list(session.on_message(welcome(checkpoint_steps=3)))
    list(session.on_message(pb.FromServer(start=pb.Start(**COUNTS, generation=2))))
    go_on = [session.run.take(answer(session.run, generation=2)) for _ in range(4)]
    assert go_on[-1].position == (1, Phase.AVERAGE, 0) and not session._store.steps()


@pytest.mark.parametrize("own", [True, False], ids=["with a preset", "without"])
def test_images_beside_the_program_are_not_taken_for_those_of_another_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.png").touch()
    run = config.Config(data=config.DataConfig(name="photos"))
    options = ClientOptions(client_id=0, data_dir="/hospital")
    with pytest.raises(ValueError, match=r"data_dir must have what data\.name names, 'photos', got '/hospital'"):
        own_config(run, run if own else None, options)


DIVISION = """
import numpy as np
from msjax import config

def divide(ds, clients, seed):
    low = ds.train.labels() < {limit} + seed
    return [np.flatnonzero(low), np.flatnonzero(~low)][:clients]

def get_config():
    return config.Config(
        model=config.ModelConfig("mlp"), data=config.DataConfig(division=":divide"), clients=2, batch_size=50
    )
"""


def test_a_division_of_ones_own_says_who_has_what(tmp_path):
    presets = []
    for name, limit in (("server", 5), ("other", 3)):
        (tmp_path / f"{name}.py").write_text(DIVISION.format(limit=limit))
        presets.append(config.load_preset(str(tmp_path / f"{name}.py")))
    run, labels = load_run(presets[0]), data.load().train.labels()
    assert [set(labels[own]) for own in run.client_indices] == [set(range(5)), set(range(5, 10))]
    assert run.spec.schedule.samples == len(labels) // 2
    found = []
    for client, preset in ((0, presets[0]), (1, presets[0]), (1, presets[1])):
        options = ClientOptions(client_id=client, state=str(tmp_path / "state"))
        program = ClientProgram(options, preset)
        found.append(agreement.parse(program._load(config.without_paths(presets[0])).description))
        if len(found) < 3:
            np.testing.assert_array_equal(program._data.train.labels(), labels[run.client_indices[client]])
    assert not agreement.differences(*found[:2])
    assert "hash of shared data is" in agreement.differences(*found[1:])
    with pytest.raises(ValueError, match=r"alpha must be None with a division, got 0\.1"):
        load_run(config.with_fields(presets[0], {"data.alpha": 0.1}))
    with pytest.raises(ValueError, match=r"data\.division must be a function of a preset, as ':FUNCTION', got 'even'"):
        config.with_fields(presets[0], {"data.division": "even"})


def test_a_client_that_keeps_its_labels_is_in_no_run_that_sends_them(tmp_path, caplog):
    options = ClientOptions(client_id=0, state=str(tmp_path), keep_labels=True)
    cfg = config.Config(model=config.ModelConfig("mlp"), clients=2)
    with pytest.raises(ValueError, match=r"keep_labels must be False in a run that sends labels to the server, got Tr"):
        ClientProgram(options)._load(cfg)
    with caplog.at_level("INFO", "msjax"):
        ClientProgram(options)._load(dataclasses.replace(cfg, mode=config.ModeConfig(tail_cut="last")))
        ClientProgram(dataclasses.replace(options, keep_labels=False))._load(cfg)
    assert "tail_cut 'last': features float32" in caplog.text and "labels stay here" in caplog.text
    assert "MaskEncoded" in caplog.text and "labels go to the server, too" in caplog.text


def test_of_a_clients_preset_only_model_data_and_task_count_and_it_is_told(caplog):
    preset = config.Config(clients=5, codec=compress.TopK(0.5), data=config.DataConfig(name="breast_cancer"))
    options = ClientOptions(client_id=0)
    with caplog.at_level("INFO"):
        cfg = own_config(config.Config(), preset, options)
    assert (cfg.data.name, cfg.clients, cfg.codec) == ("breast_cancer", config.Config.clients, config.Config.codec)
    assert "the run is the server's, which differs in codec, clients" in caplog.text
    files = config.Config(data=config.DataConfig(name="scans.npz"), model=config.ModelConfig(weights="theirs.npz"))
    given = ClientOptions(client_id=0, data_dir="/hospital", weights="ours.npz")
    cfg = own_config(config.Config(), files, given)  # where they are on this machine, as without a preset
    assert (cfg.data.name, cfg.model.weights) == ("/hospital/scans.npz", "ours.npz")
    cfg = own_config(dataclasses.replace(config.Config(), model=config.ModelConfig(weights="w.npz")), preset, given)
    assert cfg.model.weights == "ours.npz"  # as where the server's command line names them
    nested = config.Config(data=config.DataConfig(name="/company/scans.npz"))
    assert own_config(config.Config(), nested, given).data.name == "/hospital/scans.npz"
    functions = config.Config(data=config.DataConfig(name="mine.py:make_data"))
    with pytest.raises(ValueError, match=r"data_dir must be None where data\.name is a function of .*, got '/hosp"):
        own_config(config.Config(), functions, given)
    sets = config.Config(data=config.DataConfig(test_share=0.5))
    with pytest.raises(ValueError, match=r"data\.test_share must be the same .* got 0\.5 there and 0\.2 in the preset"):
        own_config(sets, preset, options)
