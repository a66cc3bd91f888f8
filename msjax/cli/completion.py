"""`msjax completion`: a script by which a shell completes commands, options and their choices."""

import argparse
import contextlib
import io
import re

from msjax.cli import main as cli

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_msjax() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$current" = "=" ]; then current=""; fi
  if [ "$before" = "=" ]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} $before" in
{choices}
      *)
        case "$current" in -*)
          case "${{COMP_WORDS[1]}}" in
{options}
          esac
        esac
    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=( $(compgen -W "$words" -- "$current") ); fi
}}
complete -o default -F _msjax msjax
"""
_ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="msjax completion",
        description="Print a script by which a shell completes commands, options and their choices. Elsewhere it "
        "completes files. bash, in ~/.bashrc: source <(msjax completion bash). zsh, in ~/.zshrc: source <(msjax "
        "completion zsh). fish: msjax completion fish > ~/.config/fish/completions/msjax.fish",
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(arguments).shell
    print(script(shell, {command: options_of(command) for command in cli.COMMANDS}), end="")
    return 0


def options_of(command: str) -> dict[str, tuple[str, ...]]:
    """Returns the options that a command's help lists, each with its choices; none where it takes any value."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
        cli.run(command, ["--help"])
    found: dict[str, tuple[str, ...]] = {}
    for line in text.getvalue().splitlines():
        # A line of the list, not of the text: "--option {a,b}", "--option, --no-option" or "-h, --help".
        if head := re.match(r"[│ ]*(?:-\w, )?(--[a-z][\w.-]*(?:, --[a-z][\w.-]*)*)(?: (\S+))?", line):
            choices = ",".join(re.findall(r"\{([\w,]+)\}", head[2] or "")).split(",")
            found |= dict.fromkeys(head[1].split(", "), tuple(c for c in choices if c not in ("", "None")))
    return found


def script(shell: str, options: dict[str, dict[str, tuple[str, ...]]]) -> str:
    """Returns the script of a shell, for the options of each command."""
    if shell == "fish":
        return _fish(options)
    choices = [
        f'      "{command} {option}") words="{" ".join(values)}" ;;'
        for command, named in options.items()
        for option, values in named.items()
        if values
    ]
    cases = [f'            {command}) words="{" ".join(named)}" ;;' for command, named in options.items()]
    text = _BASH.format(commands=" ".join(options), choices="\n".join(choices), options="\n".join(cases))
    return (_ZSH if shell == "zsh" else "") + text


def _fish(options):
    lines = [f"complete -c msjax -n __fish_use_subcommand -x -a '{' '.join(options)}'"]
    for command, named in options.items():
        for option, values in named.items():
            line = f"complete -c msjax -n '__fish_seen_subcommand_from {command}' -l {option.removeprefix('--')}"
            lines.append(line + (f" -x -a '{' '.join(values)}'" if values else ""))
    return "\n".join(lines) + "\n"
