"""Texts as blocks of tokens: what is in a block, what is kept, and what cannot be read."""

import json

import numpy as np
import pytest

from msjax import data
from msjax.data import _text_sources

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'msjax[lm]'")

LETTERS = "abcdefghij"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tokenizer whose tokens are letters, from 1 on, and a cache of its own."""
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    model = tokenizers.models.WordLevel({"?": 0} | {letter: i for i, letter in enumerate(LETTERS, 1)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    # What must not come into blocks.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("? $A ?", special_tokens=[("?", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def write(folder, text, name="text.txt"):
    path = folder.parent / name
    path.write_text(text)
    return path


def test_labels_are_the_tokens_behind_the_inputs(folder):
    ds = data.from_text(write(folder, "abcdefghij"), tokenizer=folder, length=3, test_share=None)
    assert (ds.name, ds.num_classes, ds.mean, len(ds.test)) == ("text.txt", None, None, 0)
    assert ds.train_inputs.dtype == ds.train_labels.dtype == np.int32
    np.testing.assert_array_equal(ds.train_inputs, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    np.testing.assert_array_equal(ds.train_labels, [[2, 3, 4], [5, 6, 7], [8, 9, 10]])


def test_texts_are_packed_one_behind_the_other(folder):
    options = dict(tokenizer=folder / "tokenizer.json", length=4, test_share=None)
    rows = [{"id": 1, "story": "abc"}, {"id": 2, "story": b"de"}, {"id": 3, "story": "fgh"}]
    ds = data.from_text(rows, column="story", start=10, **options)
    np.testing.assert_array_equal(ds.train_inputs, [[10, 1, 2, 3], [10, 4, 5, 10]])
    np.testing.assert_array_equal(ds.train_labels, [[1, 2, 3, 10], [4, 5, 10, 6]])
    write(folder, "story,id\nabc,1\nde,2\nfgh,3\n", "rows.csv")
    same = data.from_text(folder.parent / "rows.csv", column="story", start=10, **options)
    np.testing.assert_array_equal(same.train_inputs, ds.train_inputs)
    plain = data.from_text(["abc", "de", "fgh"], **options)
    np.testing.assert_array_equal(plain.train_inputs, [[1, 2, 3, 4]])


def test_a_text_begins_as_the_config_beside_the_tokenizer_says(folder):
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 7}))
    ds = data.from_text(write(folder, "abcabc"), tokenizer=folder, length=3, test_share=None)
    np.testing.assert_array_equal(ds.train_inputs, [[7, 1, 2], [3, 1, 2]])


def test_all_that_has_a_column_of_texts_is_one_text_set(folder):
    pandas = pytest.importorskip("pandas")
    texts = [LETTERS[:4], LETTERS[4:]]
    frame = pandas.DataFrame({"story": texts, "other": [1, 2]}, index=[7, 9])
    options = {"tokenizer": folder, "length": 4, "test_share": None, "column": "story"}
    expected = data.from_text(texts, **options)
    frame.to_csv(folder / "texts.csv")
    lines = "\n".join(json.dumps({"story": text}) for text in texts)
    for source in (
        frame,
        frame["story"],
        frame.to_dict("list"),
        frame.to_dict("records"),
        np.array(texts),
        folder / "texts.csv",
        write(folder, lines, "texts.jsonl"),
        write(folder, "\n".join(map(json.dumps, texts)), "plain.jsonl"),
        write(folder, "\ufeff" + lines, "mark.jsonl"),
    ):
        found = data.from_text(source, **options)
        np.testing.assert_array_equal(found.train_inputs, expected.train_inputs)
        np.testing.assert_array_equal(found.train_labels, expected.train_labels)
    spaced = write(folder, "\n" + lines.replace("\n", "\n\n"), "spaced.jsonl")
    read = data.read_texts(spaced, tokenizer=folder, column="story")
    assert read.names == [f"{spaced}:2", f"{spaced}:4"]
    assert [read.decode(tokens.tolist()).replace(" ", "") for tokens in read.tokens] == texts


def test_the_mark_that_some_editors_begin_a_file_with_is_no_text(folder):
    found = [
        data.from_text(write(folder, mark + LETTERS), tokenizer=folder, length=3, test_share=None).train_inputs
        for mark in ("", "\ufeff")
    ]
    np.testing.assert_array_equal(*found)


def test_a_tokenizer_that_cannot_split_a_text_is_told(folder):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(data.DataError, match="tokenizer must be able to split every text, but: "):
        data.from_text([LETTERS], tokenizer=folder, length=3)
    found = data.load_tokenizer(folder)
    assert data.tokens_of(found, "a", start=0) == [0, 0]
    with pytest.raises(data.DataError, match="tokenizer must be able to split every text, but: "):
        data.tokens_of(found, "b")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="?")).save(str(folder / "tokenizer.json"))
    with pytest.raises(data.DataError, match=r"tokenizer must have tokens, got none in .*tokenizer\.json"):
        data.load_tokenizer(folder)


def test_the_last_blocks_are_set_aside_or_a_second_file_is(folder):
    path = write(folder, LETTERS * 3 + "a")
    ds = data.from_text(path, tokenizer=folder, length=5, test_share=0.3)
    assert (len(ds.train), len(ds.test)) == (4, 2)
    np.testing.assert_array_equal(ds.test_inputs, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    other = data.as_dataset(str(path), test=write(folder, "jihgfedc", "other.txt"), tokenizer=folder, length=5)
    assert len(other.train) == 6
    np.testing.assert_array_equal(other.test_inputs, [[10, 9, 8, 7, 6]])


def test_tokens_are_found_once(folder, monkeypatch):
    path = write(folder, LETTERS * 2)

    def read(length=3):
        return data.from_text(path, tokenizer=folder, length=length)

    first = read()

    def refuse(*args):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(data._text, "_encoded", refuse)
    np.testing.assert_array_equal(read().train_inputs, first.train_inputs)
    assert read(7).input_like.shape == (7,)  # blocks of another length are of the same tokens
    path.write_text(LETTERS * 2 + "b")
    with pytest.raises(AssertionError, match="tokenized again"):
        read()


def test_many_texts_are_tokenized_in_groups(folder, monkeypatch):
    monkeypatch.setattr(data._text, "_TOGETHER", 4)
    texts = [LETTERS[:n] for n in (3, 1, 5, 2, 9)]
    ds = data.from_text(texts, tokenizer=folder, length=20 - 1, test_share=None)
    found = [*ds.train_inputs[0], ds.train_labels[0, -1]]
    assert found == [LETTERS.index(letter) + 1 for letter in "".join(texts)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"train must have text, got none in .*text\.txt"),
        ("abc", {}, r"train must have 4 tokens for a block of 3, got 3"),
        ("abcd", {}, r"train must have 2 blocks of 3 tokens where test_share is given, got 1"),
        (
            LETTERS,
            {"vocabulary": 10},
            r"tokenizer must have tokens in 0\.\.9, as the model has, got 10 \('j'\) in .*json",
        ),
        (LETTERS, {"vocabulary": 11, "start": 11}, r"start must be a token in 0\.\.10, as the model has, got 11"),
        (LETTERS, {"start": -1}, r"start must be a token, an integer of at least 0, got -1"),
        (LETTERS, {"length": 0}, r"length must be a positive integer, the tokens of a block, got 0"),
        (LETTERS, {"test_share": 1.0}, r"test_share must be above 0 and below 1, or None, got 1\.0"),
        (LETTERS, {"tokenizer": "none"}, r"tokenizer must be a tokenizer\.json, or a folder that has one, got 'none'"),
    ],
)
def test_what_does_not_fit_is_one_error(text, options, message, folder):
    path = write(folder, text)
    with pytest.raises(data.DataError, match=message):
        data.from_text(path, **({"tokenizer": folder, "length": 3} | options))


def test_files_and_texts_that_cannot_be_read_are_named(folder):
    options = {"tokenizer": folder, "length": 3}
    with pytest.raises(data.DataError, match=r"train must be a file that can be read, got .*none\.txt"):
        data.from_text(folder / "none.txt", **options)
    (folder / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(data.DataError, match=r"latin\.txt must be text in UTF-8"):
        data.from_text(folder / "latin.txt", **options)
    with pytest.raises(data.DataError, match="train must have texts, got 3 at index 1"):
        data.from_text(["abc", 3], **options)
    with pytest.raises(data.DataError, match="column must be one of train, which has story, got 'text'"):
        data.from_text([{"story": "abc"}], **options)
    (folder / "texts.json").write_text('[{"text": "abc"}]')
    with pytest.raises(
        data.DataError, match=r"test must be a \.txt, \.jsonl or \.csv file, got '.*texts\.json': rename"
    ):
        data.from_text([LETTERS], folder / "texts.json", **options)
    (folder / "texts.jsonl").write_text('{"text": "abc"}\n\n{"text": abc}\n')
    with pytest.raises(data.DataError, match=r"texts\.jsonl must have JSON in each line, got '.*abc.*' in line 3: Exp"):
        data.from_text(folder / "texts.jsonl", **options)
    with pytest.raises(data.DataError, match="column must be one of train, which has story, got 'text'"):
        data.from_text({"story": ["abc"]}, **options)
    with pytest.raises(data.DataError, match="train must have a sequence of texts in column 'text', got one text"):
        data.from_text({"text": LETTERS}, **options)
    (folder / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(data.DataError, match=r"deep\.jsonl must have JSON in each line, .* in line 1"):
        data.from_text(folder / "deep.jsonl", **options)
    write(folder, '{"text": "abc\u2028def\u0085ghi"}', "lines.jsonl")
    assert len(data.from_text(folder.parent / "lines.jsonl", **options).train_inputs) == 2
    with pytest.raises(data.DataError, match="train must be a path, or have __len__ and __getitem__, got int"):
        data.from_text(3, **options)
    with pytest.raises(data.DataError, match=r"tokenizer must be given for .*text\.txt, see from_text"):
        data.as_dataset(write(folder, "abc"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(data.DataError, match=r"tokenizer\.json must be a tokenizer\.json that the package tokenizers"):
        data.from_text(write(folder, "abc"), **options)


def test_a_table_of_texts_has_texts_alone(tmp_path):
    """What pandas takes for a missing value or a number is a text here."""
    pytest.importorskip("pandas")
    (tmp_path / "talk.csv").write_text('text\nNone\nNA\n12\n""\nhello\n')
    assert list(_text_sources.texts_of("train", tmp_path / "talk.csv", "text")) == ["None", "NA", "12", "", "hello"]


def test_only_the_column_of_a_large_set_is_read():
    """As of Hugging Face, whose sets have methods that would read all of it."""

    class Rows(list):
        column_names = ("text", "image")

        def to_list(self):
            raise AssertionError("all of it is read")

        def select_columns(self, names):
            return Rows({name: row[name] for name in names} for row in self)

    rows = Rows({"text": f"text {n}", "image": bytes(9)} for n in range(3))
    assert list(_text_sources.texts_of("train", rows, "text")) == ["text 0", "text 1", "text 2"]
