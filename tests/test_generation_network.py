"""Texts with the server's part behind gRPC: those of one program, and no more memory than the server gives."""

import contextlib
import dataclasses
import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, compress, config, models, pair, parts, wire
from msjax.cli import main as command_line
from msjax.distributed import generation, inference
from msjax.distributed.fair_share import FairShare
from msjax.distributed.generation import Limits, RemoteSession
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions, PartOptions
from msjax.distributed.remote import RemoteServer
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.security import Tokens
from msjax.distributed.rpc.server import Endpoint
from msjax.generation import Generator
from msjax.session import Piece, Terms
from msjax.split.trees import TreeSpec

from . import decoders

CODEC = compress.MaskEncoded(ratio=0.9, bits=4, signed=True)
PROMPT = [1, 5, 9, 3]
NEW = 5
TOKENS = TreeSpec.of(jax.ShapeDtypeStruct((12,), np.int32))
SUMMARY = build.DataSummary(TOKENS, TOKENS)
CONFIG = config.Config(
    model=config.ModelConfig(
        name="decoder",
        cut="1",
        decoder=json.dumps(models.DecoderConfig.from_json(decoders.CONFIGS["llama 3"]).to_json()),
    ),
    task=config.TaskConfig(name="next_token"),
    codec=CODEC,
)


def make(path, cfg=CONFIG):
    """The parts of a decoder, as files under `path`, too."""
    made = build.make_parts(cfg, SUMMARY)
    larger = lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf  # noqa: E731  so that tokens differ
    client, server, *tail = (part._replace(params=jax.tree.map(larger, part.params)) for part in made)
    mine = client._replace(params=client.params | (tail[0].params if tail else {}))
    for name, part in (("client", mine), ("server", server)):
        parts.save_trained(path / f"{name}.safetensors", name, part, cfg, SUMMARY, run_id="r", step=7)
    return client, server, *tail


@contextlib.contextmanager
def served(path, metrics=None, texts=None):
    """Serves the part, and gives the functions that connect to it."""
    metrics, options = metrics or Metrics(), ListenOptions(listen="localhost:0")
    servicer = inference.InferenceServicer(
        parts.load_part(path / "server.safetensors"), Tokens(None), metrics, texts=texts
    )
    endpoint = Endpoint(options, metrics, streams=8)
    endpoint.start(servicer)
    remote = RemoteServer(str(endpoint.address))
    try:
        yield remote
    finally:
        remote.close()
        endpoint.close()


def value(metrics, name):
    return metrics.registry.get_sample_value(f"msjax_{name}")


@pytest.mark.parametrize(
    ("tail_cut", "rule", "compression"),
    [
        (None, models.Sampling(), None),
        (None, models.Sampling(1.0, top_k=3), "huffman"),
        pytest.param(None, models.Sampling(1.0), None, marks=pytest.mark.slow),
        ("last", models.Sampling(1.0), None),
        pytest.param("2", models.Sampling(), "huffman", marks=pytest.mark.slow),
    ],
)
def test_tokens_and_bytes_are_those_of_one_program(tail_cut, rule, compression, tmp_path):
    cfg = dataclasses.replace(CONFIG, mode=config.ModeConfig(tail_cut=tail_cut))
    client, server, *tail = make(tmp_path, cfg)
    options = {"codec": CODEC, "compression": compression}
    start = {"max_tokens": NEW, "sampling": rule, "seed": 2, "end": ()}
    here = Generator(client, server, *tail, **options).start([PROMPT], **start)
    list(here)
    metrics = Metrics()
    with served(tmp_path, metrics) as remote:
        there = Generator(client, server, *tail, **options, connect=remote.begin).start([PROMPT], **start)
        list(there)
        assert there.tokens == here.tokens and len(set(here.tokens[0])) > 1
        assert there.traffic == here.traffic
        assert there.session.serialized_bytes == sum(metrics.totals().values())
        sent = there.traffic
        messages = sent.prompt_up_bytes + sent.prompt_down_bytes + sent.up_bytes + sent.down_bytes
        assert messages < there.session.serialized_bytes < messages + 10 * 2 * NEW + 100
    assert value(metrics, "requests_total") == NEW and value(metrics, "evicted_sessions_total") == 0


def test_who_is_idle_makes_room_and_is_told(tmp_path):
    client, server = make(tmp_path)
    metrics = Metrics()
    with served(tmp_path, metrics, Limits(sessions=2)) as remote:
        generator = Generator(client, server, codec=CODEC, connect=remote.begin)
        first, second, third = (generator.start([PROMPT], max_tokens=NEW, end=()) for _ in range(3))
        next(first), next(second)
        next(first)
        assert value(metrics, "sessions") == 2
        next(third)  # the second is the one that was idle
        with pytest.raises(ValueError, match="the text was ended, as others needed its room on the server"):
            next(second)
        list(first), list(third)
        assert first.tokens == third.tokens and len(first.tokens[0]) == NEW
        assert value(metrics, "evicted_sessions_total") == 1
        remote._run = "s"
        with pytest.raises(ValueError, match=r"the server now has a part of another run, '.*', got 's' before"):
            next(generator.start([PROMPT], max_tokens=NEW, end=()))


def test_who_does_not_read_keeps_no_cache(tmp_path, monkeypatch):
    """Its stream waits where the answer is handed over, and does not hear of its end."""
    made, kept = generation.ServerSession, []

    def make_session(*args, **options):
        session = made(*args, **options)
        kept.append(weakref.ref(session))
        return session

    make_session.cache_bytes = made.cache_bytes
    monkeypatch.setattr(generation, "ServerSession", make_session)
    make(tmp_path)
    texts = generation.Texts(parts.load_part(tmp_path / "server.safetensors"), Metrics(), Limits(sessions=1))
    h = jnp.ones((1, 2, 16))
    features = wire.encode_bare(CODEC.encode(h), CODEC, h)
    request = pb.NextTokens(begin=pb.Begin(capacity=16, codec=repr(CODEC), candidates=1), count=2, features=features)
    unread, other = (texts.answers(iter([request, request])) for _ in range(2))
    next(unread)
    assert kept[0]() is not None
    next(other)
    assert kept[0]() is None and kept[1]() is not None
    with pytest.raises(generation.Evicted):
        next(unread)


def test_what_is_kept_is_bounded():
    ended = []
    share = FairShare(3, most_bytes=100)
    opened = {}
    for name, size in (("a", 40), ("b", 40), ("c", 20)):
        opened[name], count = share.open(lambda name=name: ended.append(name), nbytes=size)
        assert count == 0
    share.use(opened["a"])
    assert share.open(lambda: None, nbytes=50)[1] == 2 and ended == ["b", "c"]
    share.use(opened["b"])  # is no more
    share.close(opened["b"])
    assert len(share) == 2
    share.close(opened["a"])
    assert len(share) == 1


def test_who_has_most_makes_room():
    """A caller with many texts loses its own, first in their number and then in their bytes, never another's one."""
    ended = []
    share = FairShare(3, most_bytes=100)

    def begin(caller, name, size):
        share.open(lambda: ended.append(name), caller, size)

    begin("few", "only", 10)
    for name in ("first", "second", "third", "fourth"):
        begin("many", name, 20)
    assert ended == ["first", "second"]
    begin("large", "huge", 90)  # of two callers "many" has more texts, then more bytes
    assert ended == ["first", "second", "third", "fourth"]
    begin("large", "another", 20)
    assert ended[4:] == ["huge"] and len(share) == 2


def test_messages_that_do_not_fit(tmp_path):
    make(tmp_path)
    h = jnp.ones((1, 2, 16))
    features = wire.encode_bare(CODEC.encode(h), CODEC, h)
    begin = {"capacity": 16, "codec": repr(CODEC), "candidates": 1}

    def message(count=2, features=features, **changes):
        return pb.NextTokens(begin=pb.Begin(**begin | changes), count=count, features=features)

    cases = [
        ([pb.NextTokens(count=2, features=features)], "begin must be in the first message of a text"),
        ([message(capacity=65)], r"capacity must be in 1\.\.64 \(max_position_embeddings\), got 65"),
        ([message(codec="open('x')")], "the codec's text must be as `repr` gives it"),
        ([message(codec="TopK(ratio=7)")], "unknown codec"),
        ([message(codec="Exact()")], "checksum is wrong|takes no"),
        ([message(compression="zip")], "compression must be huffman, all or empty, got 'zip'"),
        ([message(count=17)], r"tokens of a piece must be in 1\.\.16, got 17"),
        ([message(features=b"nonsense")], "checksum is wrong"),
        (
            [message()] + [pb.NextTokens(count=2, features=features)] * 8,
            "tokens must be at most 0, as the cache has room",
        ),
    ]
    metrics = Metrics()
    with served(tmp_path, metrics) as remote:
        for messages, refusal in cases:
            answers = remote._stub.Generate(iter(messages))
            with pytest.raises(ValueError, match=refusal):
                remote._call(lambda answers=answers: list(answers))
        assert value(metrics, "sessions") == 0
        with pytest.raises(ValueError, match="prompts must be one where the server is elsewhere, got 2"):
            remote.begin(Terms(2, 16, CODEC, 1))
    assert value(metrics, "refused_clients_total") == len(cases)
    with served(tmp_path, texts=Limits(cache_bytes=100)) as remote:
        answers = remote._stub.Generate(iter([message()]))
        with pytest.raises(ValueError, match="capacity must need at most 100 bytes of cache, got 2052"):
            remote._call(lambda: list(answers))


def test_options_that_cannot_be():
    for name, most in (("max_sessions", 65), ("max_cache_megabytes", 0)):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            PartOptions(**{name: most}).check()


# -- The command. -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of letters, as many as the decoder has tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'msjax[lm]'")
    vocabulary = {"?": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate("abcdefghijklmnop", 3)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_the_command_prints_text_and_bytes(tmp_path, tokenizer, capfd):
    client, server = make(tmp_path)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    options = ["--prompt", "cab", "--max-tokens", "4", "--tokenizer", tokenizer]
    assert command_line.run("generate", [*files, *options]) == 0
    here = capfd.readouterr()
    generation = Generator(client, server, codec=CODEC).start([[1, 5, 3, 4]], max_tokens=4)
    list(generation)
    (tokens,) = generation.tokens
    letters = ["?", "", "", *"abcdefghijklmnop"]
    assert here.out == "cab" + "".join(letters[token] for token in tokens) + "\n"
    sent = generation.traffic
    assert f"{len(tokens)} tokens behind a prompt of 4: the first after" in here.err
    assert f"prompt: {sent.prompt_up_bytes} up, {sent.prompt_down_bytes} down" in here.err
    assert f"all: {sent.prompt_up_bytes + sent.up_bytes} of features" in here.err
    with served(tmp_path) as remote:
        assert command_line.run("generate", [files[0], "--server", remote._address, *options]) == 0
    there = capfd.readouterr()
    assert there.out == here.out and "as serialized for the network" in there.err
    folder = tmp_path / "published"
    models.save_decoder(folder, models.decoder(models.part_config(client), length=12), client.params | server.params)
    for more in ([], ["--cut", "1"], ["--cut", "1", "--tail-cut", "last", "--codec", "Cast()", "--dtype", "bfloat16"]):
        assert command_line.run("generate", [str(folder), *options, *more]) == 0
        got = capfd.readouterr()
        assert got.out.startswith("cab") and ("bytes as messages" in got.err) == bool(more)
    file = pathlib.Path(tokenizer) / "tokenizer.json"
    file.write_text(file.read_text().replace('"?":0', '"other":0').replace('"?": 0', '"other": 0'))
    assert command_line.run("generate", [str(folder), "--prompt", "caz", "--tokenizer", tokenizer]) == 2
    assert "msjax generate: --tokenizer must be able to split every text, but: " in capfd.readouterr().err
    (folder / "model.safetensors").unlink()
    assert command_line.run("generate", [str(folder), *options]) == 2
    assert "published must have model.safetensors or model.safetensors.index.json" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--prompt", ""], "prompt must be a text, got ''"),
        (["--max-tokens", "61"], "--max-tokens must be in 1..60, since of a context of 64 tokens"),
        (["--prompt", "a" * 63], r"prompt must have 1..63 tokens, as the context has room for 64"),
        (["--tokenizer", "nowhere"], "tokenizer must be a tokenizer.json, or a folder that has one, got 'nowhere'"),
        (["--cut", "2"], "--cut must not be given for a trained network, which has its own, got '2'"),
        (["--codec", "TopK(ratio=2)"], "codec: ratio must be"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0"),
        (["--server", "localhost:1"], "network must be CLIENT.safetensors with --server"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(changes, message, tmp_path, tokenizer, capsys):
    make(tmp_path)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    given = {"--prompt": "cab", "--tokenizer": tokenizer} | dict(zip(changes[::2], changes[1::2], strict=True))
    arguments = [word for option in given.items() for word in option]
    assert command_line.run("generate", [*files, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("msjax generate: ") and message in err and len(err.splitlines()) == 1


def test_any_token_that_ends_a_text_beside_the_tokenizer_ends_it(tmp_path, tokenizer, capfd):
    client, server = make(tmp_path)
    generation = Generator(client, server, codec=CODEC).start([[1, 5, 3, 4]], max_tokens=8, end=())
    list(generation)
    (tokens,) = generation.tokens
    absent = next(token for token in range(19) if token not in tokens)
    other = next(token for token in tokens if token != tokens[0])
    folder = pathlib.Path(tokenizer)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokens[0]}))
    assert models.end_tokens(folder) == (tokens[0],)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [absent, other]}))
    assert models.end_tokens(folder) == (absent, other)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    assert command_line.run("generate", [*files, "--prompt", "cab", "--max-tokens", "8", "--tokenizer", tokenizer]) == 0
    assert f"{tokens.index(other) + 1} tokens behind a prompt of 4" in capfd.readouterr().err
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="eos_token_id must be a token or a list of tokens in "):
        models.end_tokens(folder)


def test_other_networks_are_refused(tmp_path, capsys):
    images = build.DataSummary(
        TreeSpec.of(jax.ShapeDtypeStruct((8, 8, 1), np.uint8)), TreeSpec.of(jax.ShapeDtypeStruct((), np.int32)), 10
    )
    client, server = build.make_parts(cfg := config.Config(), images)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    for name, part in (("client", client), ("server", server)):
        parts.save_trained(tmp_path / f"{name}.safetensors", name, part, cfg, images, run_id="r", step=7)
    assert command_line.run("generate", [*files, "--prompt", "x"]) == 2
    assert "network must be one with model.name='decoder', got 'convnet'" in capsys.readouterr().err
    with served(tmp_path) as remote, pytest.raises(ValueError, match=r"must be of a decoder .*, got one of 'convnet'"):
        remote._call(lambda: list(remote._stub.Generate(iter([pb.NextTokens()]))))


def test_a_pairs_parts_are_those_that_were_trained(tmp_path):
    made = make(tmp_path, dataclasses.replace(CONFIG, mode=config.ModeConfig(tail_cut="last")))
    found = pair.load_pair(*(tmp_path / f"{name}.safetensors" for name in ("client", "server")))
    for got, want in zip(pair.model_parts(found.client, found.server), made, strict=True):
        assert got.apply == want.apply
        jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_a_text_whose_connection_is_lost_is_to_be_begun_again():
    answers = iter([pb.Outputs(payload=[b"x"])])

    def call(function):
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("localhost:1: the server is stopping") from None

    session = RemoteSession(lambda requests: iter(()), call, Terms(1, 16, CODEC, None, None))
    assert session.answer([Piece(4, b"features")]) == [b"x"]
    with pytest.raises(ConnectionError, match="the server is stopping; with the connection the text has ended"):
        session.answer([Piece(1, b"features")])
    with pytest.raises(ConnectionError, match=r"^localhost:1: the server is stopping$"):  # before there is a text
        RemoteSession(lambda requests: iter(()), call, Terms(1, 16, CODEC, None, None)).answer([Piece(4, b"features")])


@pytest.mark.parametrize("tail_cut", [None, "last"])
def test_texts_of_any_length_are_predicted(tmp_path, tail_cut):
    """Up to the run's own; the features of each are compressed as long as they are."""
    make(tmp_path, dataclasses.replace(CONFIG, mode=config.ModeConfig(tail_cut=tail_cut)))
    here = pair.load_pair(*(tmp_path / f"{name}.safetensors" for name in ("client", "server")))
    longest = here.summary.input_shape[0]
    tokens = np.random.default_rng(0).integers(0, 32, (2, longest), dtype=np.int32)
    with served(tmp_path) as remote:
        there = here._replace(server=remote)
        for length in (longest, 3, 1):
            wanted, found = (
                pair.predict(pair.of_length(one, length), tokens[:, :length], batch_size=2) for one in (here, there)
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"features must be float32\[batch, 1 to 12, \d+\], got float32\[1, 13, "):
            pair.predict(pair.of_length(there, longest + 1), np.zeros((1, longest + 1), np.int32))
