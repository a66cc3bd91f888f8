"""A trained pair in use: predictions, from files to what is printed, and one file of the whole; as by hand."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, compress, config, data, models, pair, parts
from msjax.cli import main as cli
from msjax.cli.predict import describe
from msjax.data import _words
from msjax.distributed import remote
from msjax.distributed.options import LinkOptions
from msjax.runs import RunFolder
from msjax.split.trees import TreeSpec

from .data_helpers import Image
from .test_inference import served

CFG = config.Config(
    model=config.ModelConfig(width=0.25, cut="shallow"),
    data=config.DataConfig(name="photos", image_size=8),
    codec=compress.MaskEncoded(ratio=0.9),
    clients=2,
    batch_size=4,
)
TABLE = dataclasses.replace(
    CFG, model=config.ModelConfig(name="mlp", width=0.25, cut="shallow"), data=config.DataConfig(name="people.csv")
)


def save(path, cfg, summary, run_id="r"):
    """Both files, of a network that was never trained; returns its parts."""
    path.mkdir(exist_ok=True)
    client, server, *tail = build.make_parts(cfg, summary)
    mine = client
    if tail:
        mine = models.ModelPart(client.apply, client.params | tail[0].params, client.stats | tail[0].stats)
    for name, part in (("client", mine), ("server", server)):
        parts.save_trained(path / f"{name}.safetensors", name, part, cfg, summary, run_id=run_id, step=7)
    return client, server, *tail


def by_hand(made, x, codec):
    """Outputs of the parts one after the other, each input by itself through the codec."""
    found = []
    for one in x:
        h = jnp.asarray(one)[None]
        for n, part in enumerate(made):
            h = h if n == 0 else codec.roundtrip(h)
            h, _ = part.apply(part.params, part.stats, h, train=False)
        found.append(h[0])
    return np.stack(found)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of two classes, 8×8 grey, its data set, and a run's folder with both parts."""
    path = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path / "photos" / name / f"{i}.png")
    ds = data.from_image_folder(path / "photos", image_size=8, test_share=None)
    cfg = dataclasses.replace(CFG, out=str(path), data=dataclasses.replace(CFG.data, name=str(path / "photos")))
    folder = RunFolder.create(cfg, "a")
    made = save(folder.path, cfg, build.DataSummary.of(ds))
    return path, ds, made


def run(capsys, *arguments, expect=0):
    assert cli.run("predict", list(map(str, arguments))) == expect
    said = capsys.readouterr()
    return (said.out if expect == 0 else said.err).splitlines()


def test_outputs_are_those_of_the_parts(photos):
    """Whatever else is in the call: an input's features are compressed by themselves, unless a batch is wanted."""
    path, ds, made = photos
    loaded = pair.load_pair(path / "a")
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    found = pair.predict(loaded, ds.train_inputs)
    np.testing.assert_allclose(found, by_hand(made, x, CFG.codec), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pair.predict(loaded, ds.train_inputs[4:5]), found[4:5], rtol=1e-5, atol=1e-5)
    dense = pair.predict(loaded, ds.train_inputs, compressed=False)
    np.testing.assert_allclose(dense, by_hand(made, x, compress.Identity()), rtol=1e-5, atol=1e-5)
    together = pair.predict(loaded, ds.train_inputs, batch_size=4)  # four, then two
    h, _ = made[0].apply(made[0].params, made[0].stats, x, train=False)
    for rows in (slice(0, 4), slice(4, 6)):
        y, _ = made[1].apply(made[1].params, made[1].stats, CFG.codec.roundtrip(h[rows]), train=False)
        np.testing.assert_allclose(together[rows], y, rtol=1e-5, atol=1e-5)
    assert np.abs(together - found).max() > 1e-4
    with pytest.raises(ValueError, match=r"inputs must be uint8\[8, 8, 1\] each, as the network takes them, got float"):
        pair.predict(loaded, np.asarray(x))
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        pair.predict(loaded, ds.train_inputs, batch_size=0)
    with pytest.raises(ValueError, match=r"inputs must be arrays .*, got single numbers"):
        pair.predict(loaded, [1.0, 2.0])


def test_u_shaped(photos, tmp_path):
    _, ds, _ = photos
    cfg = dataclasses.replace(CFG, mode=config.ModeConfig(tail_cut="last"))
    made = save(tmp_path, cfg, build.DataSummary.of(ds))
    loaded = pair.load_pair(tmp_path / "client.safetensors", tmp_path / "server.safetensors")
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    np.testing.assert_allclose(pair.predict(loaded, ds.train_inputs), by_hand(made, x, CFG.codec), rtol=1e-4, atol=1e-5)


def test_images_are_named_with_their_labels(photos, tmp_path, capsys):
    path, ds, _ = photos
    outputs = pair.predict(pair.load_pair(path / "a"), ds.train_inputs)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    files = sorted((path / "photos").rglob("*.png"))
    expected = [
        f"{file}\t{('cat', 'dog')[p.argmax()]}\t{p.max():.4f}" for file, p in zip(files, probabilities, strict=True)
    ]
    assert run(capsys, path / "a", path / "photos") == expected
    given = [path / "a" / f"{name}.safetensors" for name in ("client", "server")]
    assert run(capsys, *given, files[3], files[0]) == [expected[3], expected[0]]
    assert run(capsys, path / "a", path / "photos", "--out", tmp_path / "lines", "--json") == []
    records = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [r["input"] for r in records] == list(map(str, files)) and records[0]["label"] in ("cat", "dog")
    np.testing.assert_allclose([r["probabilities"] for r in records], probabilities, rtol=1e-4)
    np.savez(tmp_path / "x.npz", x=ds.train_inputs, y=ds.train_labels)
    assert [line.split("\t")[1:] for line in run(capsys, path / "a", tmp_path / "x.npz")] == [
        line.split("\t")[1:] for line in expected
    ]
    # As the set's own loader resizes and crops.
    large = np.random.default_rng(1).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    (tmp_path / "large" / "cat").mkdir(parents=True)
    Image.fromarray(large).save(tmp_path / "large" / "cat" / "0.png")
    own = data.from_image_folder(tmp_path / "large", image_size=8, channels=1, test_share=None).train_inputs
    found = data.read_inputs(tmp_path / "large", like=ds.input_like)
    np.testing.assert_array_equal(found.fetch(0, 1), own)


@pytest.mark.parametrize("mode", [config.ModeConfig(), config.ModeConfig(tail_cut="last")], ids=["plain", "u_shaped"])
def test_the_servers_part_elsewhere(photos, tmp_path, capsys, mode):
    """The same lines as with both parts here, and class names and inputs stay here."""
    path, ds, _ = photos
    cfg, summary = dataclasses.replace(CFG, mode=mode), build.DataSummary.of(ds)
    save(tmp_path, cfg, summary)
    save(tmp_path / "other", cfg, summary, run_id="s")
    client, server = (tmp_path / f"{name}.safetensors" for name in ("client", "server"))
    images = path / "photos"
    with served(tmp_path) as address:
        for options in ([], ["--uncompressed"], ["--batch-size", "4"]):
            expected = run(capsys, client, server, images, *options)
            assert run(capsys, client, "--server", address, *options, images) == expected
        options = ["--json", "--compression", "huffman", "--out", tmp_path / "lines"]
        run(capsys, "--server", address, client, images, *options)
        lines = (tmp_path / "lines").read_text().splitlines()
        for pair_of_lines in zip(run(capsys, client, server, images, "--json"), lines, strict=True):
            here, there = map(json.loads, pair_of_lines)
            np.testing.assert_allclose(there.pop("probabilities"), here.pop("probabilities"), rtol=1e-5)
            assert there | {"probability": None} == here | {"probability": None}
        link = LinkOptions(server=address)
        refusal = "pair must have both parts here, got one whose server's part is elsewhere"
        with (
            remote.connected_pair(parts.load_part(client), link) as connected,
            pytest.raises(ValueError, match=refusal),
        ):
            pair.whole(connected)
        for arguments, message in (
            ([server, "--server", address, images], "part must be that of a client, got that of a server"),
            ([path / "a", "--server", address, images], "network must be CLIENT.safetensors with --server, got"),
            ([client, server, "--server", address, images], "inputs must come behind CLIENT.safetensors with --server"),
            ([tmp_path / "other/client.safetensors", "--server", address, images], "of one run, got 's' here and 'r'"),
            (
                [client, "--server", "localhost:1", tmp_path / "none.png"],
                "none.png does not exist",
            ),  # before it connects
            ([client, "--serv", address, images], "unrecognized arguments: --serv"),
            ([client, server, images, "--out", tmp_path], "out must be a file that can be written, got"),
        ):
            assert message in run(capsys, *arguments, expect=2)[-1]


def test_what_was_computed_before_an_error_is_kept(photos, tmp_path, capsys, monkeypatch):
    path, _, _ = photos
    monkeypatch.setattr(pair, "CHUNK", 2)
    shutil.copytree(path / "photos", tmp_path / "photos")
    (tmp_path / "photos/dog/1.png").write_bytes(b"no image")
    out = tmp_path / "lines"
    said = run(capsys, path / "a", tmp_path / "photos", "--out", out, expect=2)
    assert said[0] == f"msjax predict: 4 lines in {out}.partial" and "dog/1.png" in said[1] and not out.exists()
    expected = run(capsys, path / "a", tmp_path / "photos/cat", tmp_path / "photos/dog/0.png")
    assert (tmp_path / "lines.partial").read_text().splitlines() == expected
    run(capsys, path / "a", path / "photos", "--out", out)
    assert out.exists() and not (tmp_path / "lines.partial").exists()


def test_rows_of_a_table(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [(20 + 5 * rng.normal(), ("cook", "nurse")[i % 2], ("no", "yes")[i % 3 == 0]) for i in range(12)]
    lines = [f"{age},{job},{label}" for age, job, label in rows]
    (tmp_path / "people.csv").write_text("\n".join(["age,job,label", *lines]))
    ds = data.from_csv(tmp_path / "people.csv", test_share=None)
    assert ds.classes == ("no", "yes")
    made = save(tmp_path, TABLE, build.DataSummary.of(ds))
    given = [tmp_path / f"{name}.safetensors" for name in ("client", "server")]
    (tmp_path / "new.csv").write_text("\n".join(["job,age", *(f"{job},{age}" for age, job, _ in rows)]))
    expected = by_hand(made, ds.train_inputs, CFG.codec)
    found = run(capsys, *given, tmp_path / "new.csv")
    assert [line.split("\t")[:2] for line in found] == [
        [f"{tmp_path / 'new.csv'}:{i + 1}", ds.classes[y.argmax()]] for i, y in enumerate(expected)
    ]
    (tmp_path / "less.csv").write_text("age\n1\n")
    (error,) = run(capsys, *given, tmp_path / "less.csv", expect=2)
    assert error == f"msjax predict: {tmp_path / 'less.csv'}: the table has no column 'job'; it has 'age'"
    (tmp_path / "empty.csv").write_text("age,job\n")
    (error,) = run(capsys, *given, tmp_path / "empty.csv", expect=2)
    assert error == f"msjax predict: {tmp_path / 'empty.csv'} must have rows below the line of names, got none"
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 2)))
    assert "x.npz must be a .csv file, as the network" in run(capsys, *given, tmp_path / "x.npz", expect=2)[0]


def test_numbers_of_a_regression(tmp_path, capsys):
    x = np.random.default_rng(0).normal(50, 3, (6, 4))
    ds = data.from_arrays((x, x[:, :2].astype(np.float32)), normalize=True)
    cfg = dataclasses.replace(TABLE, task=config.TaskConfig(name="regression"))
    made = save(tmp_path, cfg, build.DataSummary.of(ds))
    np.savez(tmp_path / "x.npz", x)
    given = [tmp_path / f"{name}.safetensors" for name in ("client", "server")]
    expected = by_hand(made, ds.train_inputs, CFG.codec)
    found = run(capsys, *given, tmp_path / "x.npz")
    np.testing.assert_allclose([[float(v) for v in line.split("\t")[1:]] for line in found], expected, rtol=1e-3)
    np.savez(tmp_path / "x.npz", x[:, :3])
    assert "must have 4 columns, got the shape [6, 3]" in run(capsys, *given, tmp_path / "x.npz", expect=2)[0]
    np.savez(tmp_path / "x.npz", x[0])
    assert "along its first axis, got the shape [4] of one" in run(capsys, *given, tmp_path / "x.npz", expect=2)[0]
    np.savez(tmp_path / "x.npz", x[:0])
    assert "x.npz must have inputs, and has none" in run(capsys, *given, tmp_path / "x.npz", expect=2)[0]


def test_one_input_without_an_axis_of_inputs(tmp_path):
    grey, colour = (1, [(4, 4), (4, 4, 1)], [(3, 4, 4), (3, 4, 4, 1)]), (3, [(4, 4, 3)], [(3, 4, 4, 3)])
    for channels, of_one, of_three in (grey, colour):
        like = jax.ShapeDtypeStruct((4, 4, channels), np.uint8)
        for shape in of_one:
            np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
            with pytest.raises(data.DataError, match="must have inputs along its first axis"):
                data.read_inputs(tmp_path / "x.npz", like=like)
        for shape in of_three:
            np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
            assert len(data.read_inputs(tmp_path / "x.npz", like=like).names) == 3


def test_texts_become_the_words_that_were_trained_on(tmp_path):
    # With the mark that some editors write, and what is a line's end to Unicode alone.
    (tmp_path / "x.txt").write_text("\ufeffGood \u2028 movie\na good one\n")
    like = jax.ShapeDtypeStruct((4,), np.dtype("int32"))
    found = data.read_inputs(tmp_path / "x.txt", like=like, is_text=True, vocabulary=100)
    words = found.fetch(0, 2)
    assert words.shape == (2, 4) and words[0, 0] == words[1, 1] and found.names[1].endswith("x.txt:2")
    assert data.TOKENIZER == _words.TOKENIZER
    with pytest.raises(data.DataError, match=r"x.txt must be a .csv or .npz file: the network takes int32\[4\]"):
        data.read_inputs(tmp_path / "x.txt", like=like)


def test_what_outputs_say():
    found = describe("multi_label", np.float32([2.0, -1.0, 0.5]), None)
    assert found["labels"] == [0, 2] and found["probabilities"][0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert describe("classification", np.float32([0, 1000]), None)["label"] == "1"
    assert describe("regression", np.float32([1.5]), None) == {"outputs": [1.5]}
    assert describe("segmentation", {"a": np.zeros((1, 2))}, None) == {"outputs": {"a": [[0.0, 0.0]]}}


def test_class_names_stay_in_the_clients_part(photos):
    _, ds, _ = photos
    summary = build.DataSummary.of(ds)
    assert summary.classes == ("cat", "dog")
    assert build.DataSummary.from_json(summary.to_json()).classes == summary.classes
    with pytest.raises(data.DataError, match=r"classes of .* must be as many as num_classes, 2, got 1"):
        data.as_dataset(dataclasses.replace(ds, classes=("cat",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none.png"], "none.png does not exist"),
        (["a", "a"], "a must hold images ("),
        (["a", "a/config.json"], "a/config.json must be an image, a folder or an .npz file: the network takes uint8[8"),
        (["none", "photos"], "the run must be a folder with config.json, got 'none'"),
        (["b", "photos"], "the run must be finished, got 'b' without client.safetensors: msjax train --resume b"),
        (["c", "photos"], "the run must be one of msjax train, got 'c' of msjax serve, whose clients have their parts"),
        (["a/server.safetensors", "a/server.safetensors", "photos"], "client must be the file of a client's part, got"),
        (["a/client.safetensors", "x/server.safetensors", "photos"], "the parts must be of one run, got 'r' of the cl"),
        (["a/client.safetensors", "none.safetensors", "photos"], "server must be a file that can be read, got 'none.s"),
        (["a", "photos", "--out", "none/x"], "--out must be a file that can be written, got 'none/x': its folder"),
        (["a", "photos", "--batch-size", "0"], "--batch-size must be an integer of at least 1, got 0"),
        (
            ["a", "photos", "--tokenizer", "t"],
            "--tokenizer must be None where no tokenizer.json splits the inputs, got",
        ),
    ],
)
def test_errors_say_what_is_wrong(photos, monkeypatch, capsys, arguments, message):
    path, ds, _ = photos
    monkeypatch.chdir(path)
    for name in ("b", "c", "x"):
        if not (path / name).exists():
            RunFolder.create(dataclasses.replace(CFG, out=str(path)), name)
    (path / "c" / "run").write_text("r")
    if not (path / "x" / "server.safetensors").exists():
        server = build.make_parts(CFG, build.DataSummary.of(ds))[1]
        file = path / "x" / "server.safetensors"
        parts.save_trained(file, "server", server, CFG, build.DataSummary.of(ds), run_id="s", step=7)
    (error,) = run(capsys, *arguments, expect=2)
    assert error.startswith(f"msjax predict: {message}")


def test_a_task_whose_outputs_are_no_line(photos, tmp_path, capsys):
    path, ds, _ = photos
    summary = build.DataSummary.of(ds)._replace(labels=TreeSpec.of(jax.ShapeDtypeStruct((3,), np.dtype("int32"))))
    cfg = dataclasses.replace(CFG, task=config.TaskConfig(name="multi_label"))
    save(tmp_path, cfg, summary)
    given = [tmp_path / f"{name}.safetensors" for name in ("client", "server")]
    for line in run(capsys, *given, path / "photos"):
        assert all(cell == "none" or ":" in cell for cell in line.split("\t")[1:])


@pytest.mark.parametrize("mode", [config.ModeConfig(), config.ModeConfig(tail_cut="last")], ids=repr)
def test_one_file_of_the_whole_network(photos, tmp_path, capsys, mode):
    _, ds, _ = photos
    model = dataclasses.replace(CFG.model, cut_before_activation=True)
    cfg = dataclasses.replace(CFG, mode=mode, model=model)
    made = save(tmp_path, cfg, build.DataSummary.of(ds))
    given = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    out = tmp_path / "network.safetensors"
    assert cli.run("export", [*given, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"convnet of step 7 in msjax's names: {out}\n"
    network = parts.load_part(out)
    assert (network.part, network.run_id, network.step) == ("network", "r", 7) and network.summary.classes
    x = data.normalize(jnp.asarray(ds.train_inputs), ds.mean, ds.std)
    expected, chain = x, [(part.apply, part.params, part.stats) for part in made]
    for apply, params, stats in chain:
        expected, _ = apply(params, stats, expected, train=False)
    found, _ = network.apply(network.params, network.stats, x, train=False)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"x must be what the network's part takes, float32\[B, 8, 8, 1\]"):
        network.apply(network.params, network.stats, x[..., 0], train=False)
    assert cli.run("export", [*given, "--out", str(out), "--names", "pytorch"]) == 2
    assert "model must be one that has names in PyTorch, vgg19, resnet18" in capsys.readouterr().err
    assert cli.run("export", [given[0], "--out", str(out)]) == 2
    assert cli.run("export", [str(out), given[1], "--out", str(out)]) == 2
    assert "client must be the file of a client's part, got that of a network" in capsys.readouterr().err


def test_one_file_in_pytorchs_names(photos, tmp_path, capsys):
    path, ds, _ = photos
    model = config.ModelConfig(name="resnet20", width=0.25, cut="medium")
    cfg = dataclasses.replace(CFG, model=model, out=str(path))
    folder = RunFolder.create(cfg, "resnet")
    client, server = save(folder.path, cfg, build.DataSummary.of(ds))
    out = tmp_path / "resnet.safetensors"
    assert cli.run("export", [str(folder.path), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"resnet20 of step 7 in pytorch's names: {out}"
    assert said[1] == f"pixels / 255 are normalised by mean {ds.mean[0]:.6g} and std {ds.std[0]:.6g}"
    network = models.load_weights(out, build.make_model(cfg, build.DataSummary.of(ds)))
    for whole in (network, pair.whole(pair.load_pair(folder.path))):
        for tree, first, second in (
            (whole.params, client.params, server.params),
            (whole.stats, client.stats, server.stats),
        ):
            jax.tree.map(np.testing.assert_array_equal, tree, first | second)
    assert cli.run("export", [str(folder.path), "--out", str(tmp_path / "none" / "x")]) == 2
    assert "out must be a file that can be written, got" in capsys.readouterr().err


OWN = """
from flax import nnx
from msjax import config

def model():
    return nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.relu), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

def get_config():
    return config.Config(model=config.ModelConfig(name=":model"))
"""


def test_a_model_of_ones_own_keeps_its_parts_apart(tmp_path, capsys):
    """Whose arrays may have the same names."""
    (tmp_path / "own.py").write_text(OWN)
    cfg = config.load_preset(str(tmp_path / "own.py"))
    ds = data.from_arrays((np.float32([[0, 1], [2, 3], [4, 5]]), np.arange(3)))
    made = save(tmp_path, cfg, build.DataSummary.of(ds))
    given = [str(tmp_path / f"{name}.safetensors") for name in ("client", "server")]
    preset, out = ["--config", str(tmp_path / "own.py")], tmp_path / "network.safetensors"
    assert cli.run("export", [*given, "--out", str(out)]) == 2
    assert "is of a model of one's own: give `preset`, on the command line --config" in capsys.readouterr().err
    assert cli.run("export", [*given, *preset, "--out", str(out), "--names", "pytorch"]) == 2
    assert 'names must be "msjax" for a model of one\'s own' in capsys.readouterr().err
    assert cli.run("export", [*given, *preset, "--out", str(out)]) == 0
    network = parts.load_part(out, preset=cfg)
    assert set(network.params) == {"client", "server"} and parts.load_part(out).apply is None
    x = jnp.asarray(ds.train_inputs)
    found, _ = network.apply(network.params, network.stats, x, train=False)
    np.testing.assert_allclose(found, by_hand(made, ds.train_inputs, compress.Identity()), rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    np.savez(tmp_path / "x.npz", ds.train_inputs)
    lines = run(capsys, *given, *preset, "--uncompressed", tmp_path / "x.npz")
    assert [line.split("\t")[1] for line in lines] == [str(y.argmax()) for y in found]
