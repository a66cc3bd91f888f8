"""A client of a run as a program: its data, its part of the model, and its files in a folder of its own."""

import json
import logging
import pathlib
import time
from collections.abc import Callable

import numpy as np

from msjax import build, config, data, models
from msjax.distributed import agreement, drive
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.options import ClientOptions
from msjax.distributed.own_parts import CLIENT, SECONDS_BETWEEN_TRIES, OwnParts
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.session import ClientSession, Own
from msjax.distributed.stores import ClientStore
from msjax.logs import shorten
from msjax.parts import part_run_id, run_name, save_trained, served_run_id
from msjax.paths import expand
from msjax.runs import write_atomically
from msjax.runs.progress import SECONDS_BETWEEN_LINES, Pace
from msjax.split import budget
from msjax.split.early import check_labels
from msjax.split.parties import Client, ClientData, check_travels
from msjax.split.schedule import Phase
from msjax.split.signs import warn_of_lost_signs
from msjax.split.spec import RunSpec
from msjax.split.state import digest

log = logging.getLogger("msjax.client")


class ClientProgram:
    """A client of a training run, not yet connected.

    Args:
      options: where the server is, and what this client has.
      preset: this client's own config, of which model, data and task are used rather than the server's: functions do
        not travel.
      sleep: waits so many seconds.

    Raises:
      ValueError: an option cannot work.
    """

    def __init__(
        self,
        options: ClientOptions,
        preset: config.Config | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ):
        options.check()
        options.token()  # refused at once where it cannot work
        self._options, self._preset, self._sleep = options, preset, sleep
        self._epoch, self._path = None, None
        self._digests: tuple[pathlib.Path, str] | None = None  # of the data, and where they are written down
        self._pace, self._generation, self._last_step = Pace(), 0, -1
        self._watch = LinkWatch()
        self._told_at = 0.0
        self._is_new = True
        self.session = ClientSession(
            options.client_id,
            self._load,
            self._build,
            self._open_store,
            compression=options.compression,
            answer_seconds=options.answer_seconds,
            retry_seconds=options.retry_seconds,
            on_exchange=self._tell,
            on_end=self._save_part,
            preset=preset,
        )

    def connect(self) -> Connection:
        """Returns a new connection to the server; raises ConnectionLost where there is none for now."""
        try:
            # The files are read anew, as they may have been replaced.
            return Connection(self._options.server, self._options.tls, self._options.read_token())
        except ValueError as error:  # files of TLS or a token that fitted at the start, and are being renewed
            raise ConnectionLost(str(error)) from None

    def train(self) -> pathlib.Path | None:
        """Trains to the end; returns where the client's part is, None where others trained last.

        Raises:
          Refused, ConnectionError: see `ClientSession`.
        """
        try:
            drive.take_part(self.session, self.connect)
        finally:
            self.session.close()
            sent, received = self.session.sent_bytes, self.session.received_bytes
            log.info("%s bytes sent, %s received, as serialized", f"{sent:,}", f"{received:,}")
        return self._path

    def _open_store(self, run_id):
        folder = self._options.folder() / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"state must be a folder where files can be made, got {folder.parent}: {error}") from None
        store = ClientStore(folder / run_id)
        try:
            self._is_new = not store.steps()
            self._check_whose(folder, run_id)
        except BaseException:
            store.close()
            raise
        return store

    def _check_whose(self, folder, run_id):
        """Raises where the checkpoints of a run are another client's, and writes down whose they are."""
        file, own = folder / f"{run_id}.client", str(self._options.client_id)
        other = own if self._is_new or not file.exists() else file.read_text("utf-8").strip()
        if other != own:
            raise ValueError(
                f"state must be a client's own folder, got {str(folder.parent)!r} for client {own}, where client "
                f"{shorten(other, 20)} has its checkpoints of this run"
            )
        write_atomically(file, f"{own}\n")

    def _load(self, cfg):
        options = self._options
        self._cfg = cfg = own_config(cfg, self._preset, options)
        if options.own_data and cfg.data.missing != "refuse":
            raise ValueError(
                f"data.missing must be 'refuse' for clients with own data, got {cfg.data.missing!r}: each would take "
                "the medians of its own rows, and have columns of its own that say what was missing. Fill values in "
                "alike before, or by a preset whose data.name is a function that uses one data.TableFormat everywhere"
            )
        ds = build.load_data(cfg, data_dir=options.data_dir, cache_dir=options.cache_dir)
        self._check_tokenizer(ds.tokenizer)
        digests = data.digests(ds)
        self._check_data([*digests, "own" if options.own_data else "a share"])
        self._summary = build.DataSummary.of(ds).normalized_as(cfg.data)
        train, samples, shared = ds.train, len(ds.train), None
        if not options.own_data:
            indices, samples = build.shares(cfg, ds)
            train = ds.train.only(indices[options.client_id])
            shared = digests if cfg.data.division is None else [*digests, digest(indices)]
        if small := build.batch_of_small_share(cfg, samples):
            log.warning("%s", small)
        test = ds.test
        if options.own_data:  # of which the first are tested: as many as the client with the fewest has
            test = test.only(np.random.default_rng(cfg.seed).permutation(len(test)))
        self._data = ClientData(train, test)
        self._parts = OwnParts(cfg, self._summary, CLIENT)
        spec = self._describe(samples, len(ds.test))
        build.check_tail(cfg, spec)
        if options.keep_labels and spec.sends_labels:
            raise ValueError(
                "keep_labels must be False in a run that sends labels to the server, got True: labels stay with the "
                "clients where the server's config has a --mode.tail-cut, or its model's parts have a tail"
            )
        for part in self._parts.shapes[::2]:
            check_travels(spec, part.stats)
        check_labels(spec, ds)
        if spec.sends_labels and cfg.task.name == "next_token":
            log.warning(
                "the labels of this run are the text itself, shifted by one token, and this client sends them: the "
                "server can read it. Where it is private, the run must be U-shaped (--mode.tail-cut last)"
            )
        log.info("%s", _what_is_sent(cfg, spec))
        return Own(samples, len(ds.test), agreement.describe(spec, self._summary, build.identity(cfg), shared=shared))

    def _check_tokenizer(self, tokenizer):
        """Raises where this client's checkpoints are of another tokenizer, and writes down which it is."""
        folder = self._options.folder() / "checkpoints"
        file = folder / f"{self.session.name}.tokenizer"
        if any((folder / self.session.name).glob("[0-9]*")):
            trained = file.read_text().strip() if file.exists() else None
            build.check_tokenizer(tokenizer, int(trained) if trained and trained.isdecimal() else trained)
        if tokenizer is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, f"{tokenizer}\n")

    def _check_data(self, digests):
        """Raises where this client has begun the run with other data.

        What inputs and classes mean follows from the data, and which of them are set aside to test on; what the client
        trains on, also from whether they are its own.
        """
        file = self._options.folder() / "checkpoints" / f"{self.session.name}.data"
        self._digests = file, json.dumps(digests)
        began = file.read_text("utf-8").strip() if file.exists() else self._digests[1]
        # Earlier versions did not write down whose they are.
        if began not in (self._digests[1], json.dumps(digests[:2])):
            raise ValueError(
                f"the data must be those with which this client began the run, as {file} tells them: the files were "
                "changed, or are others, or --own-data was given at one time and not at another"
            )

    def _write_digests(self):
        file, digests = self._digests
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, f"{digests}\n")

    def _describe(self, samples, test_samples):
        counts = {"samples": samples, "test_samples": test_samples, "own_tests": self._options.own_data}
        return build.build(self._cfg, self._summary, parts=self._parts.shapes, **counts).spec

    def _build(self, cfg, samples, test_samples):
        log.info("training begins or goes on; the first steps compile")
        self._write_digests()
        spec = self._describe(samples, test_samples)
        self._schedule = spec.schedule
        numpy_encoder = self._options.encoder == "numpy"
        state = self._parts.first_state(spec.optimizer)
        if self._is_new and build.may_be_negative(self._cfg):
            warn_of_lost_signs(spec, state, self._data.train)
        args = (self._options.client_id, spec, state, self._data, self._cfg.seed)
        return Client(*args, numpy_encoder=numpy_encoder, workers=self._options.workers)

    def _save_part(self, party):
        """Tries until it can: the server may be gone meanwhile, and nobody else has this part."""
        if not party.keeps_result:
            return
        run_id = served_run_id(self.session.name, self.session.run.generation)
        names = {"run_id": run_id, "step": self._schedule.total_steps}
        names["up_bits"] = budget.mean_up_bits(party.up_bits)
        file = self._options.folder() / "client.safetensors"
        while True:
            try:
                keep_part_of_another_run(file, self.session.name)
                save_trained(file, "client", party.state, self._cfg, self._summary, **names)
            except OSError as error:
                said = "%s cannot be written: %s; trying again every %.0f s"
                log.warning(said, file, error, SECONDS_BETWEEN_TRIES)
                self._sleep(SECONDS_BETWEEN_TRIES)
            else:
                self._path = file
                return

    def _tell(self, exchange):
        schedule = self._schedule
        position, now = schedule.position(exchange.step), time.monotonic()
        if position.epoch != self._epoch:
            self._epoch, self._told_at = position.epoch, now
            log.info("epoch %d of %d", position.epoch + 1, schedule.epochs)
        if exchange.phase != Phase.FEATURES:
            return
        if self._generation != self.session.run.generation:  # what passed before may have been a wait
            self._generation, self._pace, self._last_step = self.session.run.generation, Pace(), exchange.step - 1
        batch_size = position.stop - position.start
        # With those that others took meanwhile, as in turns.
        self._pace.step(exchange.step - self._last_step, batch_size, batch_size)
        self._last_step = exchange.step
        party = self.session.party
        if warning := self._watch(party.spec, party.bytes_per_second):
            log.warning("%s", warning)
        if now - self._told_at >= SECONDS_BETWEEN_LINES:
            self._told_at, left = now, schedule.total_steps - exchange.step - 1
            pace = self._pace.status(left) + _link_status(party)
            log.info("step %d of %d: %s", exchange.step + 1, schedule.total_steps, pace)


class LinkWatch:
    """Tells, once, where a link has been too slow for `cut_seconds` for some steps, whatever the budget."""

    STEPS = 20

    def __init__(self):
        self._slow_steps = 0

    def __call__(self, spec: RunSpec, bytes_per_second: np.float32 | None) -> str | None:
        """Returns a warning that is due after a step; `bytes_per_second` as of `budget.next_bytes_per_second`."""
        if not bytes_per_second or self._slow_steps == self.STEPS:
            return None
        slow = budget.least_seconds(spec, bytes_per_second) > spec.cut_seconds
        self._slow_steps = self._slow_steps + 1 if slow else 0
        if self._slow_steps < self.STEPS:
            return None
        return f"{budget.why_too_slow(spec, bytes_per_second)}. The link's speed was measured, with its latency"


def _what_is_sent(cfg, spec):
    cuts = [f"cut {cfg.cut!r}"] * cfg.has_cut + [f"tail_cut {cfg.tail_cut!r}"] * (cfg.tail_cut is not None)
    labels = "labels go to the server, too" if spec.sends_labels else "labels stay here"
    return (
        f"{', '.join(cuts) or 'this run'}: features {spec.features} go to the server through {spec.codec}, their "
        f"gradients come back through {spec.grad_codec}; {labels}"
    )


def _link_status(party):
    """What the client takes its link for, and its budget for the next step, where that follows the link."""
    if not party.bytes_per_second:
        return ""
    bits = budget.budget_bits(party.spec, party.bytes_per_second)
    return f", link {party.bytes_per_second / 1e6:.3g} MB/s, {bits:.2f} bits both ways"


def keep_part_of_another_run(file: pathlib.Path, run_id: str) -> None:
    """Gives a part that another run has left under this name one of its own, so that it is not replaced."""
    if not file.exists() or (other := run_name(part_run_id(file))) == run_id:
        return
    name = other if other.isalnum() else "unknown"
    kept = file.with_name(f"{file.stem}-{name}{file.suffix}")
    file.replace(kept)
    log.info("%s was of another run, and is %s now", file, kept.name)


def own_config(cfg: config.Config, preset: config.Config | None, options: ClientOptions) -> config.Config:
    """Returns the server's config with model, data and task of this client's preset, if any, and its copies of files.

    Raises:
      ValueError: the server's config sets another model, data or task than the preset has; or, without a preset, it
        names functions of one, weights or a tokenizer, and there are none here, or it says where on this machine
        something is to be read or written; or `data_dir` does not have the data, see `config.with_own_paths`.
    """
    if preset is not None:
        config.check_own(cfg, preset, divided=not options.own_data)
        if unused := config.passed_over(cfg, preset):
            said = "of this client's preset model, data and task count; the run is the server's, which differs in %s"
            log.info(said, ", ".join(unused))
        starts_from = cfg.model.weights
        cfg = config.with_own(cfg, preset)
        if options.weights is not None and (starts_from or cfg.model.weights) is not None:
            cfg = config.with_fields(cfg, {"model.weights": options.weights})
        return build.resolved(config.with_own_paths(cfg, data_dir=options.data_dir, tokenizer=options.tokenizer))
    if named := config.references(cfg):
        field, value = next(iter(named.items()))
        raise ValueError(
            f"the run's {field} is {value!r}, a function of a preset, and functions do not travel: "
            "give this client its own preset"
        )
    if cfg.model.weights is not None:
        if options.weights is None:
            raise ValueError(
                f"the run starts from the weights {cfg.model.weights!r}: give this client its copy of them as weights"
            )
        cfg = config.with_fields(cfg, {"model.weights": options.weights})
    config.check_received(cfg)
    return config.with_own_paths(cfg, data_dir=options.data_dir, tokenizer=_own_tokenizer(cfg, options))


def _own_tokenizer(cfg, options):
    """The path of this client's tokenizer; None where the run has none."""
    if options.tokenizer is not None:
        return options.tokenizer
    if cfg.model.name != models.DECODER and cfg.data.tokenizer is None:
        return None
    if options.weights is not None and (expand("weights", options.weights) / "tokenizer.json").is_file():
        return options.weights
    raise ValueError(
        f"the run's texts are split by a tokenizer, {cfg.data.tokenizer!r}: give this client its copy as tokenizer"
    )
