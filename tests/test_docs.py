"""The documentation builds without a warning, its code runs, and its commands are such as there are."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

import jax
import pytest

import msjax
from experiments import everything, report
from msjax import build, compress, config
from msjax.cli import main as cli
from msjax.distributed import messages

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
TEXTS = [ROOT / "README.md", *PAGES]


def fences(path, kind):
    """The blocks of a page that are fenced with ```kind."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


NOTEBOOKS = [path for path in PAGES if path.parent.name == "notebooks" and path.stem != "index"]


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path):
    """It executes the notebooks, too: nothing else does."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", "docs", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "msjax.compress.straight_through" in (site / "reference" / "api" / "compress.html").read_text()
    assert "--data.data-dir" in (site / "reference" / "cli.html").read_text()
    for path in NOTEBOOKS:
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert 'src="../_images/' in page
        (link,) = re.findall(r'href="../(_downloads/[^"]*\.ipynb)"', page)
        cells = json.loads((site / link).read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert len(code) == len(fences(path, "{code-cell} ipython3")) and all(cell["execution_count"] for cell in code)
        outputs = [output for cell in code for output in cell["outputs"]]
        assert any("image/png" in output.get("data", {}) for output in outputs), f"{path.stem} shows no picture"


def test_a_page_becomes_a_notebook_without_the_site(tmp_path):
    """By the command that the page of notebooks gives."""
    text = (ROOT / "docs" / "notebooks" / "index.md").read_text()
    command, source, made = re.search(r"^(mystnb-to-jupyter) (\S+) (\S+)$", text, re.MULTILINE).groups()
    program = pathlib.Path(sys.executable).with_name(command)
    subprocess.run([program, source, tmp_path / made], cwd=ROOT, check=True, capture_output=True)
    cells = json.loads((tmp_path / made).read_text())["cells"]
    assert [cell["cell_type"] for cell in cells].count("code") == len(fences(ROOT / source, "{code-cell} ipython3"))


@pytest.mark.parametrize("path", [p for p in TEXTS if fences(p, "python")], ids=lambda p: p.stem)
def test_code_of_a_page_runs(path, tmp_path, monkeypatch):
    """One block after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {"__name__": "__main__"}
    for block in fences(path, "python"):
        exec(compile(block, str(path), "exec"), names)


@pytest.mark.slow
def test_the_preset_of_a_page_trains_and_the_parts_of_others_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "own_model.md"
    preset, optimizer, remote = fences(page, "python")[-3:]
    (with_it,) = re.findall(r"`(optim=config\.OptimConfig\(kind=.*\))`", page.read_text())
    without = "optim=config.OptimConfig(learning_rate=0.01)"
    assert preset.count(without) == 1
    (tmp_path / "mine.py").write_text(preset.replace(without, with_it) + optimizer + remote)
    assert cli.run("train", ["--config", "mine.py", "--epochs", "1", "--name", "mine"]) == 0
    assert "mae" in capsys.readouterr().out
    cfg = config.load_preset("mine.py")
    summary = build.DataSummary.of(build.load_data(cfg))
    for name in ("make_model_of_the_server", "make_model_of_a_client"):
        own = dataclasses.replace(cfg, model=config.ModelConfig(name=cfg.model.name.replace("make_model", name)))
        shapes = [build.build(each, summary, samples=100, test_samples=40)[0].features for each in (cfg, own)]
        assert shapes[0] == shapes[1]


def test_stated_sizes_are_right():
    code = fences(ROOT / "README.md", "python")[0]
    names = {}
    exec(code, names)
    stated = re.search(r"payload_bytes\(h\)\s+# (\d+), .* h has (\d+)", code)
    assert names["codec"].payload_bytes(names["h"]) == int(stated[1])
    assert names["h"].nbytes == int(stated[2])


def test_the_codec_table_names_every_codec_and_its_defaults():
    text = (ROOT / "docs" / "codecs" / "index.md").read_text()
    rows = re.findall(r"^\| \[`(\w+\(.*?\))`\]\((\w+)\.md\) \|", text, re.MULTILINE)
    assert {compress.from_string(row) for row, _ in rows} == {cls() for cls in compress.CODECS}
    assert all((ROOT / "docs" / "codecs" / f"{page}.md").exists() for _, page in rows)


def test_the_budget_of_a_page_is_the_one_of_the_results():
    """In Python and on the command line, what the records of the first table of results have."""
    page, found = ROOT / "docs" / "choosing.md", {}
    measured = everything.ARMS["averages 2 bits, 2.4 bits both ways"]
    exec(next(block for block in fences(page, "python") if "budget" in block), found)
    assert found["budget"] == measured
    words = shlex.split(next(block for block in fences(page, "console") if "--cut-bits" in block))
    assert "--grad-kept-only" in words and float(words[words.index("--cut-bits") + 1]) == measured["cut_bits"]
    for name in ("codec", "grad_codec", "update_codec"):
        value = words[words.index(f"--{name.replace('_', '-')}") + 1]
        assert compress.from_string(value) == measured[name], name


def test_the_page_on_repeating_the_paper_names_every_study():
    text = (ROOT / "docs" / "replication.md").read_text()
    together, alone = text.split("Each alone, by")
    for modules, part in ((report.STUDIES, together), (report.WITH_A_RECORD_OF_THEIR_OWN.values(), alone)):
        names = {module.__name__.rpartition(".")[2] for module in modules}
        cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", part, re.MULTILINE)
        assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} - {"smoke", "lite", "paper"} == names


def test_the_changelog_has_the_number_of_the_protocol():
    assert f"The protocol has a number, {messages.PROTOCOL}." in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.fixture(scope="module")
def options():
    """By command, the options that its help names; some have others where a part is elsewhere, or served."""
    found = {}
    parts = {f"{command} --server": [command, "--server", "x:1"] for command in ("eval", "predict", "generate")}
    parts["serve --part"] = ["serve", "--part", "x"]
    for name, (command, *arguments) in ({command: [command] for command in cli.COMMANDS} | parts).items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.run(command, [*arguments, "--help"])
        found[name] = set(re.findall(r"--[a-z][a-z0-9.-]*", text.getvalue()))
    found["eval"] |= found["train"]  # with a config in place of a run
    return found


OF_OTHERS = {"--gpus-per-task", "--file", "--only"} | {
    f"--{name}" for name in ["results", "steps", "codecs", "dtypes", "networks", "repeats", "requests", "state-only"]
}
"""Of Slurm and tfds, of studies and benchmarks."""


def test_options_that_pages_name_are_such_as_there_are(options):
    """In the text and in tables, where no command stands beside them."""
    known = set().union(*options.values(), OF_OTHERS)
    named = {path: set(re.findall(r"`(?:[^`\n]* )?(--[a-z][a-z0-9.-]*)", path.read_text())) for path in TEXTS}
    assert sum(map(len, named.values())) > 100
    assert {path.name: unknown for path, names in named.items() if (unknown := names - known)} == {}


def test_code_that_does_not_run_here_calls_what_there_is():
    blocks = [(path, block) for path in PAGES for block in fences(path, "{code-block} python")]
    assert len(blocks) >= 4
    for path, block in blocks:
        compile(block.removeprefix(":class: no-run\n"), str(path), "exec")
        for name in re.findall(r"\b(?:msjax|models|jax)(?:\.\w+)+", block):
            first, *rest = name.split(".")
            found = {"msjax": msjax, "models": msjax.models, "jax": jax}[first]
            for each in rest:
                found = getattr(found, each)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_commands_of_a_page_are_such_as_there_are(path, options):
    for block in fences(path, "console") + re.findall(r"(?:^    \S.*\n)+", path.read_text(), re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("  #")[0]
            for command, rest in re.findall(r"\bmsjax ([a-z]+)\b([^&;|]*)", line):
                assert command in cli.COMMANDS, line
                given = set(re.findall(r"(?<= )--[a-z][a-z0-9.-]*", rest))
                names = (command, *(f"{command} {option}" for option in given))
                unknown = given.difference({"--help"}, *(options.get(name, ()) for name in names))
                assert not unknown, f"{path.name}: {line.strip()} has {sorted(unknown)}"
            for module in re.findall(r"python -m ((?:experiments|benchmarks|msjax)[\w.]*)", line):
                assert importlib.util.find_spec(module), line


def test_a_benchmark_is_told_with_the_command_of_its_record():
    """As a page names it, the record beside it was made."""
    told = r"`(?:[A-Z_]+=\S+ |taskset -c 0 )?(python -m benchmarks\.[^`]+)`[^`]*`(benchmarks/results/[a-z0-9_]+\.json)`"
    found = [
        (" ".join(command.split()), record) for path in TEXTS for command, record in re.findall(told, path.read_text())
    ]
    assert len(found) >= 10
    for command, record in found:
        made = json.loads((ROOT / record).read_text())["command"]
        made = re.sub(r" --(out|cache-dir) \S+", "", made)  # where things lie
        assert sorted(command.split(" --")) == sorted(made.split(" --")), record


def test_files_that_pages_name_are_there():
    for path in [*TEXTS, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(
            r"`((?:configs|examples|benchmarks|experiments|docs|tests)/[\w./]+\.\w+)`", path.read_text()
        ):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_where_things_live_names_files_that_there_are_in_lines_of_a_screen():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [line for line in text.splitlines() if len(line) > 120] == []
    rooms = re.split(
        r"^\*\*|\. \*\*", text.partition("## Where things live")[2].partition("Imports point")[0], flags=re.M
    )
    named = 0
    for room in rooms[1:]:
        folder = re.match(r"`([\w/]+)/(?:\*\.py)?`", room)
        for name in re.findall(r"`(\w+\.py)`", room) if folder else ():
            assert any((ROOT / folder[1]).rglob(name)), f"{folder[1]}/{name}"
            named += 1
    assert named > 50


def anchors(path):
    """What links may point at in a page of the repository, as its host makes it of the headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w -]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository(path):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        other = path if not file else path.parent / file
        assert other.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{path.name}: {target}"


def test_a_page_that_includes_a_file_of_elsewhere_keeps_its_links():
    """Sphinx reads links of what a page includes as if the page had them; the whole build is a slow test."""
    for path in PAGES:
        for name, options in re.findall(r"^```\{include\} (\S+)\n(.*?)^```", path.read_text(), re.DOTALL | re.M):
            if "](docs/" in (path.parent / name).read_text():
                assert ":relative-docs: docs/" in options, path.name
