"""The command line: `msjax COMMAND`, with a module for each command."""

import codecs
import importlib
import io
import os
import sys

import msjax

HELP = """\
usage: msjax COMMAND [options]

Split learning with compressed feature maps.

commands:
  train     train a split network and count the bytes
              msjax train                                 digits, small net, MS against no compression, about a minute
              msjax train --config configs/NAME.py        a preset; any option overrides it
              msjax train --codec "TopK(ratio=0.9)"       another codec
              msjax train --resume RUN                    go on where a run stopped; with --epochs N to N epochs
              msjax train --distributed                   in several processes, on several hosts
  eval      test a trained run:  msjax eval RUN [--uncompressed]
              msjax eval CLIENT.safetensors --server HOST:PORT    a client's part, with the server's elsewhere
  predict   what a trained run says of images, or of rows of an .npz or .csv:  msjax predict RUN IMAGE...
              msjax predict CLIENT.safetensors --server HOST:PORT IMAGE...     with the server's part elsewhere
  generate  continue a text with a trained decoder:  msjax generate RUN --prompt "Once upon a time"
              msjax generate FOLDER --cut 2 --codec CODEC --prompt TEXT      published weights, cut anywhere
              msjax generate CLIENT.safetensors --server HOST:PORT --prompt TEXT     with the server's part elsewhere
  export    a trained run's network in one file:  msjax export RUN --out FILE.safetensors
  serve     the server of a run whose clients are elsewhere:  msjax serve --config configs/NAME.py --listen HOST:PORT
              msjax serve --resume RUN                    go on where a run stopped; with --epochs N to N epochs
              msjax serve --part SERVER.safetensors       answer with a trained part
  client    one of its clients:  msjax client --client-id 0 --server HOST:PORT
  compare   runs beside each other, as a table and a picture:  msjax compare RUN RUN... [--out FILE.png]
  runs      list run folders:  msjax runs [FOLDER]
  plan      what a run needs before it is begun: memory, bytes, seconds on a link:  msjax plan --config configs/NAME.py
  models    print a model's cuts, feature maps and bytes:  msjax models resnet18 --input-shape 32 32 3
  completion  a script by which bash, zsh or fish completes all this:  source <(msjax completion bash)

`msjax COMMAND --help` lists a command's options.
"""

COMMANDS = {
    "train": ("train", "train"),
    "eval": ("eval", "train"),
    "predict": ("predict", "train"),
    "generate": ("generate", "train"),
    "export": ("export", "train"),
    "plan": ("plan", "train"),
    "models": ("models", "train"),
    "compare": ("compare", "train"),
    "runs": ("runs", "train"),
    "serve": ("serve", "train,net"),
    "client": ("client", "train,net"),
    "completion": ("completion", "train"),
}
"""Each command's module, and the extras that it needs."""
COMPUTING = ("train", "eval", "predict", "generate", "serve", "client")
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""An environment in which glibc takes large pages for large arrays.

XLA allocates its arrays afresh in every step, on a CPU, and with large pages a step takes less time.
"""


def large_pages() -> dict[str, str]:
    """What the environment of a new process lacks for large pages: nothing where it says itself, or not on Linux."""
    return LARGE_PAGES if sys.platform == "linux" and not LARGE_PAGES.keys() & os.environ.keys() else {}


def script() -> None:
    """The entry point of the `msjax` script: `main` in a process with large pages, unless GLIBC_TUNABLES is set."""
    if sys.argv[1:] and sys.argv[1] in COMPUTING and (lacking := large_pages()):
        # The C library reads it when the process starts, so it starts anew.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | lacking)
    main()


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    codecs.register_error("msjax", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack what tables and messages have
            stream.reconfigure(errors="msjax")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        print(msjax.__version__)
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"msjax: unknown command {arguments[0]!r}; see msjax --help")
    sys.exit(run(arguments[0], arguments[1:]))


_ASCII = {"×": "x", "–": "-", "−": "-", "…": "...", "→": "->"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Handles what a stream cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def run(command: str, arguments: list[str]) -> int:
    """Runs one command and returns its exit status; an expected error becomes one line."""
    # Imported here, so that the help above does not wait for JAX.
    module, extra = COMMANDS[command]
    try:
        options = importlib.import_module("msjax.cli.options")
        function = importlib.import_module(f"msjax.cli.{module}").main
    except ModuleNotFoundError as error:
        needed = f"msjax {command} {msjax._needs(error, extra)}"
        asks_help = bool({"-h", "--help"} & set(arguments))
        if asks_help:  # the command's own names its options, which are not to be had
            print(HELP)
        print(needed, file=sys.stderr)
        return 0 if asks_help else 2
    return options.run_command(command, function, arguments)
