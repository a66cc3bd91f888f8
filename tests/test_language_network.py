"""Decoders over a network: each party has its own copies of weights, tokenizer and text, on lines in memory."""

import collections
import dataclasses
import functools
import gc
import re

import jax
import numpy as np
import optax
import pytest

from msjax import build, config, models, plan
from msjax.config import without_paths
from msjax.distributed import agreement
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.options import ClientOptions, ServeOptions
from msjax.distributed.own_parts import CLIENT, SERVER, OwnParts
from msjax.distributed.server_program import check_serve
from msjax.models._huggingface import Tensor
from msjax.split import parties
from msjax.training import from_config, loaded, loop

from . import language
from .network import Net
from .setups import SMALL, dataset

LORA = config.LoraConfig(rank=2, targets=("q_proj", "up_proj"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    return language.make_folder(tmp_path / "server" / "model")


class TextNet(Net):
    """Clients that load and build as `msjax client` does, with copies of the server's folder of their own."""

    def __init__(self, path, cfg, folder, **options):
        self.folder, self.programs, self.own = folder, {}, {}
        super().__init__(path, build.resolved(cfg), **options)

    def build(self, samples, test_samples, description):
        """As `msjax serve` does."""
        parts = OwnParts(self.cfg, agreement.summary_of(description), SERVER)
        counts = {"samples": samples, "test_samples": test_samples}
        spec = build.build(self.cfg, parts.summary, parts=parts.shapes, **counts).spec
        return spec, functools.partial(parts.first_state, spec.optimizer)

    def program(self, client):
        """A client's, which has what `self.own` says in place of a copy of the server's folder."""
        if client not in self.programs:
            home = self.path / f"home{client}"
            own = self.own.get(client) or language.copy(self.folder, home)
            options = {"weights": str(own), "data_dir": str(own.parent), "state": str(home / "state")}
            self.programs[client] = ClientProgram(ClientOptions(client_id=client, **options))
        return self.programs[client]

    def load(self, client, cfg):
        return self.program(client)._load(cfg)

    def party(self, client, cfg, samples, test_samples):
        return self.program(client)._build(cfg, samples, test_samples)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LORA},
        pytest.param({"mode": config.ModeConfig(tail_cut="last")}, marks=pytest.mark.slow),
        pytest.param({"lora": LORA, "mode": config.ModeConfig(tail_cut="2")}, marks=pytest.mark.slow),
    ],
    ids=["lora", "u_shaped", "lora_u_shaped"],
)
def test_parties_with_copies_of_their_own_equal_one_program_also_killed(options, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded, "make_mesh", lambda clients: None)
    cfg = language.config_of(folder, **options)
    with_paths = build.resolved(cfg)
    net = TextNet(tmp_path / "net", cfg, folder, disk=True)
    net.start_clients().run_to(1)
    assert net.programs[0]._cfg.model.weights != with_paths.model.weights
    net.run_to(3)
    net.kill_server()
    net.start_server()
    net.kill(1)
    net.programs.pop(1)
    net.own[1] = tmp_path / "net" / "home1" / "model"
    net.start_client(1)
    net.run()
    assert not net.failures, net.failures
    finished = loop.train(from_config.load_run(cfg), quiet=True)
    run = from_config.load_run(cfg)
    own = {name for part in ("client", "server") for name in getattr(run.spec, f"{part}_constants")}
    assert bool(own) == (cfg.lora.rank is not None)
    for theirs, ours in (
        (finished.state.server, net.server.run.party.state),
        *((finished.state.client, net.finals[n].state) for n in (0, 1)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4), theirs.params, ours.params)
        jax.tree.map(np.testing.assert_array_equal, theirs.stats, ours.stats)
    # The same bits as without a network, and without having been killed.
    server = parties.Server(run.spec, run.state.server, cfg.seed)
    clients = [
        parties.Client(n, run.spec, run.state.client, net.programs[n]._data, cfg.seed) for n in range(cfg.clients)
    ]
    for _ in parties.run(server, clients):
        pass
    for ours, theirs in ((server, net.server.run.party), (clients[0], net.finals[0]), (clients[1], net.finals[1])):
        jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)
    net.close()


@pytest.mark.parametrize("tail_cut", [None, "last"])
def test_a_client_is_told_that_its_labels_are_its_text(tail_cut, folder, tmp_path, caplog):
    cfg = build.resolved(language.config_of(folder, mode=config.ModeConfig(tail_cut=tail_cut)))
    TextNet(tmp_path / "net", cfg, folder).load(0, config.without_paths(cfg))
    assert ("the labels of this run are the text itself" in caplog.text) == (tail_cut is None)


def test_a_party_reads_the_weights_of_its_own_parts_alone(folder, tmp_path, monkeypatch):
    read = collections.Counter()
    array = Tensor.__array__

    def counted(self, *args, **options):
        read[self._file.path.parent, self._name] += 1
        return array(self, *args, **options)

    monkeypatch.setattr(Tensor, "__array__", counted)
    cfg = language.config_of(folder)
    net = TextNet(tmp_path / "net", cfg, folder)
    net.start_clients().run_to(1)
    weights = [tmp_path / "net" / f"home{client}" / "model" for client in range(cfg.clients)]
    by_party = [{name for path, name in read if path == one} for one in (*weights, folder)]
    *clients, server = by_party
    first = {name for name in language.tensors(folder) if "embed_tokens" in name or "layers.0." in name}
    assert cfg.cut == 1 and clients == [first] * cfg.clients
    tied = {"model.embed_tokens.weight"}  # the output layer begins as the embedding
    assert server == (language.tensors(folder).keys() - first) | tied
    # The server's parts are made for the description that clients bring, and for the run.
    assert {count for (path, _), count in read.items() if path != folder} == {1}


@pytest.mark.parametrize("own", [CLIENT, SERVER], ids=["client", "server"])
def test_a_party_makes_the_arrays_of_its_own_parts_alone_and_keeps_none(own):
    cfg = dataclasses.replace(SMALL, mode=config.ModeConfig(tail_cut="last"))
    summary = build.DataSummary.of(dataset())
    before = held()
    parts = OwnParts(cfg, summary, own)
    arrays = sum(plan.nbytes((p.params, p.stats)) for n, p in zip(models.PARTS, parts.shapes, strict=True) if n in own)
    assert bytes_beside(before) == arrays
    state = parts.first_state(optax.sgd(0.1, momentum=0.9))
    assert bytes_beside(before) == plan.nbytes(state)
    assert 0 < arrays < plan.nbytes(state)  # the optimizer's beside them


def held():
    gc.collect()
    return jax.live_arrays()


def bytes_beside(before):
    """Of the arrays that were made since, whatever has become of these."""
    known = set(map(id, before))
    return sum(array.nbytes for array in held() if id(array) not in known)


def change_weights(own):
    tensors = language.tensors(own)
    language.write_tensors(own, tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2})


def change_tokenizer(own):
    file = own / "tokenizer.json"
    file.write_text(file.read_text().replace('"?":0,"<s>":1', '"<s>":0,"?":1').replace('"?": 0', '"!": 0'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "where client 0, which came before, .*, model weights is 'sha256:.*' here and 'sha256:"),
        (change_tokenizer, "where client 0, which came before, .*, tokenizer is 'sha256:.*' here and 'sha256:"),
        (lambda own: (own / "tokenizer.json").unlink(), "split by a tokenizer, 'model': give this client its copy as"),
        (lambda own: (own.parent / "text.txt").unlink(), "must be a file that can be read, got '.*home1/text.txt'"),
    ],
    ids=["weights", "tokenizer", "no_tokenizer", "no_text"],
)
def test_what_a_client_has_that_others_have_not_is_said_before_the_first_step(change, message, folder, tmp_path):
    net = TextNet(tmp_path / "net", language.config_of(folder, lora=LORA), folder)
    net.own[1] = language.copy(folder, net.path / "home1")
    change(net.own[1])
    net.start_client(0)
    net.start_client(1)
    net.run(1)
    assert net.step == 0
    assert any(re.search(message, str(error)) for error in net.failures.values()), net.failures


def test_parties_of_another_length_or_other_adapters_differ(folder):
    """Of what shapes say and of what they do not, as rank and targets of adapters that are all the server's."""

    def described(**options):
        cfg = build.resolved(language.config_of(folder, **options))
        dataset = build.load_data(cfg)
        summary = build.DataSummary.of(dataset)
        parts = jax.eval_shape(lambda: build.make_parts(cfg, summary))
        spec = build.build(cfg, summary, samples=8, test_samples=8, parts=parts).spec
        return agreement.parse(agreement.describe(spec, summary, build.identity(cfg)))

    cut = dataclasses.replace(language.config_of(folder).model, cut="0")
    first = described(lora=LORA, model=cut)
    for lora in (dataclasses.replace(LORA, rank=3), dataclasses.replace(LORA, targets=("q_proj", "k_proj"))):
        found = agreement.differences(first, described(lora=lora, model=cut))
        assert found.startswith('model adapters is "LoRA(rank=2') and ";" not in found
    shorter = dataclasses.replace(language.config_of(folder).data, text_length=10)
    assert "inputs is [['', 'int32', [12]]] here and" in agreement.differences(
        first, described(lora=LORA, model=cut, data=shorter)
    )
    plain = without_paths(build.resolved(language.config_of(folder)))
    assert (plain.model.weights, plain.data.name) == ("model", "text.txt")


def test_a_server_says_at_once_that_its_weights_do_not_fit(folder):
    cfg = build.resolved(language.config_of(folder))
    check_serve(cfg, ServeOptions())
    tensors = language.tensors(folder)
    language.write_tensors(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1]})
    with pytest.raises(ValueError, match=r"model\.weights: .*model must hold .*other shapes: model\.norm\.weight is"):
        check_serve(cfg, ServeOptions())
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model\.weights: .*model must have model\.safetensors or .*, and has neither"
    ):
        check_serve(cfg, ServeOptions())
