"""What is released: the wheel and the source distribution, and files that name the version."""

import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest

import msjax

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution of this tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_has_the_package_and_what_it_says_of_itself(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (file,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(wheel.read(file))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "msjax").rglob("*.py")}
    assert sources <= names and "msjax/py.typed" in names
    assert {f"msjax/data/embedded/{path.name}" for path in (ROOT / "msjax/data/embedded").glob("*.npz")} <= names
    assert not [name for name in names if not name.startswith(("msjax/", "msjax-"))]
    assert metadata["Version"] == msjax.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11" and metadata.get_payload().startswith("# msjax")
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_distribution_can_be_tested_and_documented(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "docs/conf.py",
        "experiments/RESULTS.md",
        "tests/test_release.py",
    }
    assert wanted <= names
    records = {str(path.relative_to(ROOT)) for path in (ROOT / "experiments" / "results").rglob("*.json")}
    assert {name for name in records if "/smoke/" not in name} <= names


def test_files_name_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == msjax.__version__
    assert f"## {msjax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_spelling():
    command = [sys.executable, "-m", "codespell_lib", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
    folders = ["docs", "msjax", "tests", "experiments", "benchmarks", "examples", "configs"]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
