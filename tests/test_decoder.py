"""Decoders: logits of transformers, cuts, tied layers, files of Hugging Face's layout, and what cannot be read."""

import dataclasses
import functools
import json
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from msjax import models
from msjax.models._decoder import causal_attention

from . import decoders

DATA = pathlib.Path(os.environ.get("MSJAX_TEST_DATA", "no_such_folder"))
STORIES = DATA / "models" / "stories260k"
CASES = tuple(decoders.CONFIGS)
GOLDEN = json.loads(decoders.GOLDEN.read_text())["cases"]


def config(case="llama 3"):
    return models.DecoderConfig.from_json(decoders.CONFIGS[case])


def model(case="llama 3", **options):
    return models.decoder(config(case), **({"length": decoders.TOKENS.shape[1]} | options))


def tensors(case="llama 3"):
    return decoders.tensors(GOLDEN[case]["shapes"])


def write(folder, case="llama 3", found=None):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors(case) if found is None else found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(decoders.CONFIGS[case]))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each case."""
    return {case: write(tmp_path_factory.mktemp("decoder"), case) for case in CASES}


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(apply, params, x, train=False):
    return apply(params, {}, x, train=train)[0]


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_that_transformers_computed(case, folders):
    whole = models.load_weights(folders[case], model(case))
    got = run(whole.apply, whole.params, decoders.TOKENS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, GOLDEN[case]["logits"], rtol=0, atol=1e-5)


def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason="needs PyTorch: pip install 'msjax[bench]'")
        return pytest.importorskip("transformers", reason="needs transformers: pip install 'msjax[bench]'")


def published_logits(folder, tokens):
    """What transformers computes with a folder."""
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return found(torch.from_numpy(np.asarray(tokens)).long()).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_is_written_and_we_what_it_writes(case, tmp_path):
    library = transformers()
    options = {name: value for name, value in decoders.CONFIGS[case].items() if name != "model_type"}
    described = library.AutoConfig.for_model(config(case).model_type, **options, initializer_range=0.3)
    library.AutoModelForCausalLM.from_config(described).save_pretrained(tmp_path / "theirs")
    assert models.DecoderConfig.load(tmp_path / "theirs") == config(case)
    whole = models.load_weights(tmp_path / "theirs", model(case))
    got = run(whole.apply, whole.params, decoders.TOKENS)
    np.testing.assert_allclose(got, published_logits(tmp_path / "theirs", decoders.TOKENS), rtol=0, atol=1e-4)
    models.save_weights(tmp_path / "ours", model(case), whole.params, {})
    assert models.DecoderConfig.load(tmp_path / "ours") == config(case)
    np.testing.assert_allclose(got, published_logits(tmp_path / "ours", decoders.TOKENS), rtol=0, atol=1e-4)


@pytest.mark.skipif(not STORIES.is_dir(), reason="MSJAX_TEST_DATA names no folder with models/stories260k")
def test_published_weights_compute_the_logits_of_transformers():
    transformers()
    network = models.decoder(models.DecoderConfig.load(STORIES), length=64)
    whole = models.load_weights(STORIES, network)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 64)).astype(np.int32)
    got = run(whole.apply, whole.params, tokens)
    np.testing.assert_allclose(got, published_logits(STORIES, tokens), rtol=0, atol=1e-4)


@pytest.mark.skipif(not STORIES.is_dir(), reason="MSJAX_TEST_DATA names no folder with models/stories260k")
def test_the_greedy_continuation_is_the_published_one():
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'msjax[lm]'")
    tokenizer = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    network = models.decoder(models.DecoderConfig.load(STORIES), length=64)
    client, server = models.split(network, "medium", weights=models.load_weights(STORIES, network))
    start = [1, *tokenizer.encode("Once upon a time", add_special_tokens=False).ids]
    tokens = np.zeros((1, 64), np.int32)  # what is behind the last token does not count
    tokens[0, : len(start)] = start
    for at in range(len(start), 64):
        logits = run(server.apply, server.params, run(client.apply, client.params, tokens))
        tokens[0, at] = logits[0, at - 1].argmax()
    text = tokenizer.decode(tokens[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball."
    )


# -- The cut. ----------------------------------------------------------------------------------------------------------


def test_cuts_are_behind_the_embedding_and_each_block():
    found = [(cut.layer, cut.name, cut.block, cut.shape, cut.dtype) for cut in models.list_cuts(model())]
    blocks = ["embedding", "decoder1", "decoder2", "decoder3"]
    names = ["shallow", "medium", "deep", None]
    assert found == [(i, names[i], blocks[i], (13, 16), jnp.float32) for i in range(4)]


@pytest.mark.parametrize("case", ["llama 3", "qwen 3"])  # tied, and not
@pytest.mark.parametrize(("cut", "tail_cut"), [(0, None), (2, None), (3, None), (0, "last"), (1, 2)])
def test_parts_compute_what_the_whole_does(case, cut, tail_cut):
    network = model(case)
    whole = models.whole(network, seed=3)
    x = want = decoders.TOKENS
    want = run(whole.apply, whole.params, want)
    for weights in (None, whole):
        x = decoders.TOKENS
        for part in models.split(network, cut, tail_cut=tail_cut, seed=3, weights=weights):
            x = run(part.apply, part.params, x)
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-6)


def test_a_tied_output_layer_becomes_its_own_behind_a_cut():
    network = model("llama 3")
    whole = models.whole(network, seed=1)
    assert set(whole.params["head"]) == {"norm"}
    client, server = models.split(network, 1, weights=whole)
    table = whole.params["embedding"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(server.params["head"]["lm_head"]["kernel"], table.T)

    def loss(params, apply):
        return (apply(params, {}, jnp.asarray(decoders.TOKENS), train=True)[0] ** 2).sum()

    @jax.jit
    def gradients(tied, client_params, server_params):
        def parts(client_params, server_params):
            h, _ = client.apply(client_params, {}, jnp.asarray(decoders.TOKENS), train=True)
            return (server.apply(server_params, {}, h, train=True)[0] ** 2).sum()

        return jax.grad(loss)(tied, whole.apply), jax.grad(parts, (0, 1))(client_params, server_params)

    together, (at_client, at_server) = gradients(whole.params, client.params, server.params)
    embedding = at_client["embedding"]["embed_tokens"]["embedding"]
    output = at_server["head"]["lm_head"]["kernel"].T
    assert jnp.abs(embedding).max() > 0 and jnp.abs(output).max() > 0
    want = together["embedding"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(embedding + output, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


def test_what_a_cut_has_untied_is_written_untied(tmp_path):
    network = model("llama 3")
    client, server = models.split(network, 1, seed=2)
    server.params["head"]["lm_head"]["kernel"] *= 2
    params = client.params | server.params
    models.save_weights(tmp_path / "out", network, params, {})
    found = models.DecoderConfig.load(tmp_path / "out")
    assert not found.tie_word_embeddings and dataclasses.replace(found, tie_word_embeddings=True) == config("llama 3")
    again = models.load_weights(tmp_path / "out", models.decoder(found, length=13))
    assert_trees_equal(again.params, params)


@pytest.mark.parametrize("name", ["qwen 3", "transformer"])
def test_what_is_no_token_is_not_taken_for_one(name):
    network = (
        models.build(name, input_shape=(4,), num_classes=2, vocabulary=19) if name == "transformer" else model(name)
    )
    part = models.split(network, network.named_cuts[0][1])[0]
    x = jnp.full((3, *network.input_shape), 3, jnp.int32).at[:, 0].set(jnp.array([-1, -19, 19]))
    h, _ = part.apply(part.params, part.stats, x, train=False)
    assert np.isnan(h[:, 0]).all()


def test_a_token_sees_nothing_behind_it():
    network = model("qwen 3")
    whole = models.whole(network, seed=0)
    other = decoders.TOKENS.copy()
    other[:, 7:] = 3
    one, two = (np.asarray(run(whole.apply, whole.params, x)) for x in (decoders.TOKENS, other))
    np.testing.assert_allclose(one[:, :7], two[:, :7], rtol=0, atol=1e-6)
    assert np.abs(one[:, 7:] - two[:, 7:]).max() > 1e-3


def test_attention_in_blocks_is_attention():
    """40 tokens are two blocks of unlike sizes; two queries share a key."""
    draw = functools.partial(jax.random.normal, dtype=jnp.float32)
    q, k, v = (draw(jax.random.key(i), (2, 40, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(causal_attention(q, k, v), whole, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_what_is_computed_and_cut(folders):
    network = model("qwen 2.5", dtype="bfloat16")
    client, server = models.split(network, 1, weights=models.load_weights(folders["qwen 2.5"], network))
    h = run(client.apply, client.params, decoders.TOKENS)
    logits = run(server.apply, server.params, h)
    assert (h.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    want = np.asarray(GOLDEN["qwen 2.5"]["logits"])
    assert np.sqrt(np.square(logits - want).mean()) < 0.05 * want.std()


def test_rematerialisation_changes_no_gradient():
    whole, again = (models.whole(model(remat=remat), seed=0) for remat in (False, True))

    def gradient(part):
        def loss(params):
            return (part.apply(params, {}, jnp.asarray(decoders.TOKENS), train=True)[0] ** 2).sum()

        return jax.make_jaxpr(jax.grad(loss))(part.params), jax.jit(jax.grad(loss))(part.params)

    (plain, want), (twice, got) = gradient(whole), gradient(again)
    in_a_block = 8  # six layers, without the last, whose output no gradient needs, and two products of the attention
    assert str(twice).count(" dot_general[") >= str(plain).count(" dot_general[") + 3 * in_a_block
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


# -- Files. ------------------------------------------------------------------------------------------------------------


def test_shards_and_dtypes_come_back_as_they_were_written(tmp_path, folders):
    network = model("qwen 2.5")
    params = models.load_decoder(folders["qwen 2.5"], network, dtype=jnp.bfloat16).params
    (folders["qwen 2.5"] / "tokenizer.json").write_text("{}")
    models.save_decoder(tmp_path / "out", network, params, beside=folders["qwen 2.5"], shard_bytes=2000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(files) - set(shards) == {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert all(
        tensor.dtype == ml_dtypes.bfloat16
        for shard in shards
        for tensor in safetensors.numpy.load_file(tmp_path / "out" / shard).values()
    )
    again = models.load_weights(tmp_path / "out", network)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(again.params))
    assert_trees_equal(again.params, params)
    (tmp_path / "out" / shards[1]).unlink()
    with pytest.raises(ValueError, match=rf"index.json names; {shards[1]} is missing"):
        models.load_weights(tmp_path / "out", network)


def test_weights_are_read_when_a_part_is_made(folders, monkeypatch):
    read = []
    array = models._huggingface.Tensor.__array__
    monkeypatch.setattr(
        models._huggingface.Tensor,
        "__array__",
        lambda self, *a, **k: (read.append(self._name), array(self, *a, **k))[1],
    )
    network = model("llama 3")
    weights = models.open_decoder(folders["llama 3"], network)
    assert not read
    client, server = models.split(network, 0, weights=weights)
    table = "model.embed_tokens.weight"
    assert read[0] == table and sorted(read) == sorted([*GOLDEN["llama 3"]["shapes"], table])
    np.testing.assert_array_equal(client.params["embedding"]["embed_tokens"]["embedding"], tensors("llama 3")[table])
    np.testing.assert_array_equal(server.params["head"]["lm_head"]["kernel"], tensors("llama 3")[table].T)


def without(name):
    return lambda found: found.pop(name)


def with_shape(name, shape):
    return lambda found: found.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"),
        (with_shape("model.layers.0.lora.weight", (2, 2)), r"unknown: model\.layers\.0\.lora\.weight$"),
        (with_shape("model.layers.3.mlp.up_proj.weight", (24, 16)), "unknown: model.layers.3.mlp.up_proj.weight"),
        (
            with_shape("model.layers.2.self_attn.k_proj.weight", (16, 16)),
            r"other shapes: model\.layers\.2\.self_attn\.k_proj\.weight is \(16, 16\) rather than \(8, 16\)$",
        ),
        (
            lambda found: found.update({"model.norm.weight": np.ones(16, np.int32)}),
            r"dtypes that are not floating point: model\.norm\.weight is I32$",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    found = tensors()
    change(found)
    with pytest.raises(ValueError, match=message):
        models.load_weights(write(tmp_path / "in", found=found), model())


def test_what_follows_from_others_is_passed_over(tmp_path, folders):
    extra = {"lm_head.weight": np.zeros((19, 16), np.float32)}  # tied: the embedding's count
    extra |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    got = models.load_weights(write(tmp_path / "in", found=tensors() | extra), model())
    assert_trees_equal(got.params, models.load_weights(folders["llama 3"], model()).params)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must have model.safetensors or model.safetensors.index.json"),
        ({"model.safetensors": b"no"}, "must be a safetensors file that can be read"),
        ({"model.safetensors.index.json": b"{}"}, "must be JSON with a weight_map"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
            "must name files of its folder, got '../b'",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        models.load_weights(tmp_path, model())
    with pytest.raises(ValueError, match=r"must be a folder with config\.json"):
        models.load_weights(tmp_path / "none", model())


def test_an_index_that_names_what_a_file_has_not_is_refused(tmp_path, folders):
    names = {"no.weight": "model.safetensors.part"}
    (tmp_path / "model.safetensors.part").write_bytes((folders["llama 3"] / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"part must have no\.weight, as model.safetensors.index.json says"):
        models.load_weights(tmp_path, model())


def test_a_folder_that_has_something_is_not_written_to(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(ValueError, match="folder must be new or empty, got"):
        models.save_weights(tmp_path, model(), models.whole(model()).params, {})


# -- The config. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_of_a_config_is_read_as_the_same(case):
    assert models.DecoderConfig.from_json(json.loads(json.dumps(config(case).to_json()))) == config(case)


def test_several_tokens_may_end_a_text():
    """All are kept and written; in a list or a tuple, and one in a list is one."""
    tree = decoders.CONFIGS["llama 3"] | {"bos_token_id": 1, "eos_token_id": [2, 7]}
    found = models.DecoderConfig.from_json(tree)
    assert found.eos_token_id == (2, 7) and found.end_tokens == (2, 7, 1)
    assert json.loads(json.dumps(found.to_json()))["eos_token_id"] == [2, 7]
    assert models.DecoderConfig.from_json(tree | {"eos_token_id": [2]}).eos_token_id == 2
    bare = models.DecoderConfig.from_json(tree | {"bos_token_id": None, "eos_token_id": []})
    assert bare.eos_token_id is None and bare.end_tokens == ()


def test_newer_files_keep_what_is_said_of_rotary_positions_together():
    tree = decoders.CONFIGS["llama 3"]
    together = {"rope_theta": tree["rope_theta"], **tree["rope_scaling"]}
    newer = {name: value for name, value in tree.items() if not name.startswith("rope_")}
    assert models.DecoderConfig.from_json(newer | {"rope_parameters": together}) == config("llama 3")


def test_defaults_are_those_of_the_families():
    llama, qwen = config("llama 2"), config("qwen 3")
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (4, 4, 10000.0)
    tree = {name: value for name, value in decoders.CONFIGS["qwen 3"].items() if name != "head_dim"}
    assert models.DecoderConfig.from_json(tree).head_dim == 128 and qwen.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type must be one of llama, qwen2, qwen3, got 'gpt2'"),
        ({"model_type": None}, r"model_type must be one of .*, got None"),
        ({"hidden_size": None}, r"hidden_size must be given, got none"),
        ({"hidden_size": 16.0}, r"hidden_size must be a positive integer, got 16\.0"),
        ({"hidden_act": "gelu"}, r'hidden_act must be "silu", got "gelu"'),
        ({"attention_dropout": 0.1}, r"attention_dropout must be 0, got 0\.1"),
        ({"use_sliding_window": True}, r"use_sliding_window must be false, got true"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config must be null, got"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types must be .*, got 'sliding_attention'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, r'rope_type "default" or "llama3", got "yarn"'),
        ({"rope_scaling": {"factor": 8.0}}, r'rope_scaling must have rope_type "default" or "llama3", got null'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, r"got it without low_freq_factor"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads, 4, got 3"),
        ({"head_dim": 5}, r"head_dim must be even, as rotary positions turn pairs, got 5"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps must be a number above 0, got 0"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings must be true or false, got 'yes'"),
        ({"bos_token_id": 19}, r"bos_token_id must be a token in 0\.\.18, got 19"),
        ({"eos_token_id": [2, 19]}, r"eos_token_id must be a token in 0\.\.18, got 19"),
    ],
)
def test_what_is_not_supported_is_one_error(changes, message, tmp_path):
    tree = decoders.CONFIGS["llama 3"] | changes
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig.from_json(tree)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        models.DecoderConfig.load(tmp_path)


def test_a_dict_is_no_scaling_of_rotary_positions():
    with pytest.raises(ValueError, match=r"rope_scaling must be a RopeScaling or None, got \{'factor': 8\.0\}"):
        dataclasses.replace(config("llama 3"), rope_scaling={"factor": 8.0})


@pytest.mark.parametrize("length", [0, 65, 8.0])
def test_a_text_must_fit_the_context(length):
    with pytest.raises(ValueError, match=rf"length must be in 1\.\.64 \(max_position_embeddings\), got {length}"):
        model(length=length)
