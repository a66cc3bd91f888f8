"""What a shell completes."""

import contextlib
import io
import shutil
import subprocess

import pytest

from msjax.cli import completion
from msjax.cli import main as cli

OPTIONS = {"train": {"--optim.kind": ("sgd", "adamw"), "--out": ()}, "client": {"--server": ()}}


def run(*arguments):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.run("completion", list(arguments)) == 0
    return text.getvalue()


def test_bash_completes_commands_options_and_choices():
    found = run("bash")
    assert all(f" {command}" in found or f'"{command}' in found for command in cli.COMMANDS)
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    for words, expected in (
        ("msjax tr", "train"),
        ("msjax train --optim.k", "--optim.kind"),
        ("msjax train --optim.kind s", "sgd"),
        ("msjax train --optim.kind = a", "adamw"),  # as bash splits it
        ("msjax train --data.data-dir x", ""),  # a file
        ("msjax serve --par", "--part"),
        ("msjax client --en", "--encoder"),
        ("msjax eval --se", "--server"),
        ("msjax models --fi", "--first-block"),
        ("msjax completion --h", "--help"),
    ):
        code = f"{found}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _msjax; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected and not done.stderr, words


def test_zsh_takes_bashs_and_fish_has_a_line_for_each_option():
    assert completion.script("zsh", OPTIONS).endswith(completion.script("bash", OPTIONS))
    lines = completion.script("fish", OPTIONS).splitlines()
    assert lines == [
        "complete -c msjax -n __fish_use_subcommand -x -a 'train client'",
        "complete -c msjax -n '__fish_seen_subcommand_from train' -l optim.kind -x -a 'sgd adamw'",
        "complete -c msjax -n '__fish_seen_subcommand_from train' -l out",
        "complete -c msjax -n '__fish_seen_subcommand_from client' -l server",
    ]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_reads_its_script(tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(completion.script(shell, OPTIONS))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_another_shell_is_refused(capsys):
    assert cli.run("completion", ["csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
