"""`msjax client`: take part in split training as one of a run's clients."""

import dataclasses

from msjax.cli.network import log_to_stderr
from msjax.cli.options import PresetFlag, parse, preset_of, split_options
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.client_run import Interrupted, Refused
from msjax.distributed.messages import ProtocolError
from msjax.distributed.options import ClientOptions
from msjax.runs.signals import stop_on_signal


@dataclasses.dataclass(frozen=True)
class _Flags(ClientOptions, PresetFlag):
    """The client's, and its preset: of a model, data or task of one's own."""


def _interrupt():
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config")
    description = "Take part in split training. --config is the preset of a model, data or task of one's own."
    options = parse(_Flags, rest, prog="msjax client", description=description)
    program = ClientProgram(options, preset_of(where))
    log_to_stderr()
    print(f"msjax client {options.client_id}: connecting to {options.server}", flush=True)
    try:
        with stop_on_signal(_interrupt):
            part = program.train()
    except KeyboardInterrupt:
        print(f"msjax client {options.client_id}: stopped by a signal; the same command goes on", flush=True)
        return 130
    except Interrupted as interrupted:
        raise ConnectionError(str(interrupted)) from None
    except Refused as refused:
        raise ValueError(str(refused)) from None
    except ProtocolError as fault:
        raise ValueError(f"the server's answer makes no sense to this client: {fault}") from None
    print(f"msjax client {options.client_id}: done: {part or 'others trained last and have the trained part'}")
    return 0
