"""What the commands of the network share; `msjax eval --server` and `msjax generate --server`."""

import contextlib
import dataclasses
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import tyro

from msjax import build, config, parts
from msjax.cli.eval import describe_features
from msjax.cli.generate import DESCRIPTION, GenerateOptions, check_decoder, check_trained, codec_of, continue_text
from msjax.cli.options import PartFlag, parse, preset_of, split_options
from msjax.distributed import inference
from msjax.distributed.client_run import Refused
from msjax.distributed.options import ConnectOptions, LinkOptions, check_positive
from msjax.generation import Generator
from msjax.logs import ShortLines
from msjax.pair import model_parts
from msjax.paths import existing_file
from msjax.runs import to_json
from msjax.runs.signals import stop_on_signal
from msjax.split import parties, programs
from msjax.split.metrics import sums_of, total
from msjax.split.schedule import Phase
from msjax.split.state import PartState


def log_to_stderr() -> None:
    """Shows msjax's own messages on standard error; other packages' loggers stay as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(ShortLines("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("msjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Lets SIGINT and SIGTERM call `stop`, outside the handler: a lock may be held by the code that it interrupts."""
    with stop_on_signal(lambda: threading.Thread(target=stop, daemon=True).start()):
        yield


@dataclasses.dataclass(frozen=True)
class _EvalOptions(ConnectOptions, PartFlag):
    """Of a test with the client's part here and the server's elsewhere."""

    part: tyro.conf.Positional[str] = tyro.MISSING
    """client.safetensors of a trained client."""
    uncompressed: bool = False
    """Send test features as they are."""
    retry_seconds: float = 60.0
    """For how long a server that is away is tried again."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        check_positive(self, "retry_seconds")


def evaluate(arguments: list[str]) -> int:
    """Tests a client's part with a server elsewhere; returns the exit status."""
    where, rest = split_options(arguments, "--config")
    description = "Test a client's part with a server elsewhere. --config is the preset of a model of one's own."
    options = parse(_EvalOptions, rest, prog="msjax eval", description=description)
    options.check()
    trained = _client_part(options.part, preset_of(where))
    with _server_of(trained, options, "eval") as remote:
        result = _evaluate(trained, remote, options)
    print(to_json({"part": options.part, "server": options.server, "step": trained.step, **result}, indent=2))
    return 0


@dataclasses.dataclass(frozen=True)
class _GenerateOptions(GenerateOptions, LinkOptions, PartFlag):
    """Of a text with the client's part here and the server's elsewhere."""

    retry_seconds: float = 60.0
    """For how long a server that is away is tried again."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        check_positive(self, "retry_seconds")
        if len(self.network) != 1 or not self.network[0].endswith(".safetensors"):
            raise ValueError(f"network must be CLIENT.safetensors with --server, got {' '.join(self.network)!r}")
        check_trained(self)
        self.sampling()


def generate(arguments: list[str]) -> int:
    """Continues a text with a server elsewhere; returns the exit status."""
    where, rest = split_options(arguments, "--config")
    options = parse(_GenerateOptions, rest, prog="msjax generate", description=DESCRIPTION)
    options.check()
    codec = options.own_codec()
    trained = _client_part(options.network[0], preset_of(where))
    check_decoder(trained.config, options.network[0])
    client, server, *tail = model_parts(trained)
    with _server_of(trained, options, "generate") as remote:
        generator = Generator(
            jax.device_put(client),
            server,
            *jax.device_put(tail),
            codec=codec or codec_of(trained),
            compression=options.compression,
            connect=remote.begin,
        )
        continue_text(generator, options, options.tokenizer or trained.config.data.tokenizer)
    return 0


def _client_part(path, preset):
    """The client's part in a file."""
    trained = parts.load_part(existing_file("part", path), preset=preset)
    if trained.part != "client":
        raise ValueError(f"part must be that of a client, got that of a {trained.part}: {path}")
    parts.check_complete(trained, path)
    return trained


@contextlib.contextmanager
def _server_of(trained, options, command):
    """The server with the other part of the run; what it refuses becomes a ValueError."""
    remote = inference.RemoteServer(options.server, options.tls, options.token())
    try:
        tell = lambda text: print(f"msjax {command}: {text}", file=sys.stderr, flush=True)  # noqa: E731
        described = remote.describe(options.retry_seconds, tell=tell)
        parts.check_run_ids(trained.run_id, described.run, ("here", "there"))
        yield remote
    except Refused as refused:
        raise ValueError(str(refused)) from None
    finally:
        remote.close()


def _evaluate(trained, remote, options):
    """Tests as a training run does, batch by batch with the same keys; each client's share is computed here.

    With a budget all aim at what this client did in the end, in a run each client at its own.
    """
    cfg = config.with_fields(trained.config, {"model.weights": None})  # those it was trained from
    cfg = dataclasses.replace(cfg, eval_compressed=cfg.eval_compressed and not options.uncompressed)
    cfg = config.with_own_paths(cfg, data_dir=options.data_dir, tokenizer=options.tokenizer)
    ds = build.load_data(cfg, data_dir=options.data_dir, cache_dir=options.cache_dir)
    build.check_tokenizer(ds.tokenizer, trained.summary.tokenizer)
    build.DataSummary.of(ds).normalized_as(cfg.data).check_trained(trained.summary)
    spec = build.spec_of(cfg, trained.summary, test_samples=len(ds.test))
    state = PartState(trained.params, trained.stats, ())
    own = parties.ClientData(ds.train, ds.test)
    numpy_encoder = options.encoder == "numpy"
    clients = [parties.Client(n, spec, state, own, cfg.seed, numpy_encoder=numpy_encoder) for n in range(cfg.clients)]
    if trained.up_bits is not None:
        for client in clients:
            client.up_bits = jnp.float32(trained.up_bits)
    sums, seconds, sent, received = [], [], 0, 0
    for exchange in spec.schedule.step_exchanges(spec.schedule.total_steps - 1):  # the last epoch always has a test
        if exchange.phase == Phase.RESULT:
            sums += [clients[n].send(exchange).metrics for n in exchange.clients]
        if exchange.phase != Phase.TEST:
            continue
        up, batch_size = spec.up(exchange), spec.schedule.batch_size_of(exchange)
        for n in exchange.clients:
            message = jax.block_until_ready(clients[n].send(exchange))
            began = time.monotonic()
            sent += remote.send(message.payload, up, options.compression)
            answer = remote.receive()
            seconds.append(time.monotonic() - began)
            received += sum(one.wire_bytes for one in answer)
            if spec.u_shaped:
                clients[n].receive(exchange, parties.Message(tuple(one.payload for one in answer)))
            else:
                outputs = inference.outputs_of(answer, spec.outputs)
                sums.append(sums_of(programs.score(spec, outputs, message.labels), batch_size))
    sums = total(sums)
    round_trip = round(statistics.median(seconds) * 1e3, 2)
    traffic = {"sent_bytes": sent, "received_bytes": received, "median_round_trip_ms": round_trip}
    how = describe_features(spec, trained.up_bits)
    return {"features": how, **sums.means(spec.task), "samples": sums.samples, **traffic}
