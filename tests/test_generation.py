"""Text from decoders in parts: the same as from the whole, whatever the cut; every byte counted."""

import functools
import json
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import compress, models, wire
from msjax.generation import Generator
from msjax.session import Piece, ServerSession, Terms

from . import decoders, language

GOLDEN = json.loads(decoders.GOLDEN.read_text())["cases"]
STORIES = pathlib.Path(os.environ.get("MSJAX_TEST_DATA", "no_such_folder")) / "models" / "stories260k"
PROMPTS = [[1, 5, 9], [1, 3, 4, 8, 8, 2, 7]]
NEW = 6
CODEC = compress.MaskEncoded(ratio=0.9, bits=4, signed=True)


def model(case="llama 3"):
    return models.decoder(models.DecoderConfig.from_json(decoders.CONFIGS[case]), length=13)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return language.weights_of(tmp_path_factory, model)


def parts_of(weights, case, *cuts):
    """The whole, or the parts that it is cut into."""
    if not cuts:
        return (weights(case),)
    return models.split(model(case), cuts[0], tail_cut=cuts[1] if len(cuts) > 1 else None, weights=weights(case))


def tokens_of(generator, prompts=PROMPTS, **options):
    generation = generator.start(prompts, **{"max_tokens": NEW, "end": ()} | options)
    steps = list(generation)
    for row, own in enumerate(generation.tokens):
        assert own == [step[row] for step in steps if step[row] is not None]
    return generation.tokens, generation.traffic


def test_a_scale_for_each_channel_of_one_token_is_warned_of(weights, caplog):
    codec = compress.Uniform(bits=4, granularity="channel")
    Generator(*parts_of(weights, "llama 3", 1), codec=codec)
    assert "sends a scale for each value behind the prompt" in caplog.text
    caplog.clear()
    Generator(*parts_of(weights, "llama 3", 1), codec=CODEC)
    assert not caplog.text


@functools.partial(jax.jit, static_argnums=0)
def logits_of(apply, params, x):
    return apply(params, {}, x, train=False)[0]


@functools.cache
def greedy(read, case):
    """The most probable continuations, by the whole model without a cache."""
    whole, found = read(case), []
    for prompt in PROMPTS:
        tokens = np.zeros((1, 13), np.int32)
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + NEW):
            tokens[0, at] = logits_of(whole.apply, whole.params, tokens)[0, at - 1].argmax()
        found.append(tokens[0, len(prompt) : len(prompt) + NEW].tolist())
    assert len(set(map(tuple, found))) == 2 and max(len(set(own)) for own in found) > 1
    return found


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        ("llama 3", ()),
        ("llama 3", (1,)),
        ("llama 3", (1, 2)),
        ("llama 3", (1, "last")),
        ("llama 3", (0,)),
        ("llama 3", (3,)),
        ("qwen 2.5", (1,)),
        ("qwen 3", (2,)),
    ],
    ids=repr,
)
def test_greedy_is_that_of_the_whole(case, cuts, weights):
    generator = Generator(*parts_of(weights, case, *cuts))
    found, traffic = tokens_of(generator)
    assert found == greedy(weights, case)
    assert (traffic.prompt_tokens, traffic.tokens) == (10, 2 * NEW)
    assert (traffic.up_bytes > 0) == bool(cuts)
    alone = [tokens_of(generator, [prompt])[0][0] for prompt in PROMPTS]
    assert alone == found


@pytest.mark.parametrize(
    ("cuts", "sent", "returned"), [((1,), 7, None), ((3,), 1, None), ((1, 2), 7, 7), ((1, "last"), 7, 1)], ids=repr
)
def test_what_nothing_attends_to_is_not_sent(cuts, sent, returned, weights):
    generator = Generator(*parts_of(weights, "llama 3", *cuts), codec=CODEC)
    _, traffic = tokens_of(generator, PROMPTS[1:])

    def message(tokens):
        return CODEC.payload_bytes(jax.ShapeDtypeStruct((1, tokens, 16), np.float32)) + 4 + 3

    assert traffic.prompt_up_bytes == message(sent) and traffic.up_bytes == (NEW - 1) * message(1)
    token = 4 + 4 + 1
    assert traffic.prompt_down_bytes == (token if returned is None else message(returned))
    assert traffic.down_bytes == (NEW - 1) * (token if returned is None else message(1))


@pytest.mark.parametrize("candidates, answer", [({}, 5 + 4 * 19), ({"top_k": 3}, 2 * (5 + 4 * 3))], ids=repr)
def test_what_is_drawn_depends_on_the_seed_and_not_on_the_cut(candidates, answer, weights):
    rule = models.Sampling(2.0, **candidates)
    found, traffic = tokens_of(Generator(*parts_of(weights, "llama 3", 1)), PROMPTS[:1], sampling=rule, seed=3)
    whole = Generator(*parts_of(weights, "llama 3"))
    assert tokens_of(whole, PROMPTS[:1], sampling=rule, seed=3)[0] == found
    assert any(tokens_of(whole, PROMPTS[:1], sampling=rule, seed=seed)[0] != found for seed in (4, 5, 6))
    assert traffic.prompt_down_bytes == answer and traffic.down_bytes == (NEW - 1) * answer


CODECS = [
    CODEC,
    compress.MaskEncoded(granularity="sample"),
    compress.MaskEncoded(ratio=0.9, granularity="token"),
    compress.Uniform(bits=8),
    compress.Cast(),
    compress.TopK(ratio=0.5),
    compress.RandTopK(ratio=0.5),
    compress.RandK(ratio=0.5),
    compress.StochasticUniform(bits=8),
    compress.Quantile(bits=4),
    compress.SmallFloat(),
    compress.EntropyMask(),
]


@pytest.mark.parametrize(
    "codec", [pytest.param(c, marks=[pytest.mark.slow] if c != CODEC else []) for c in CODECS], ids=repr
)
def test_codecs_see_the_prompt_and_then_token_after_token(codec, weights):
    """Beside the parts without a cache, whose features are encoded as they come."""
    client, server, tail = parts = parts_of(weights, "llama 3", 1, "last")
    found, _ = tokens_of(Generator(*parts, codec=codec), PROMPTS[:1])
    assert tokens_of(Generator(*parts, codec=codec), PROMPTS[:1])[0] == found
    if codec.at_inference().needs_key:
        return
    tokens, up, codec = PROMPTS[0], [], codec.at_inference()
    for own in found[0]:
        padded = np.zeros((1, 13), np.int32)
        padded[0, : len(tokens)] = tokens
        new = 1 if up else len(tokens)
        h = logits_of(client.apply, client.params, padded)[:, len(tokens) - new : len(tokens)]
        up.append(codec.roundtrip(h))
        h = jnp.concatenate(up, 1)
        h = logits_of(server.apply, server.params, jnp.pad(h, ((0, 0), (0, 13 - h.shape[1]), (0, 0))))
        h = h[:, len(tokens) - 1 : len(tokens)]
        logits = logits_of(tail.apply, tail.params, codec.roundtrip(h))
        assert logits.argmax() == own
        tokens = [*tokens, own]


def test_a_text_ends_with_its_token(weights):
    generator = Generator(*parts_of(weights, "llama 3"))
    expected = greedy(weights, "llama 3")
    end = expected[0][1]
    cut_short = [own[: own.index(end) + 1] if end in own else own for own in expected]
    assert len(cut_short[0]) < NEW
    assert tokens_of(generator, end=(end,))[0] == cut_short
    assert tokens_of(generator, PROMPTS[:1], end=(end,))[0] == cut_short[:1]
    eos = tokens_of(generator, end=None)[0]
    first = [next((at for at, token in enumerate(own) if token in (1, 2)), NEW) for own in expected]
    assert eos == [own[: at + 1] for own, at in zip(expected, first, strict=True)]


@pytest.mark.usefixtures("unchecked")
def test_values_of_other_types(weights):
    """NumPy's and JAX's numbers are numbers; all else is named."""
    generator = Generator(*parts_of(weights, "llama 3", 1))
    expected = tokens_of(generator, [[3, 1]], max_tokens=2)[0]
    for prompts in ([jnp.array([3, 1])], np.array([[3, 1]])):
        assert tokens_of(generator, prompts, max_tokens=np.int64(2))[0] == expected
    for options, message in [
        ({"prompts": [1, 2]}, r"prompts must be a sequence of integers for each text, got \[1, 2\]"),
        ({"end": 5}, "end must be a sequence of integers, got"),
        ({"sampling": 0.8}, "sampling must be a Sampling or None, got 0.8"),
    ]:
        with pytest.raises(TypeError, match=message):
            generator.start(**{"prompts": PROMPTS, "max_tokens": 2} | options)
    with pytest.raises(ValueError, match=r"end's tokens must be an integer in 0\.\.18, got 19"):
        generator.start(PROMPTS, max_tokens=2, end=[19])
    parts = parts_of(weights, "llama 3", 1)
    with pytest.raises(TypeError, match=r"codec must be a codec or None, got 'TopK\(0.9\)'"):
        Generator(*parts, codec="TopK(0.9)")
    with pytest.raises(ValueError, match=r'compression must be None, "huffman" or "all", got \'zip\''):
        Generator(*parts, compression="zip")


def test_nothing_comes_after_a_generation_is_closed(weights):
    generation = Generator(*parts_of(weights, "llama 3", 1)).start(PROMPTS[:1], max_tokens=3)
    next(generation)
    generation.close()
    assert list(generation) == [] and len(generation.tokens[0]) == 1


def test_prompts_that_cannot_be_are_refused(weights):
    generator = Generator(*parts_of(weights, "llama 3", 1))
    for prompts, message in [
        ([], "prompts must have a prompt, got none"),
        ([[]], r"prompt must have 1\.\.63 tokens, as the context has room for 64 \(max_position_embeddings\), got 0"),
        ([[1] * 64], r"prompt must have 1\.\.63 tokens, .*, got 64"),
        ([[1, 19]], r"prompt's tokens must be an integer in 0\.\.18, got 19"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator.start(prompts, max_tokens=1)
    for wrong in (0, 62, 1.0):
        with pytest.raises(ValueError, match=r"max_tokens must be in 1\.\.61, since of a context of 64 tokens"):
            generator.start(PROMPTS[:1], max_tokens=wrong)
    assert len(tokens_of(generator, PROMPTS[:1], max_tokens=61)[0][0]) == 61
    assert generator.room(PROMPTS[:1]) == 61


def test_parts_that_cannot_be_are_refused(weights):
    client, server = parts_of(weights, "llama 3", 1)
    with pytest.raises(ValueError, match=r"parts must have layers 0\.\.4 of one decoder, got \[2, 3, 4, 0, 1\]"):
        Generator(server, client)
    with pytest.raises(ValueError, match="codec must be None without a server, got MaskEncoded"):
        Generator(weights("llama 3"), codec=CODEC)
    with pytest.raises(ValueError, match="tail must be None without a server, got ModelPart"):
        Generator(client, tail=server)


def test_a_server_refuses_what_does_not_fit(weights):
    _, server = parts_of(weights, "llama 3", 1)
    terms = Terms(1, 16, CODEC, 1)

    def piece(count, length):
        h = jnp.ones((1, length, 16))
        return [Piece(count, wire.encode_bare(CODEC.encode(h), CODEC, h))]

    for pieces, message in [
        ([], "pieces must be 1, one for each text, got 0"),
        (piece(17, 17), r"tokens of a piece must be in 1\.\.16, got 17"),
        (piece(0, 1), r"tokens of a piece must be in 1\.\.16, got 0"),
        (piece(3, 2), "checksum is wrong"),
        ([Piece(1, b"")], "the message ends"),
    ]:
        with pytest.raises(wire.WireError, match=message):
            ServerSession(server, terms).answer(pieces)
    session = ServerSession(server, terms)
    session.answer(piece(15, 15))
    with pytest.raises(wire.WireError, match="tokens must be at most 1, as the cache has room for, got 2"):
        session.answer(piece(2, 2))


# -- Beside transformers. ---------------------------------------------------------------------------------------------


def transformers_greedy(folder, tokens, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'msjax[bench]'")
        library = pytest.importorskip("transformers", reason="needs transformers: pip install 'msjax[bench]'")
        found = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        return found.generate(torch.tensor([tokens]), **options)[0, len(tokens) :].tolist()


@pytest.mark.skipif(not STORIES.is_dir(), reason="MSJAX_TEST_DATA names no folder with models/stories260k")
@pytest.mark.parametrize("cut", [None, 0, 2, 5])
def test_published_weights_continue_as_with_transformers(cut):
    prompt = [1, 403, 407, 261, 378]  # once upon a time
    expected = transformers_greedy(STORIES, prompt, 200)
    network = models.decoder(models.DecoderConfig.load(STORIES), length=256)
    whole = models.load_weights(STORIES, network)
    parts = (whole,) if cut is None else models.split(network, cut, weights=whole)
    assert tokens_of(Generator(*parts), [prompt], max_tokens=200)[0] == [expected]
