"""The commands of the network: `msjax serve`, `msjax client` and `msjax eval --server`."""

import argparse
import contextlib
import dataclasses
import logging
import signal
import statistics
import threading
import time

import jax
import tyro

from msjax import assemble, config, halves, parties, runs, step
from msjax._serving import Serving, TakingPart, check_serve, load_data
from msjax.protocol import Phase
from msjax.transport import inference
from msjax.transport._metrics import Metrics
from msjax.transport._security import Tokens
from msjax.transport.client import Refused
from msjax.transport.coordinator import Stopped
from msjax.transport.options import ClientOptions, ConnectOptions, ListenOptions, ServeOptions
from msjax.transport.server import Endpoint


@dataclasses.dataclass(frozen=True)
class _ServeFlags(config.Config, ServeOptions):
    """The flags of a new run: the config's, as of `msjax train`, and the server's, in one list."""


def _part(kind, flags):
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


def serve(arguments: list[str], default: config.Config) -> int:
    """The command `msjax serve`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--resume", "--name", "--half"):
        first.add_argument(name)
    where, rest = first.parse_known_args(arguments)
    if where.half:
        description = "Answer with a trained server half: --half FILE.safetensors."
        return _infer(
            where.half, tyro.cli(ListenOptions, args=rest, prog="msjax serve --half", description=description)
        )
    if where.resume:
        if where.config or where.name:
            raise ValueError("--resume takes the run's own config, got also --config or --name")
        folder, cfg = runs.RunFolder.open(where.resume)
        if (folder.path / "summary.json").exists():
            raise ValueError(f"--resume must be a run that is not finished, got {where.resume!r}, which has a summary")
        options = tyro.cli(ServeOptions, args=rest, prog="msjax serve --resume", description="Go on serving a run.")
        serving = Serving(cfg, options, folder.path)
    else:
        cfg = config.load_preset(where.config) if where.config else default
        description = (
            "Serve split training. Also: --config FILE.py (a preset), --resume RUN, --name NAME (of the run), "
            "--half FILE.safetensors (answer with a trained half)."
        )
        default = _ServeFlags(**vars(dataclasses.replace(cfg, compare=False)))
        flags = tyro.cli(_ServeFlags, args=rest, default=default, prog="msjax serve", description=description)
        cfg, options = _part(config.Config, flags), _part(ServeOptions, flags)
        # Before there is a folder, so that options that do not work leave none behind.
        check_serve(cfg, options)
        folder = runs.RunFolder.create(cfg, where.name)
        try:
            serving = Serving(cfg, options, folder.path)
        except (ValueError, OSError):  # an address that cannot be had
            for made in ("config.json", "run"):
                (folder.path / made).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # where there is something else
                folder.path.rmdir()
                folder.path.parent.rmdir()
            raise
    _log()
    print(
        f"msjax serve: listening on {options.listen} for {cfg.clients} clients; run folder: {folder.path}", flush=True
    )
    try:
        with _on_signal(lambda: serving.coordinator.stop("by a signal")):
            serving.train(_print_epoch)
    except Stopped as stopped:
        print(f"stopped {stopped}; continue with: msjax serve --resume {folder.path}")
        return 130
    finally:
        serving.close()
    print(f"done: {folder.path}/summary.json, server.safetensors")
    return 0


def _infer(path, options):
    """Serves a trained half until a signal comes."""
    trained = halves.load(path)
    limits = {"max_bytes": options.max_megabytes << 20, "max_messages_per_second": options.max_messages_per_second}
    metrics = Metrics()
    servicer = inference.Servicer(trained, Tokens(options.tokens), metrics, compression=options.compression, **limits)
    endpoint = Endpoint(options, servicer, metrics, streams=64)
    _log()
    print(f"msjax serve: listening on {options.listen}, answering with {path}", flush=True)
    done = threading.Event()
    with _on_signal(done.set):
        done.wait()
    endpoint.close()
    return 0


def client(arguments: list[str]) -> int:
    """The command `msjax client`."""
    options = tyro.cli(ClientOptions, args=arguments, prog="msjax client", description="Take part in split training.")
    taking_part = TakingPart(options)
    _log()
    print(f"msjax client {options.number}: connecting to {options.server}", flush=True)
    try:
        half = taking_part.train()
    except Refused as refused:
        raise ValueError(str(refused)) from None
    print(f"msjax client {options.number}: done" + ("" if half is None else f": {half}"))
    return 0


@dataclasses.dataclass(frozen=True)
class _EvalFlags(ConnectOptions):
    """Of a test with the client's half here and the server's elsewhere."""

    half: tyro.conf.Positional[str] = tyro.MISSING
    """client.safetensors of a trained client."""
    uncompressed: bool = False
    """Send test features as they are."""


def evaluate(arguments: list[str]) -> int:
    """The command `msjax eval --server`."""
    options = tyro.cli(
        _EvalFlags, args=arguments, prog="msjax eval", description="Test a client's half with a server elsewhere."
    )
    trained = halves.load(options.half)
    if trained.part != "client":
        raise ValueError(f"half must be that of a client, got that of a {trained.part}: {options.half}")
    remote = inference.Remote(options.server, options.tls, options.token())
    try:
        described = remote.describe()
        if described.run != trained.run:
            raise ValueError(f"the halves must be of one run, got {trained.run!r} here and {described.run!r} there")
        result = _evaluate(trained, remote, options)
    except Refused as refused:
        raise ValueError(str(refused)) from None
    finally:
        remote.close()
    print(runs.to_json({"half": options.half, "server": options.server, "step": trained.step, **result}, indent=2))
    return 0


def _evaluate(trained, remote, options):
    """Tests as a training run does, batch by batch with the same keys; each client's share is computed here."""
    cfg = dataclasses.replace(
        trained.config,
        model=dataclasses.replace(trained.config.model, weights=None),  # those it was trained from
        eval_compressed=trained.config.eval_compressed and not options.uncompressed,
    )
    ds = load_data(cfg, options)
    parts = assemble.assemble(cfg, trained.info, samples=cfg.batch_size, test_samples=len(ds.test_labels))
    plan, shapes = parts.plan, parts.shapes()
    programs = parts.programs(cfg.seed, numpy_encoder=options.encoder == "numpy")
    state = step.HalfState(trained.params, trained.stats, ())
    own = parties.ClientData(ds.train_inputs, ds.train_labels, ds.test_inputs, ds.test_labels)
    clients = [parties.Client(n, plan, shapes, programs, state, own, cfg.seed) for n in range(cfg.clients)]
    sums, seconds, sent, received = [], [], 0, 0
    for exchange in plan.step_exchanges(plan.total_steps - 1):  # the last epoch always has a test
        if exchange.phase == Phase.RESULT:
            sums += [clients[n].send(exchange).sums for n in exchange.clients]
        if exchange.phase != Phase.TEST:
            continue
        form = shapes.up(exchange)
        for n in exchange.clients:
            message = jax.block_until_ready(clients[n].send(exchange))
            began = time.monotonic()
            sent += remote.send(message.payload, form.codec, form.like, options.compression)
            answer = remote.receive()
            seconds.append(time.monotonic() - began)
            received += answer.wire_bytes
            if trained.head is None:
                sums.append(parties.sums_of(programs.score(answer.payload[0], message.labels), len(message.labels)))
            else:
                clients[n].receive(exchange, parties.Message(answer.payload))
    sums = parties.total(sums)
    round_trip = round(statistics.median(seconds) * 1e3, 2)
    traffic = {"sent_bytes": sent, "received_bytes": received, "median_round_trip_ms": round_trip}
    return {"features": str(form.codec), **sums.means(), "samples": sums.samples, **traffic}


def _print_epoch(record):
    test = f", test {record['test']['top1_percent']:.2f} %" if "test" in record else ""
    sent = record["traffic"]
    trained = record["train"]
    print(
        f"epoch {record['epoch']}: loss {trained['loss']:.4f}, train {trained['top1_percent']:.2f} %{test}, "
        f"{sent['received_bytes'] / 1e6:,.1f} MB received, {sent['sent_bytes'] / 1e6:,.1f} MB sent",
        flush=True,
    )


def _log():
    """msjax's own messages on standard error; other packages' loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("msjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def _on_signal(stop):
    """SIGINT and SIGTERM call `stop`; a second one acts as usual."""
    old = {}

    def handler(number, frame):
        signal.signal(number, old[number])
        # Not from within the handler: a lock may be held by the very code that it interrupts.
        threading.Thread(target=stop, daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
