"""CSV files as data sets."""

import dataclasses
import json
import os
import re
import threading
import types

import jax
import numpy as np
import pytest

from msjax import build, config, data
from msjax.distributed import agreement, client_program, served_folder
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.options import ClientOptions
from msjax.distributed.own_parts import SERVER, OwnParts

from .data_helpers import forbid
from .network import RUN

pandas = pytest.importorskip("pandas")


@pytest.fixture
def people(tmp_path):
    """A table of 40 rows: numbers far from 0, texts, a constant, and labels of each kind."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "second": 1.6e9 + np.arange(40),
            "age": rng.integers(20, 60, 40),
            "job": rng.choice(["cook", "nurse", "smith"], 40),
            "one": 3,
            "income": rng.normal(size=40),
            "rich": np.where(np.arange(40) % 4, "no", "yes"),
            "grade": np.arange(40) % 5 + 1,
        }
    )
    path = tmp_path / "people.csv"
    frame.to_csv(path, index=False)
    return path, frame


def change(path, row, column, value):
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[row][lines[0].index(column)] = value
    path.write_text("\n".join(map(",".join, lines)))


def test_columns_become_numbers(people):
    path, frame = people
    ds = data.from_csv(path, label="rich", test_share=None)
    assert ds.num_classes == 2 and ds.mean is None and len(ds.test) == 0
    np.testing.assert_array_equal(ds.train_labels, frame["rich"] == "yes")  # no, yes: in order
    assert ds.train_inputs.shape == (40, 8) and ds.train_inputs.dtype == np.float32
    # In float32, 1.6e9 and the next second are one number: centred before that, they differ.
    np.testing.assert_allclose(np.diff(ds.train_inputs[:, 0]), 1 / np.arange(40).std(), rtol=1e-4)
    np.testing.assert_array_equal(
        ds.train_inputs[:, 2:5], np.stack([frame["job"] == j for j in ("cook", "nurse", "smith")], 1)
    )
    assert (ds.train_inputs[:, 5] == 0).all()  # a constant
    assert ds.columns == data.TableFormat.measure(frame, label="rich").columns
    np.testing.assert_allclose(ds.train_inputs[:, [0, 1, 6]].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(ds.train_inputs[:, [0, 1, 6]].std(0), 1, atol=1e-6)


def test_labels_of_each_kind(people):
    path, _ = people
    ds = data.from_csv(path, label="income")
    assert ds.num_classes is None and ds.train_labels.dtype == np.float32 and (len(ds.train), len(ds.test)) == (32, 8)
    grades = data.from_csv(path, label="grade", classes=True, drop="one")
    assert grades.num_classes == 5 and sorted(np.bincount(grades.test_labels)) == [1, 1, 2, 2, 2]  # 8 of 40
    with pytest.raises(data.DataError, match=r"'rich' must be numbers .* is False, as for regression, got 'yes' in"):
        data.from_csv(path, label="rich", classes=False)


def test_train_rows_alone_say_how(people, tmp_path, caplog):
    path, frame = people
    test = frame.iloc[:10].assign(job="pilot")
    test.to_csv(tmp_path / "test.csv", index=False)
    ds = data.from_csv(path, label="rich", test=tmp_path / "test.csv")
    np.testing.assert_array_equal(ds.test_inputs[:, :2], ds.train_inputs[:10, :2])
    assert (ds.test_inputs[:, 2:5] == 0).all()
    said = "column 'job': 10 rows have texts that no training row has, such as 'pilot' in row 1; they count as none"
    assert [said in message for message in caplog.messages] == [True]
    test.assign(rich="maybe").to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(data.DataError, match=r"'rich' must be one of the classes .*\(no, yes\), got 'maybe' in row 1"):
        data.from_csv(path, label="rich", test=tmp_path / "test.csv")


def test_digits_are_texts_where_they_were_to_train_on(tmp_path, caplog):
    """pandas makes numbers of a column of digits alone, as a test file or what is predicted may have."""
    for name, kinds, codes in (("train", "ab", ("01", "02", "x1")), ("test", "ba", ("02", "01"))):
        rows = [f"{kind},{code},{n},{n % 2 == 0}" for kind in kinds for n, code in enumerate(codes)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["y,code,size,even", *rows]))
    (tmp_path / "y.csv").write_text("code,y,size,even\nb,01,1,True\na,x1,2,False\n")
    ds = data.from_csv(tmp_path / "train.csv", label="y", test=tmp_path / "test.csv")
    names = [name for column in ds.columns for name in column.names]
    codes = [names.index("code=02"), names.index("code=01")]
    expected = np.float32([[1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(ds.test_inputs[:, codes], expected)
    found = data.read_inputs(tmp_path / "test.csv", like=ds.input_like, columns=ds.columns)
    np.testing.assert_array_equal(found.fetch(0, 4), ds.test_inputs)
    as_told = data.TableFormat("y", ds.classes, ds.columns)
    again = data.from_csv(tmp_path / "test.csv", table_format=as_told, test_share=None)
    np.testing.assert_array_equal(again.train_inputs, ds.test_inputs)
    assert not caplog.records
    # Labels likewise.
    (tmp_path / "z.csv").write_text("code,y,size,even\nb,01,1,True\n")
    of_codes = data.from_csv(tmp_path / "y.csv", label="y", test=tmp_path / "z.csv")
    assert of_codes.classes == ("01", "x1") and of_codes.test_labels.tolist() == [0]
    (tmp_path / "own.csv").write_text("code,y,size,even\na,01,2,False\nb,01,1,True\n")  # a client's own rows
    for options in (
        {"label": "y", "classes": of_codes.classes},
        {"table_format": data.TableFormat("y", of_codes.classes, of_codes.columns)},
    ):
        assert data.from_csv(tmp_path / "own.csv", test_share=None, **options).train_labels.tolist() == [0, 0]


def test_numbers_that_were_texts_are_found_however_they_are_written(tmp_path):
    """A column with gaps has 1.0 for what was 1."""
    columns = tuple(data.Column(name, texts, may_miss=True) for name, texts in (("a", ("1", "2")), ("b", ("1", "x"))))
    (tmp_path / "x.csv").write_text("a,b\n1.0,1.0\n,x\n2.0,1\n")
    found = data.read_inputs(tmp_path / "x.csv", like=jax.ShapeDtypeStruct((4,), np.float32), columns=columns)
    np.testing.assert_array_equal(found.fetch(0, 3), [[1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0]])


def test_missing_values(people):
    path, frame = people
    change(path, 3, "age", "")
    with pytest.raises(
        data.DataError, match=r"people.csv: every value must be there and finite, got missing in row 3, column 'age'"
    ):
        data.from_csv(path, label="rich", test_share=None)
    frame.iloc[5:].assign(age=np.nan).to_csv(path.with_name("old.csv"), index=False)
    for seed in range(5):  # the first row of the file that is trained on, however rows are shuffled
        with pytest.raises(data.DataError, match=r"got missing in row [123], column 'age'"):
            data.from_csv(path.with_name("old.csv"), label="rich", test_share=0.03, seed=seed)
    change(path, 5, "income", "inf")
    change(path, 7, "job", "")
    ds = data.from_csv(path, label="rich", missing="median", test_share=None)
    names = data.TableFormat.measure(pandas.read_csv(path), label="rich", missing="median").names
    assert (
        names
        == "second age,age missing,job=cook,job=nurse,job=smith,job missing,one,income,income missing,grade".replace(
            " age,", ",age,", 1
        ).split(",")
    )
    x = dict(zip(names, ds.train_inputs.T, strict=True))
    ages = frame["age"].drop(2)
    filled = frame["age"].astype(float).where(np.arange(40) != 2, ages.median())
    np.testing.assert_allclose(x["age"], (filled - filled.mean()) / filled.std(ddof=0), atol=1e-5)
    for name, row in (("age", 2), ("income", 4), ("job", 6)):
        np.testing.assert_array_equal(x[f"{name} missing"], np.arange(40) == row)
    assert x["job=cook"][6] == x["job=nurse"][6] == x["job=smith"][6] == 0
    change(path, 9, "rich", "")
    with pytest.raises(data.DataError, match="every row must have a finite label, got none in row 9, column 'rich'"):
        data.from_csv(path, label="rich", missing="median")


def test_values_that_only_test_rows_miss(people, tmp_path):
    path, frame = people
    frame.iloc[:9].assign(age=np.nan, job=None).to_csv(tmp_path / "test.csv", index=False)
    ds = data.from_csv(path, label="rich", test=tmp_path / "test.csv", missing="median")
    assert ds.input_like.shape == (8,)  # as if nothing were missing: no column says what is
    middle = (frame["age"].median() - frame["age"].mean()) / frame["age"].std(ddof=0)
    np.testing.assert_allclose(ds.test_inputs[:, 1], middle, rtol=1e-5)
    assert (ds.test_inputs[:, 2:5] == 0).all()


def test_a_config_says_what_becomes_of_missing_values(people, tmp_path):
    path, _ = people
    change(path, 3, "age", "")
    cfg = config.Config(data=config.DataConfig(name=str(path), label="rich"))
    with pytest.raises(data.DataError, match="got missing in row 3, column 'age'"):
        build.load_data(cfg)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, missing="median"))
    assert build.load_data(cfg).input_like.shape in ((8,), (9,))  # by whether row 3 is among the training rows
    assert config.from_json(config.to_json(cfg)) == cfg
    with pytest.raises(ValueError, match=r"data.missing must be one of 'refuse', 'median', got 'mean'"):
        config.Config(data=config.DataConfig(missing="mean"))
    by_preset = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="preset.py:table"))
    with pytest.raises(ValueError, match=r"data.missing must be 'refuse' where data.name is a function of a preset"):
        build.load_data(by_preset)
    client = ClientProgram(ClientOptions(client_id=0, state=str(tmp_path / "state"), own_data=True))
    with pytest.raises(ValueError, match=r"data.missing must be 'refuse' for clients with own data, got 'median'"):
        client._load(config.without_paths(cfg))
    (tmp_path / "folder").mkdir()
    with pytest.raises(data.DataError, match='missing must be "refuse" for a folder of images'):
        data.as_dataset(tmp_path / "folder", missing="median")


def test_clients_with_own_data_use_all_of_it(people, tmp_path, monkeypatch):
    """Each its own file of the same name, of which none is a share of the other's."""
    _, frame = people
    cfg = config.Config(
        model=config.ModelConfig("mlp"), data=config.DataConfig("people.csv", label="rich"), clients=2, batch_size=4
    )
    found = []
    for client, rows in enumerate((frame.iloc[:15], frame.iloc[10:])):
        (tmp_path / f"{client}").mkdir()
        rows.to_csv(tmp_path / f"{client}" / "people.csv", index=False)
        options = {"state": str(tmp_path / f"state{client}"), "data_dir": str(tmp_path / f"{client}")}
        program = ClientProgram(ClientOptions(client_id=client, own_data=True, **options))
        own = program._load(cfg)
        ds = data.from_csv(tmp_path / f"{client}" / "people.csv", label="rich")
        assert (own.samples, own.test_samples) == (len(ds.train), len(ds.test))
        np.testing.assert_array_equal(program._data.train.inputs, ds.train_inputs)
        found.append(agreement.parse(own.description))
    assert not agreement.differences(*found)  # and they may train together
    parts = OwnParts(cfg, agreement.summary_of(found[0]), SERVER)
    schedule = served_folder.describe(cfg, parts, 11, 3, found[0]).schedule
    assert schedule.own_tests and schedule.tested_samples == 2 * 3
    other = ClientProgram(ClientOptions(client_id=0, **options))._load(cfg)
    differing = agreement.differences(agreement.parse(other.description), found[0])
    assert differing == "own_tests is None here and True there (all clients have --own-data, or none has)"
    first = {"state": str(tmp_path / "state0"), "data_dir": str(tmp_path / "0")}
    share = ClientProgram(ClientOptions(client_id=0, **first))._load(cfg)  # both have forgotten --own-data
    differing = agreement.differences(*(agreement.parse(one.description) for one in (share, other)))
    why = agreement._HELP["hash of shared data"]
    assert re.fullmatch(r"hash of shared data is '\w{16}' here and '\w{16}' there" + re.escape(why), differing)
    assert "clients with data of their own have --own-data" in why
    checked = []
    monkeypatch.setattr(client_program, "check_labels", lambda spec, ds: checked.append((spec.task.name, ds.name)))
    program.session.name = RUN
    program._load(cfg)
    assert checked == [("classification", "people.csv")]
    frame.iloc[8:].to_csv(tmp_path / "1" / "people.csv", index=False)
    program._load(cfg)  # it has not begun
    program._write_digests()
    program._load(cfg)
    program._options = dataclasses.replace(program._options, own_data=False)
    with pytest.raises(ValueError, match=r"or --own-data was given at one time and not at another"):
        program._load(cfg)
    file, digests = program._digests
    file.write_text(json.dumps(json.loads(digests)[:2]))  # of an earlier version, which did not say
    program._load(cfg)
    program._options = dataclasses.replace(program._options, own_data=True)
    frame.iloc[9:].to_csv(tmp_path / "1" / "people.csv", index=False)
    with pytest.raises(
        ValueError, match=r"the data must be those with which this client began the run, as .*data tells"
    ):
        program._load(cfg)


def test_parties_with_rows_of_one_table_share_its_format(people, tmp_path):
    path, frame = people
    table_format = data.TableFormat.measure(frame, label="rich")
    same = data.TableFormat.from_json(table_format.to_json())
    assert same == table_format
    whole = data.from_csv(path, label="rich", test_share=None)
    frame.iloc[10:16].to_csv(tmp_path / "part.csv", index=False)
    part = data.from_csv(tmp_path / "part.csv", table_format=same, test_share=None)
    np.testing.assert_array_equal(part.train_inputs, whole.train_inputs[10:16])
    assert part.num_classes == 2


def test_parties_whose_columns_differ_do_not_agree(people, tmp_path):
    """Clients with rows of their own see other texts, or values missing elsewhere, in as many columns."""
    _, frame = people
    descriptions = []
    for jobs in (["cook", "nurse"], ["cook", "smith"], ["cook", "nurse"]):
        frame.assign(job=np.resize(jobs, 40)).to_csv(tmp_path / "own.csv", index=False)
        summary = build.DataSummary.of(data.from_csv(tmp_path / "own.csv", label="rich"))
        text = agreement.describe(types.SimpleNamespace(describe=dict), summary)
        assert "nurse" not in text and agreement.summary_of(agreement.parse(text)).input_shape == (7,)
        descriptions.append(agreement.parse(text))
    assert agreement.differences(descriptions[0], descriptions[1]).startswith("hash of column names is ")
    assert agreement.differences(descriptions[0], descriptions[2]) == ""


def test_classes_that_not_every_client_has(people, tmp_path):
    """Clients that number other classes alike do not agree; those that name all do, and number each as the others."""
    _, frame = people

    def described(grades, **options):
        frame.assign(grade=np.resize(grades, 40)).to_csv(tmp_path / "own.csv", index=False)
        ds = data.from_csv(tmp_path / "own.csv", label="grade", test_share=None, **options)
        text = agreement.describe(types.SimpleNamespace(describe=dict), build.DataSummary.of(ds))
        assert "bad" not in text
        return ds.train_labels[:2].tolist(), agreement.parse(text)

    (good_bad, one), (good_fair, other) = described(["good", "bad"]), described(["good", "fair"])
    assert good_bad == [1, 0] and good_fair == [1, 0]
    assert agreement.differences(one, other).startswith("hash of class names is ")
    (good_bad, one), (good_fair, other) = (
        described(grades, classes=("good", "fair", "bad")) for grades in (["good", "bad"], ["good", "fair"])
    )
    assert good_bad == [0, 2] and good_fair == [0, 1] and agreement.differences(one, other) == ""
    del other["data"]["hash of class names"]  # as of data whose classes have no names, or an earlier version's
    assert agreement.differences(one, other) == agreement.differences(other, one) == ""
    with pytest.raises(
        data.DataError, match=r"'grade' must be one of the classes .*\(good, fair\), got 'bad' in row 2"
    ):
        described(["good", "bad"], classes=("good", "fair"))


@pytest.mark.parametrize("mark", ["1.7976931348623157e308", "3.4e38", "-1e30"])
@pytest.mark.parametrize("missing", ["refuse", "median"])
def test_a_mark_for_what_is_missing_leaves_nothing_of_the_others(people, mark, missing):
    path, _ = people
    change(path, 3, "age", mark)
    told = r"people.csv: column 'age' must have numbers that float32 tells apart .* got -?[1-3].*e\+.* beside [2-6]"
    with pytest.raises(data.DataError, match=told):
        data.from_csv(path, label="rich", missing=missing, test_share=None)
    inputs = np.float64([[n] for n in range(39)] + [[float(mark)]])
    with pytest.raises(data.DataError, match="column '0' must have numbers that float32 tells apart"):
        data.from_arrays((inputs, np.arange(40) % 2), normalize=True)
    if "e308" in mark:
        with pytest.raises(data.DataError, match=r"inputs must have a finite mean and std, got numbers up to 1\.797"):
            data.from_arrays((inputs[:, :, None], np.arange(40) % 2), normalize=True)


def test_a_text_among_numbers_is_told(people, caplog):
    """All of the column are texts then."""
    path, _ = people
    change(path, 8, "age", "?")
    ds = data.from_csv(path, label="rich", test_share=None)
    assert any(column.name == "age" and "?" in column.texts for column in ds.columns)
    said = "column 'age': most of its values are numbers, but all are taken for texts because of '?' in row 8"
    assert caplog.messages == [said]


def test_what_is_wrong_in_the_test_file_is_told_of_it(people, tmp_path):
    path, frame = people
    test = tmp_path / "test.csv"
    for wrong, told in (
        (frame.assign(age=["x", *frame.age[1:]]), "column 'age' must be numbers: got 'x' in row 1"),
        (frame.drop(columns="age"), "the table has no column 'age'"),
    ):
        wrong.to_csv(test, index=False)
        with pytest.raises(data.DataError, match=f"^{test}: {told}"):
            data.from_csv(path, label="rich", test=test)


def test_errors(people, tmp_path, monkeypatch, unchecked):
    path, _ = people
    with pytest.raises(data.DataError, match="the table has no column 'label'; it has 'second', 'age', "):
        data.from_csv(path)
    with pytest.raises(
        data.DataError, match="column 'job' must be numbers or at most 2 different texts, got 3 such as 'cook'"
    ):
        data.from_csv(path, label="rich", most_texts=2)
    change(path, 4, "age", "forty")
    with pytest.raises(data.DataError, match=r"column 'age' must be .*or is 'forty' a mistake among numbers"):
        data.from_csv(path, label="rich", most_texts=2, test_share=None)
    with pytest.raises(data.DataError, match='missing must be "refuse" or "median"'):
        data.from_csv(path, label="rich", missing="mean")
    with pytest.raises(data.DataError, match=r"label must be the name of a column, got \['rich'\]"):
        data.from_csv(path, label=["rich"])
    with pytest.raises(data.DataError, match=r"test_share must be between 0 and 1, .*, got '0\.2'"):
        data.from_csv(path, label="rich", test_share="0.2")
    path.write_text("a,b\n")
    with pytest.raises(data.DataError, match="must have rows below the line of names"):
        data.from_csv(path, label="a")
    with pytest.raises(data.DataError, match=r"nowhere.csv cannot be read as a CSV file"):
        data.from_csv(tmp_path / "nowhere.csv", label="a")
    # Which pandas would shift by a column; the second has the index of a table without names of rows.
    for rows, line in (
        ("1,2,3\n1,2,3", 2),
        ("0,2,3\n1,2,3", 2),
        ("x,2,\ny,2,", 2),
        ("1,2,3", 2),
        ("1,2,3,4\n2,2,3,4", 2),
        ("1,2\n1,2,3", 3),
    ):
        path.write_text(f"a,b\n{rows}\n")
        with pytest.raises(data.DataError, match=f"people.csv cannot be .* 2 fields in line {line}, saw [34]"):
            data.from_csv(path, label="a")
    path.write_text(",a,b\n0,1,2\n1,2,3\n")  # as pandas writes a frame
    with pytest.raises(data.DataError, match="every column must have a name, got one without, 'Unnamed: 0'"):
        data.from_csv(path, label="a", test_share=None)
    assert data.from_csv(path, label="a", test_share=None, drop=["Unnamed: 0"]).train_inputs.shape == (2, 1)
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(data.DataError, match=r"people.csv must have another name for each column, got 'a' twice"):
        data.from_csv(path, label="a")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("NA,NA\n1,2\n",))
    writer.start()
    with pytest.raises(data.DataError, match=r"pipe must have another name for each column, got 'NA' twice"):
        data.from_csv(pipe, label="a")
    writer.join()
    forbid(monkeypatch, "pandas")
    with pytest.raises(data.DataError, match=r"needs pandas.*pip install 'msjax\[tables\]'"):
        data.from_csv(path, label="a")


def test_a_frame_of_mixed_columns_and_one_that_is_no_number():
    frame = pandas.DataFrame({"a": [0.5, 1.5], "b": [True, False], "c": pandas.array([1, 2], "Int64")})
    found = data.from_arrays((frame, [0, 1]))
    np.testing.assert_array_equal(found.train_inputs, np.float32([[0.5, 1, 1], [1.5, 0, 2]]))
    with pytest.raises(data.DataError, match=r"train inputs must be numbers, got object .*'x' in column 'd'"):
        data.from_arrays((frame.assign(d=["x", "y"]), [0, 1]))
    with pytest.raises(
        data.DataError, match=r"got one DataFrame: give \(table.drop\(columns=LABEL\), table\[LABEL\]\)"
    ):
        data.as_dataset(frame)


def test_integers_are_classes_where_a_command_classifies(tmp_path):
    """Few of them; not floats, and not of a regression."""
    path = tmp_path / "t.csv"
    build_ = lambda task: build.load_data(  # noqa: E731
        config.Config(data=config.DataConfig(str(path), label="y"), task=config.TaskConfig(task))
    )
    path.write_text("a,y\n" + "".join(f"{n}.5,{n % 3 + 1}\n" for n in range(30)))
    found = build_("classification")
    assert found.num_classes == 3 and found.classes == ("1", "2", "3") and set(found.train.labels()) == {0, 1, 2}
    assert build_("regression").num_classes is None
    path.write_text(path.read_text() + "1.5,?\n2.5,2\n")
    with pytest.raises(data.DataError, match=r"column 'y' must be numbers .*, as for regression, got '\?' in row 31"):
        build_("regression")
    path.write_text("a,y\n" + "".join(f"{n}.5,{n % 3 + 1}\n" for n in range(30)))
    path = path.rename(tmp_path / "T.CSV")
    assert build.load_data(config.Config(data=config.DataConfig(str(path), label="y"))).classes == ("1", "2", "3")
    named = config.DataConfig(str(path), label="y", classes=("0", "1", "2", "3"))
    found = build.load_data(config.Config(data=named))
    assert found.classes == named.classes and set(found.train.labels()) == {1, 2, 3}
    path.write_text("a,y\n" + "".join(f"{n}.5,{n}\n" for n in range(150)))
    assert build_("classification").num_classes is None
    path.write_text("a,y\n" + "".join(f"{n}.5,{n % 3 + 0.5}\n" for n in range(30)))
    assert build_("classification").num_classes is None
