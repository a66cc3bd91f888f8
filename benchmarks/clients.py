r"""What a client costs a training server, with 10, 100 and 1,000 of them: CPU seconds of a step, and memory.

    python -m benchmarks.clients                                     # about three minutes on two CPU cores
    python -m benchmarks.clients --clients 10 100 --requests 1000 --out /tmp/clients

The server is a program of its own: what `msjax serve` runs, over gRPC on loopback, with the tiny network of the other
network benchmarks in parallel mode. The clients are light: each is a coroutine that says Hello and Ready and then sends
bytes that were prepared, without JAX and without looking at the answers. All are in one other program, each with a
connection of its own. Rows "protocol" have a server that answers with bytes that were prepared, too: what is left is
gRPC, the coordinator, and the messages' coding and checks. Rows "whole" compute as well.

CPU seconds are the server program's, of all its threads, from the end of the warm-up to the end of the run, by clients
and steps; a step has two exchanges. They depend on the machine's load less than time does. Memory is what its resident
set has grown by since before the first client came: until all are connected, and until the end. Of few clients it is
mostly what gRPC needs once; what one more costs is the difference between two rows.
"""

import argparse
import asyncio
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

import grpc
import jax
import numpy as np
import psutil

from benchmarks import timing
from benchmarks.net import TINY, Case
from msjax.distributed import drive, messages
from msjax.distributed.coordinator import Coordinator
from msjax.distributed.membership import Policy
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.connection import channel_options
from msjax.distributed.rpc.security import Tokens
from msjax.distributed.rpc.server import most_silent
from msjax.distributed.rpc.training import TrainEndpoint, TrainServicer
from msjax.distributed.stores import ServerStore
from msjax.split import parties
from msjax.split.schedule import Exchange, Phase
from msjax.split.spec import RunSpec

_WARMUP_STEPS = 2
_STUCK_SECONDS = 600.0


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=timing.RESULTS / "clients_cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--kinds", nargs="+", choices=("protocol", "whole"), default=["protocol", "whole"])
    parser.add_argument("--requests", type=int, default=4000, help="of all clients together, after the warm-up")
    parser.add_argument("--batch", type=int, default=4, help="samples of each client in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", choices=("protocol", "whole"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    began, rows = time.monotonic(), []
    for kind in options.kinds:
        for clients in options.clients:
            print(kind, clients, file=sys.stderr, flush=True)
            rows.append(measure(options, kind, clients))
            timing.save(options.out, timing.record(options, rows, time.monotonic() - began))
    print(table(rows))
    return 0


def case_of(options: argparse.Namespace, clients: int) -> Case:
    """Returns the run of so many clients: the same in both programs."""
    args = argparse.Namespace(**TINY, clients=clients, batch=options.batch, seed=options.seed)
    per_step = 2 * clients
    steps = _WARMUP_STEPS + max(2, -(-options.requests // per_step))
    return Case.of(args, "medium", steps=steps)


# -- The server's program. -----------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Serves one run; writes its port and, at the end, what it has taken as lines of JSON."""
    (clients,) = options.clients
    case, metrics, seen = case_of(options, clients), Metrics(), {}
    if options.serve == "protocol":
        answers = {e.phase: prepared(case.run.spec.down(e)) for e in case.exchanges}
        parties.Server.handle = lambda self, exchange, came: {
            client: parties.Message(answers[exchange.phase]) for client in came
        }

    def on_exchange(exchange: Exchange) -> None:
        if exchange == case.exchanges[0]:
            seen["connected"] = usage()
        if exchange.phase == case.exchanges[-1].phase and exchange.step == _WARMUP_STEPS - 1:
            seen["began"] = usage()
        if exchange.phase == case.exchanges[-1].phase:
            seen["ended"] = usage()

    with tempfile.TemporaryDirectory() as folder:
        progress: dict[str, Any] = {}
        store = ServerStore(pathlib.Path(folder), progress)
        names = {"run": uuid.uuid4().hex, "progress": progress, "checkpoint_steps": 10**9}
        args = (case.cfg, lambda *_: (case.run.spec, lambda: case.run.server), store, Policy(), metrics)
        coordinator = Coordinator(*args, **names, on_exchange=on_exchange)
        endpoint = TrainEndpoint(ListenOptions(listen="127.0.0.1:0"), metrics, clients)
        servicer = TrainServicer(Tokens(None), metrics, most_silent=most_silent(clients))
        endpoint.start(servicer)
        seen["alone"] = usage()
        print(json.dumps(str(endpoint.address)), flush=True)
        drive.serve(coordinator, servicer.inbox, servicer.carry)
        servicer.close()
        endpoint.close()
        store.close()
    print(json.dumps(seen | {"message_bytes": sum(metrics.totals().values())}), flush=True)
    return 0


def usage() -> dict[str, float]:
    """Returns what this program has taken so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    process = psutil.Process()
    return {
        "seconds": time.perf_counter(),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "resident_bytes": process.memory_info().rss,
        "threads": process.num_threads(),
    }


def prepared(spec: Any) -> Any:
    """Returns a payload of zeros as a spec describes it; None where there is none."""
    if spec is None:
        return None
    pairs = zip(spec.codecs, spec.likes, strict=True)
    zeros = lambda like: np.zeros(like.shape, like.dtype)  # noqa: E731
    return tuple(jax.tree.map(zeros, codec.payload_like(like)) for codec, like in pairs)


# -- The clients' program. -----------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, kind: str, clients: int) -> dict[str, Any]:
    """Returns one row: a server in a program of its own, and all clients in this one."""
    case = case_of(options, clients)
    command = [sys.executable, "-m", "benchmarks.clients", "--serve", kind, "--clients", str(clients)]
    command += ["--requests", str(options.requests), "--batch", str(options.batch), "--seed", str(options.seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = json.loads(server.stdout.readline())
            asyncio.run(asyncio.wait_for(take_part(case, clients, address), _STUCK_SECONDS))
            seen = json.loads(server.stdout.readline())
        finally:
            server.kill()
    steps = case.run.spec.schedule.total_steps - _WARMUP_STEPS
    began, ended = seen["began"], seen["ended"]
    grown = lambda when: seen[when]["resident_bytes"] - seen["alone"]["resident_bytes"]  # noqa: E731
    return {
        "kind": kind,
        "clients": clients,
        "steps": steps,
        "step_seconds": (ended["seconds"] - began["seconds"]) / steps,
        "cpu_seconds_per_client_step": (ended["cpu_seconds"] - began["cpu_seconds"]) / steps / clients,
        "connected_bytes_per_client": grown("connected") / clients,
        "end_bytes_per_client": grown("ended") / clients,
        "threads": ended["threads"],
        "message_bytes_per_client_step": seen["message_bytes"] / (steps + _WARMUP_STEPS) / clients,
        "seen": seen,
    }


async def take_part(case: Case, clients: int, address: str) -> None:
    """Takes all clients through the run."""
    spec = case.run.spec
    templates = {exchange.phase: request(spec, exchange, case.cfg.batch_size) for exchange in case.exchanges}
    await asyncio.gather(*(Light(case, templates, client).run(address) for client in range(clients)))


def request(spec: RunSpec, exchange: Exchange, batch_size: int) -> pb.FromClient:
    """Returns what every client says in an exchange of this kind."""
    labels = np.zeros(batch_size, np.int32) if exchange.phase == Phase.FEATURES else None
    return messages.to_request(parties.Message(prepared(spec.up(exchange)), labels), exchange, spec)


class Light:
    """A client that keeps to the protocol and computes nothing."""

    def __init__(self, case: Case, templates: dict[Phase, pb.FromClient], client: int):
        self._case, self._templates, self._client = case, templates, client

    async def run(self, address: str) -> None:
        """Takes part from Hello to Goodbye."""
        channel = grpc.aio.insecure_channel(address, [*channel_options(-1), ("grpc.enable_http_proxy", 0)])
        async with channel:
            call = channel.stream_stream("/msjax.v2.Split/Train")()

            async def say(**kind):
                await call.write(pb.FromClient(**kind).SerializeToString())

            async def hear(kind):
                while True:
                    message = pb.FromServer.FromString(await call.read())
                    if message.WhichOneof("kind") == kind:
                        return getattr(message, kind)

            hello = {"protocol": messages.PROTOCOL, "client": self._client, "instance": str(self._client)}
            await say(hello=pb.Hello(**hello))
            await hear("welcome")
            samples, description = len(self._case.own.train), self._case.description
            await say(ready=pb.Ready(samples=samples, test_samples=0, description=description))
            generation = (await hear("start")).generation
            for exchange in self._case.run.spec.schedule.exchanges():
                message = self._templates[exchange.phase]
                message.request.generation = generation
                message.request.position.CopyFrom(messages.to_position(exchange))
                await call.write(message.SerializeToString())
                await hear("answer")
            await hear("finished")
            await say(goodbye=pb.Goodbye(generation=generation))
            await hear("finished")  # all have


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    header = ["server, clients", "a step, s", "CPU a client and step, ms", "KB a client, connected", "KB at the end"]
    lines = []
    for row in rows:
        cells = [f"{row['kind']}, {row['clients']}", f"{row['step_seconds']:.3f}"]
        cells.append(f"{row['cpu_seconds_per_client_step'] * 1e3:.2f}")
        cells += [f"{row[f'{when}_bytes_per_client'] / 1e3:.0f}" for when in ("connected", "end")]
        lines.append([*cells, f"{row['threads']}"])
    return timing.table([*header, "threads"], lines)


if __name__ == "__main__":
    sys.exit(main())
