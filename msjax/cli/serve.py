"""`msjax serve`: the server of a run whose clients are elsewhere, or of a trained part."""

import dataclasses
import logging
import threading

from msjax import config, parts
from msjax.cli.network import log_to_stderr, stopping
from msjax.cli.options import (
    DEFAULT,
    PLACES,
    RunFlags,
    check_early,
    check_new_config,
    fields_of,
    naming_the_way_on,
    number_of,
    parse,
    preset_of,
    silence_output,
    split_options,
    with_places,
)
from msjax.distributed import inference
from msjax.distributed.coordinator import Stopped
from msjax.distributed.generation import Limits
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import MOST_SESSIONS, PartOptions, ServeOptions
from msjax.distributed.rpc.security import Tokens
from msjax.distributed.rpc.server import Endpoint
from msjax.distributed.served_folder import epoch_steps, finish
from msjax.distributed.server_program import ServerProgram, listen
from msjax.paths import existing_file
from msjax.runs import RunFolder, plots
from msjax.runs.folder import check_new
from msjax.runs.progress import NOBODY_READS, format_metric
from msjax.training.from_config import with_more_epochs

OPTIONS = "serve.json"
"""The file in a run folder with those of its last server."""
_BY_SIGNAL = "by a signal"


@dataclasses.dataclass(frozen=True)
class _ServeFlags(config.Config, ServeOptions, RunFlags):
    """The flags of a new run: the config's, as of `msjax train`, and the server's, in one list."""

    part: str | None = None
    """Answer with a trained part in place of a run: SERVER.safetensors; `--part FILE --help` lists what that takes."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config", "--resume", "--name", "--part")
    preset = preset_of(where)
    if where.part is not None:
        if where.resume is not None or where.name is not None:
            raise ValueError("--part takes no run, got also --resume or --name")
        description = "Answer with a trained server part: --part FILE.safetensors."
        options = parse(PartOptions, rest, prog="msjax serve --part", description=description)
        return _serve_part(where.part, options, preset)
    if where.resume is not None:
        if where.config is not None or where.name is not None:
            raise ValueError("--resume takes the run's own config, got also --config or --name")
        folder, cfg = RunFolder.open(where.resume, name="resume")
        if not folder.is_served and (folder.path / "checkpoints").exists():
            raise ValueError(
                f"resume must be a run of msjax serve, got {where.resume!r}, which goes on with msjax train --resume"
            )
        folder.checkpoints.lock()
        more, rest = split_options(rest, "--epochs")
        moved, rest = with_places(cfg, rest)
        new = moved
        if more.epochs is not None:
            epochs = number_of(more.epochs)
            new = with_more_epochs(moved, folder, epochs, epoch_steps=epoch_steps(moved, folder))
        if new.epochs == cfg.epochs:
            if written := finish(moved, folder):
                folder.close()
                print(f"written from the last checkpoint, in {folder.path}: {', '.join(written)}")
                return 0
            if folder.read_summary() is not None:
                folder.close()
                raise ValueError(
                    f"--resume must be a run that is not finished, got {where.resume!r}, which has a summary; with "
                    "--epochs N it goes on to N epochs"
                )
        description = (
            "Go on serving a run, by default with the options it had. With --epochs N it goes on to N epochs, also "
            "where it is finished; the learning rate from there on is that of a run of N epochs. Where its files are "
            f"now: {PLACES}."
        )
        had = ServeOptions.read(folder.path / OPTIONS)
        options = parse(ServeOptions, rest, default=had, prog="msjax serve --resume", description=description)
        if new != cfg:
            new = check_early(new)
        endpoint = listen(new, options)
        if new != cfg:  # once nothing is left to refuse
            (folder.set_places if new.epochs == cfg.epochs else folder.set_config)(new)
            cfg = new
        options.write(folder.path / OPTIONS)
    else:
        folder, cfg, options, endpoint = _new_run(preset, where.name, rest)
    log_to_stderr()
    try:
        program = ServerProgram(cfg, options, folder, endpoint=endpoint)
    except BaseException:
        endpoint.close()
        raise
    print(f"msjax serve: listening on {endpoint} for {cfg.clients} clients; run folder: {folder.path}", flush=True)
    again = f"msjax serve --resume {folder.path}"
    try:
        with naming_the_way_on(again), stopping(lambda: program.stop(_BY_SIGNAL)):
            program.train(lambda record: _print_epoch(record, program))
    except Stopped as stopped:
        if str(stopped) != _BY_SIGNAL:
            raise ConnectionError(f"{stopped}; continue with: {again}") from None
        print(f"stopped {stopped}; continue with: {again}")
        return 130
    finally:
        program.close()
        folder.close()
    if not plots.available():
        print("no curves or TensorBoard events: pip install 'msjax[plots]'")
    print(f"done: {folder.path}/summary.json, server.safetensors")
    return 0


def _new_run(preset, name, arguments):
    description = "Serve split training, or answer with a trained part (--part)."
    default = _ServeFlags(**vars(dataclasses.replace(preset or DEFAULT, compare=False)))
    flags = parse(_ServeFlags, arguments, default=default, prog="msjax serve", description=description)
    cfg, options = fields_of(config.Config, flags), fields_of(ServeOptions, flags)
    # Before there is a folder, so that options that do not work leave none behind.
    cfg = check_new_config(cfg, preset)
    if cfg.compare:
        raise ValueError("compare must be False where clients are programs of their own, got True")
    if cfg.clients_per_group is not None:
        raise ValueError(
            f"clients_per_group must be None where clients are programs of their own, got {cfg.clients_per_group}"
        )
    check_new(cfg, name)
    endpoint = listen(cfg, options)
    try:
        folder = RunFolder.create(cfg, name)
        folder.checkpoints.lock()
        options.write(folder.path / OPTIONS)
        return folder, cfg, options, endpoint
    except BaseException:
        endpoint.close()
        raise


def _serve_part(path, options, preset):
    """Serves a trained part until a signal comes."""
    trained = parts.load_part(existing_file("part", path), preset=preset)
    limits = {"max_bytes": options.max_megabytes << 20, "max_messages_per_second": options.max_messages_per_second}
    limits |= options.admission() | {"texts": Limits(options.max_sessions, options.max_cache_megabytes << 20)}
    metrics, tokens = Metrics(), Tokens(options.tokens)
    servicer = inference.InferenceServicer(trained, tokens, metrics, compression=options.compression, **limits)
    endpoint = Endpoint(options, metrics, streams=MOST_SESSIONS)
    endpoint.start(servicer)
    log_to_stderr()
    print(f"msjax serve: listening on {endpoint}, answering with {path}", flush=True)
    done = threading.Event()
    with stopping(done.set):
        done.wait()
    endpoint.close()
    servicer.close()
    print(f"msjax serve: {metrics.summary()}")
    return 0


def _print_epoch(record, program):
    """Prints an epoch's line; where nobody reads it any more, training of all clients goes on without."""
    try:
        _print_line(record, program)
    except BrokenPipeError:
        silence_output()
        logging.getLogger("msjax").warning(NOBODY_READS)


def _print_line(record, program):
    headline, sent = program.coordinator.run.spec.task.headline, record["traffic"]
    train, test = (format_metric(headline, record[s][headline]) if s in record else "–" for s in ("train", "test"))
    print(
        f"epoch {record['epoch']}: loss {record['train']['loss']:.4f}, train {train}, test {test}, "
        f"{sent['received_bytes'] / 1e6:,.1f} MB received, {sent['sent_bytes'] / 1e6:,.1f} MB sent",
        flush=True,
    )
