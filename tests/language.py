"""Folders of tiny decoders with a tokenizer, a text of letters beside them, and configs of runs on these."""

import dataclasses
import functools
import json
import shutil

import pytest
import safetensors.numpy

from msjax import compress, config, models

from . import decoders

LETTERS = "abcdefghij"
GOLDEN = json.loads(decoders.GOLDEN.read_text())["cases"]


def make_folder(path, case="llama 3", repeats=24):
    """A folder of Hugging Face's, with weights by a formula, and a file `text.txt` beside it."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'msjax[lm]'")
    path.mkdir(parents=True)
    write_decoder(path, case)
    vocabulary = {"?": 0, "<s>": 1} | {letter: i for i, letter in enumerate(LETTERS, 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))
    (path.parent / "text.txt").write_text(LETTERS * repeats)
    return path


def write_decoder(folder, case):
    (folder / "config.json").write_text(json.dumps(decoders.CONFIGS[case]))
    write_tensors(folder, decoders.tensors(GOLDEN[case]["shapes"]))


def weights_of(tmp_path_factory, model):
    """A function that returns, of each case, the weights of the whole `model(case)` as they are read from a folder."""

    @functools.cache
    def read(case):
        folder = tmp_path_factory.mktemp("decoder")
        write_decoder(folder, case)
        return models.load_weights(folder, model(case))

    return read


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_tensors(folder, found):
    safetensors.numpy.save_file(found, folder / "model.safetensors")


def copy(folder, to):
    """A copy of a folder and of the text beside it, in the folder `to`."""
    to.mkdir(parents=True)
    shutil.copytree(folder, to / folder.name)
    shutil.copy(folder.parent / "text.txt", to)
    return to / folder.name


def config_of(folder, **options):
    cfg = config.Config(
        model=config.ModelConfig(name="decoder", cut="1", weights=str(folder)),
        data=config.DataConfig(name=str(folder.parent / "text.txt"), text_length=12),
        task=config.TaskConfig(name="next_token"),
        optim=config.OptimConfig(kind="adamw", learning_rate=0.03, weight_decay=0.0),
        codec=compress.Identity(),
        clients=2,
        batch_size=4,
        epochs=2,
    )
    return dataclasses.replace(cfg, **options)
