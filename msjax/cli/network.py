"""What the commands of the network share; `eval`, `predict` and `generate` with the server's part elsewhere."""

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
from msjax.cli.predict import check_out, make_parser, print_predictions, read_all
from msjax.distributed.options import ConnectOptions, LinkOptions, check_positive
from msjax.distributed.remote import connected_pair
from msjax.generation import Generator
from msjax.logs import ShortLines
from msjax.pair import answer_spec, model_parts
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
    handler.setFormatter(ShortLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
class _PartLink(LinkOptions, PartFlag):
    """The client's part here and the server's elsewhere."""

    retry_seconds: float = 60.0
    """For how long a server that is away is tried again."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        check_positive(self, "retry_seconds")


@dataclasses.dataclass(frozen=True)
class _EvalOptions(ConnectOptions, _PartLink):
    """Of a test with the client's part here and the server's elsewhere."""

    part: tyro.conf.Positional[str] = tyro.MISSING
    """client.safetensors of a trained client."""
    uncompressed: bool = False
    """Send test features as they are."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        super().check()
        self.check_workers()


def evaluate(arguments: list[str]) -> int:
    """Tests a client's part with a server elsewhere; returns the exit status."""
    where, rest = split_options(arguments, "--config")
    description = "Test a client's part with a server elsewhere. --config is the preset of a model of one's own."
    options = parse(_EvalOptions, rest, prog="msjax eval", description=description)
    options.check()
    trained = _client_part(options.part, preset_of(where))
    with _connected(trained, options, "eval") as pair:
        result = _evaluate(trained, pair.server, options)
    print(to_json({"part": options.part, "server": options.server, "step": trained.step, **result}, indent=2))
    return 0


@dataclasses.dataclass(frozen=True)
class _GenerateOptions(GenerateOptions, _PartLink):
    """Of a text with the client's part here and the server's elsewhere."""

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        super().check()
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
    with _connected(trained, options, "generate") as pair:
        client, server, *tail = model_parts(*pair)
        generator = Generator(
            jax.device_put(client),
            server,
            *jax.device_put(tail),
            codec=codec or codec_of(trained),
            compression=options.compression,
            connect=pair.server.begin,
        )
        continue_text(generator, options, options.tokenizer or trained.config.data.tokenizer)
    return 0


def predict(arguments: list[str]) -> int:
    """Prints what a network says of inputs, with a server elsewhere; returns the exit status."""
    where, rest = split_options(arguments, "--config")
    parser = make_parser()
    if {"-h", "--help"} & set(rest):
        print(f"{parser.format_help()}\nof the network:\n", flush=True)
    link, rest = parse(_PartLink, rest, prog="msjax predict", return_unknown_args=True)
    options = parser.parse_intermixed_args(rest)
    link.check()
    check_out(options)
    if not options.network.endswith(".safetensors"):
        raise ValueError(f"network must be CLIENT.safetensors with --server, got {options.network!r}")
    if options.inputs[0].endswith(".safetensors"):
        raise ValueError(f"inputs must come behind CLIENT.safetensors with --server, got {options.inputs[0]!r} there")
    trained = _client_part(options.network, preset_of(where))
    inputs = read_all(trained, options)
    with _connected(trained, link, "predict") as pair:
        return print_predictions(pair, inputs, options)


def _client_part(path, preset):
    """The client's part in a file."""
    trained = parts.load_part(existing_file("part", path), preset=preset)
    if trained.part != "client":
        raise ValueError(f"part must be that of a client, got that of a {trained.part}: {path}")
    parts.check_complete(trained, path)
    return trained


def _connected(trained, options, command):
    """Both parts, the server's elsewhere."""
    tell = lambda text: print(f"msjax {command}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    return connected_pair(trained, options, retry_seconds=options.retry_seconds, tell=tell)


def _evaluate(trained, remote, options):
    """Tests as a training run does, batch by batch with the same keys; each client's share is computed here.

    U-shaped, the server's random codecs draw the same for each batch. With a budget all aim at what this client did in
    the end, in a run each client at its own.
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
    how = {"numpy_encoder": options.encoder == "numpy", "workers": options.workers}
    with contextlib.ExitStack() as stack:
        made = (parties.Client(n, spec, state, own, cfg.seed, **how) for n in range(cfg.clients))
        clients = [stack.enter_context(contextlib.closing(client)) for client in made]
        return _test_of(clients, remote, trained, spec)


def _test_of(clients, remote, trained, spec):
    """Loss, metrics and bytes of the last epoch's test."""
    if trained.up_bits is not None:
        for client in clients:
            client.up_bits = jnp.float32(trained.up_bits)
    sums, seconds = [], []
    for exchange in spec.schedule.step_exchanges(spec.schedule.total_steps - 1):  # the last epoch always has a test
        if exchange.phase == Phase.RESULT:
            sums += [clients[n].send(exchange).metrics for n in exchange.clients]
        if exchange.phase != Phase.TEST:
            continue
        batch_size = spec.schedule.batch_size_of(exchange)
        up, down = spec.up(exchange), answer_spec(spec, batch_size)
        for n in exchange.clients:
            message = jax.block_until_ready(clients[n].send(exchange))
            began = time.monotonic()
            (answer,) = remote.answers([message.payload], up, down)
            seconds.append(time.monotonic() - began)
            if spec.u_shaped:
                clients[n].receive(exchange, parties.Message(answer))
            else:
                sums.append(sums_of(programs.score(spec, down.decode(answer), message.labels), batch_size))
    sums = total(sums)
    round_trip = round(statistics.median(seconds) * 1e3, 2)
    traffic = {"sent_bytes": remote.sent_bytes, "received_bytes": remote.received_bytes}
    traffic["median_round_trip_ms"] = round_trip
    how = describe_features(spec, trained.up_bits)
    return {"features": how, **sums.means(spec.task), "samples": sums.samples, **traffic}
