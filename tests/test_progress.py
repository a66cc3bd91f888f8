"""What a person sees of a run while it trains."""

import errno
import io
import re
import warnings

import nbclient
import nbformat
import pytest
import rich.console

from msjax.runs import plots
from msjax.runs.progress import Console, Pace, Progress

from .memory_network import Clock

RECORD = {"epoch": 1, "train": {"loss": 1.0, "top1_percent": 50.0}}


def shown(clock, total=20, done=0):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=80)
    options = {"headline": "top1_percent", "total_steps": total, "done_steps": done, "samples_per_step": 8.0}
    return Progress("net", clock=clock, console=console, **options), out


def test_the_first_step_of_a_shape_is_not_in_the_speed():
    """Each compiles for a minute; the others take a second, of eight samples each."""
    clock = Clock()
    pace = Pace(clock)
    assert pace.status(100) == "compiling …"
    for shape, seconds in ((10, 60.0), (10, 1.0), (10, 1.0), (5, 60.0), (5, 1.0)):
        clock.now += seconds
        pace.step(1, 8, shape)
    assert pace.status(120) == "8 samples/s, 2.0 min left"


def test_lines_that_nobody_reads_do_not_end_a_training(caplog):
    """As behind `head`, which ends when it has read enough."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    clock = Clock()
    options = {"headline": "top1_percent", "total_steps": 20, "done_steps": 0, "samples_per_step": 8.0}
    with Progress("net", clock=clock, console=Console(file=Closed()), **options) as bar:
        for _ in range(2):
            clock.now += 61.0
            bar.step(1, None)
            bar.epoch(RECORD, 2, 0)
    assert [record.message for record in caplog.records] == [
        "nobody reads the standard output any more; training goes on"
    ]


def test_steps_have_samples_of_their_own_and_waits_are_not_in_the_speed():
    clock = Clock()
    pace = Pace(clock)
    for samples in (20, 20, 20, 10):  # as where a client is away in the last
        clock.now += 1000.0
        pace.begin(clock.now)
        clock.now += 1.0
        pace.step(1, samples, 10)
    assert pace.status(60) == "17 samples/s, 1.0 min left"


def test_events_are_written_until_they_cannot_be(tmp_path, caplog, monkeypatch):
    with plots.tensorboard(tmp_path / "a" / "b", first_epoch=1) as write:
        write(RECORD)
        (file,) = (tmp_path / "a" / "b").iterdir()
        kept = file.read_bytes()
        assert file.name.startswith("events.out.tfevents.") and kept.count(b"train/top1_percent") == 1
        assert b"\x10\x01:\x02\x08\x01" in kept, "the start of a session at step 1, from where events are dropped"

        def full(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
            write(RECORD | {"epoch": 2})
            write(RECORD | {"epoch": 3})
    (tmp_path / "file").write_text("")
    with plots.tensorboard(tmp_path / "file", first_epoch=1) as write:
        write(RECORD)
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        "no TensorBoard events from here on"
    ] * 2


def test_time_left_counts_the_ends_of_epochs_but_the_first_which_compiles():
    clock = Clock()
    pace = Pace(clock)
    pace.step(1, 8, 10)
    for seconds in (100.0, 3.0):
        clock.now += 3.0
        pace.step(3, 24, 10)
        clock.now += seconds
        pace.epoch()
    assert pace.status(60) == "8 samples/s, 1.5 min left"


def test_an_epochs_line_says_test_once_and_only_where_there_was_one():
    clock = Clock()
    bar, out = shown(clock)
    with bar:
        for epoch in (1, 2):
            for _ in range(2):
                clock.now += 1.0
                bar.step(1, 3_000_000)
            tested = {"test": {"loss": 1.0, "top1_percent": 75.0}} if epoch == 1 else {}
            bar.epoch(RECORD | {"epoch": epoch} | tested, 2, 3_000_000)
        clock.now += 61.0
        bar.step(1, 3_000_000)
        clock.now += 61.0
        bar.step(1, None)
    first, *lines = out.getvalue().splitlines()
    assert first == "net: 20 steps to go, the first compiles"
    assert lines[0] == (
        "net epoch 1/2: loss 1.0000, train 50.00 %, test 75.00 %, 8 samples/s, 0.3 min left, 3.0 MB sent"
    )
    assert "test" not in lines[1]
    assert lines[2].startswith("net step 5/20: ") and lines[2].endswith("3.0 MB sent, test 75.00 %")
    assert lines[3].startswith("net step 6/20: ") and lines[3].endswith("min left, test 75.00 %")


BAR = """
from msjax.runs.progress import Progress
with Progress("net", headline="top1_percent", total_steps=2, done_steps=0, samples_per_step=8.0) as bar:
    bar.step(2, 3_000_000)
    bar.epoch({"epoch": 1, "train": {"loss": 1.0, "top1_percent": 50.0}}, 1, 3_000_000)
"""


def test_a_notebook_shows_plain_lines():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BAR)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how nbclient runs its event loop is its own affair
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for output in notebook.cells[0].outputs if output.get("name") != "stderr"]
    assert {output["output_type"] for output in outputs} == {"stream"}
    text = "".join(output["text"] for output in outputs)
    assert text.splitlines() == [
        "net: 2 steps to go, the first compiles",
        "net epoch 1/1: loss 1.0000, train 50.00 %, 0.0 min left, 3.0 MB sent",
    ]


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_honoured(monkeypatch, capsys, colours):
    """https://no-color.org: an environment variable with any value but an empty one."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "" if colours else "1")
    with Progress("net", headline="top1_percent", total_steps=2, done_steps=0, samples_per_step=8.0) as bar:
        bar.step(1, 3_000_000)
    shown = capsys.readouterr().out
    assert "samples/s" in shown or "compiling" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", shown)) == colours
