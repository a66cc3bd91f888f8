"""`train`: a user's model, data and task, trained through a cut by simulated clients in one program."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msjax import data as data_lib
from msjax import tasks
from msjax.build import DataSummary, divide, pixel_maximum
from msjax.checks import integer, number, quoted
from msjax.compress import Codec, Identity, MaskEncoded
from msjax.config import MAX_SEED, Config, OptimConfig, check_used
from msjax.models import PARTS, ModelPart, RemoteApply, as_parts
from msjax.optim import as_transformation, check_optimizer, make_optimizer
from msjax.paths import expand
from msjax.split import sent
from msjax.split.budget import check_known_link, mean_up_bits
from msjax.split.early import check_labels, warn_of_narrow
from msjax.split.make_spec import init_part, make_spec
from msjax.split.modes import Mode, Parallel
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.signs import warn_of_lost_signs
from msjax.split.spec import Preprocess, RunSpec
from msjax.split.state import TrainState
from msjax.split.traffic import Traffic
from msjax.split.trees import TreeSpec
from msjax.training import loaded, loop, processes
from msjax.training.folders import describe_optimizer, open_folder, write_parts


class TrainResult(NamedTuple):
    """What `train` returns.

    Attributes:
      parts: the trained parts: client and server, and, U-shaped, tail. `part.apply(part.params, part.stats, x,
        train=False)` returns outputs and statistics.
      history: a record an epoch: "epoch", "step", "train" and "test" (loss, metrics), "traffic" (bytes so far, of all
        clients), "seconds" (so far).
      test: loss and metrics on the test data at the end; empty where there are none.
      traffic: the bytes of all epochs, by kind and direction: those of payloads, of entropy-coded codecs before coding.
        `cut_bytes` and `total_bytes` have those of messages instead.
      spec: the description of the run.
      summary: of the data set: one input, classes, what inputs are normalised by.
      up_bits: with `cut_bits`, the bits that features were aimed at in the end: what to give the codec, as
        `EntropyMask(bits=…)`, with which features cross the cut after training; else None.
    """

    parts: tuple[ModelPart, ...]
    history: list[dict[str, Any]]
    test: dict[str, float]
    traffic: Traffic
    spec: RunSpec
    summary: DataSummary
    up_bits: float | None = None

    @property
    def cut_bytes(self) -> int:
        """The bytes of features and gradients over the cut, both ways; of entropy-coded codecs, those of messages."""
        return sent.cut_bytes(self.history[-1]["traffic"])

    @property
    def total_bytes(self) -> int:
        """The bytes of all that was sent, both ways, as of `cut_bytes`."""
        return sent.total_bytes(self.history[-1]["traffic"])

    @property
    def client(self) -> ModelPart:
        """The client's part."""
        return self.parts[0]

    @property
    def server(self) -> ModelPart:
        """The server's part."""
        return self.parts[1]

    def predict(self, inputs: Any, *, raw: bool = False) -> Any:
        """Returns the outputs of a batch, with nothing compressed.

        Args:
          inputs: a batch as the data set stores it: images as they are, rows of a table standardised.
          raw: of a table, or of other numbers that the data set has standardised: take them as they were before, rows
            of numbers (N, columns) or a pandas.DataFrame.

        Raises:
          ValueError, data.DataError: the inputs are not such as the network takes, or `raw` of what is stored as it is.
        """
        if raw:
            inputs = data_lib.standardized_inputs(inputs, self.summary.columns)
        batch = _as_stored(jax.tree.map(jnp.asarray, inputs), self.summary.inputs)
        try:
            x = self.spec.preprocess(batch)
            for part in self.parts:
                x, _ = part.apply(part.params, part.stats, x, train=False, key=None)
        except Exception as error:
            raise ValueError(
                f"inputs must be a batch as the data set stores it, got {TreeSpec.of(batch)}, with which the network "
                f"raised {quoted(error)}"
            ) from error
        return x


def _as_stored(batch, expected):
    """A batch in the dtypes in which the data set stores it; images without their only channel get it."""
    leaves, structure = jax.tree.flatten(batch)
    if len(leaves) != len(expected.leaves):
        raise ValueError(f"inputs must be {expected} each, as the data set stores them, got {TreeSpec.of(batch)}")
    found = []
    for leaf, like in zip(leaves, expected.leaves, strict=True):
        if like.dtype == jnp.uint8 and like.shape[2:] == (1,) and leaf.shape[1:] == like.shape[:2]:
            leaf = leaf[..., None]
        if leaf.dtype != like.dtype and not _may_be_cast(leaf.dtype, like):
            raise ValueError(f"inputs must be {expected} each, as the data set stores them, got {TreeSpec.of(batch)}")
        found.append(leaf.astype(like.dtype))
    return jax.tree.unflatten(structure, found)


def _may_be_cast(dtype, like):
    """Whether numbers of another dtype than is stored are meant: not pixels in place of floats, or the reverse."""
    kinds = {kind: [jnp.issubdtype(each, kind) for each in (dtype, like.dtype)] for kind in (jnp.floating, jnp.integer)}
    if all(kinds[jnp.floating]):
        return True
    if all(kinds[jnp.integer]) or dtype == jnp.bool_:
        return like.dtype != jnp.uint8
    whole_numbers = kinds[jnp.integer][0] and dtype != jnp.uint8
    return whole_numbers and kinds[jnp.floating][1] and len(like.shape) < 2


def train(
    model: Any,
    data: Any,
    *,
    task: tasks.Task | str = "classification",
    cut: int | None = None,
    codec: Codec | Mapping[str, Codec] | None = None,
    grad_codec: Codec | Mapping[str, Codec] | None = None,
    grad_kept_only: bool = False,
    update_codec: Codec | None = None,
    cut_bits: float | None = None,
    cut_seconds: float | None = None,
    link_bytes_per_second: float | None = None,
    compress_test: bool = True,
    mode: Mode | None = None,
    clients: int = 10,
    clients_per_group: int | None = None,
    shard_server: bool = False,
    alpha: float | None = None,
    division: Sequence[Any] | None = None,
    batch_size: int = 32,
    epochs: int = 10,
    optimizer: optax.GradientTransformation | OptimConfig | None = None,
    augment: Any = None,
    test_every: int = 1,
    seed: int = 0,
    folder: str | None = None,
    allow_nonfinite: bool = False,
    workers: int | None = None,
    quiet: bool = True,
) -> TrainResult:
    """Trains a split network, with simulated clients in one program.

    After `jax.distributed.initialize` the program is that of all processes, each of which makes the same call: clients
    are spread over their devices, and process 0 writes the folder, which all must reach.

    Args:
      model: client and server part, and, U-shaped, a tail that stays with the client: each an `nnx.Module`, a
        `linen.Module`, a pair or triple of function and arrays, or a `models.ModelPart`; see `models.as_part`. Or, with
        `cut`, one sequential model.
      data: a `data.Dataset`, arrays `(inputs, labels)`, a path of an `.npz`, a CSV file or a folder of images, or
        anything else that `data.as_dataset` takes.
      task: a `tasks.Task`, or the name of one that needs no option.
      cut: how many layers of a sequential model the client has.
      codec: of the features, on their way up; by default MS, `MaskEncoded(ratio=0.99, bits=2)`. By name, as
        {"skip": TopK(0.9), "": MaskEncoded()}, where the client returns a tree of arrays; "" is for all others, which
        without it are sent uncompressed.
      grad_codec: of the features' gradients, on their way down; by default they are not compressed.
      grad_kept_only: send gradients only where the features were kept, and take them for zero elsewhere: of a
        sparsifier's kept values alone, of an `EntropyMask`'s where a code is not 0, of other codecs' where a feature
        does not decode to zero; see `compress.straight_through`. Messages become shorter with a sparsifier, or with
        an `EntropyMask` as `grad_codec`.
      update_codec: of what keeps the clients' parts equal, both ways, with error feedback unless the codec is unbiased:
        in `Parallel` their gradients and in `SplitFed` the changes of their parts; by default not compressed. A codec
        for both signs, as `EntropyMask(bits=2.0, signed=True)`; it pays for parts of some hundred values or more.
        Statistics then have 8 bits, or in `SplitFed` 32. In `Sequential`, and with a `client_fraction` below 1, a
        `Cast`, of the parts that are handed on. With one client there is neither, and it has no effect.
      cut_bits: one budget for both ways over the cut, in real bits a value of the features, up and down together. Both
        codecs are then an `EntropyMask`: gradients take what their codec's `error` needs, half of the budget at most,
        and features what is left, from step to step. U-shaped it is the budget of the first cut.
      cut_seconds: the time that a step's messages may take on a client's link: features, labels and gradients of a
        full batch, and what keeps the clients equal. The budget of features and gradients is then what fits in, from
        an eighth of `cut_bits` to `cut_bits`.
      link_bytes_per_second: how fast the simulated link of each client is; needed with `cut_seconds`.
      compress_test: whether test features go through the codec, as in the paper.
      mode: how the clients work together; by default `Parallel()`, the paper's.
      clients: their number K, among whom the training data are divided.
      clients_per_group: how many clients each device computes at the same time, those of a step in one group after
        another; by default all. The memory of activations is then that of one group, and the numbers are the same up
        to the order of sums. In `Sequential` one client takes a step in any case.
      shard_server: shard the server's part and its optimizer's state over all devices (FSDP), with the batch of each
        step, so that a larger part fits; by default each device has all of it. The numbers are the same up to the order
        of sums. With one device it changes nothing.
      alpha: Dirichlet concentration of a label-skewed division; by default an even one.
      division: in place of `alpha`, of each client the indices of its training samples, as where clients are hospitals
        or users. However the data are divided, each client draws as many samples in an epoch, N // K of the N that
        are anyone's: it takes a small share more than once, and of a large one others in each epoch.
      batch_size: samples that each client sends in a step; all that it has, where these are fewer.
      epochs: of the run.
      optimizer: an optax transformation, or an `OptimConfig`; by default SGD as in the paper with a rate of 0.05.
      augment: for training inputs: one of `data.AUGMENTATIONS`; or a function from (inputs, key) to inputs, or from
        (inputs, labels, key) to (inputs, labels), of a client's batch; by default what is usual for the data set.
      test_every: epochs between two tests; the last epoch always has one.
      seed: of parameters that are not there yet, division, order, augmentation and codecs, and of which clients a
        `SplitFed(client_fraction=…)` draws, if that has no seed of its own.
      folder: where to keep checkpoints, history and trained parts; a run that was interrupted there is continued, and
        one that had ended is returned. It must be the same run: shapes, codecs, counts, seed, data, an `OptimConfig`
        and the options of a loss of `tasks` are compared, but functions, Optax's optimizers and first parameters cannot
        be.
      allow_nonfinite: go on where a loss is NaN or infinite, instead of ending with an error.
      workers: how many processes read and decode data that are not in memory; 0: threads. By default as
        `data.Reader` has it. Workers import the main module of the program, which must train under `if __name__ ==
        "__main__":` then.
      quiet: print nothing.

    Returns:
      The trained parts, history and bytes.

    Raises:
      TypeError, ValueError: an argument has a value that does not fit, or the parts do not fit each other, the data or
        the task; before the first step.
      Interrupted: SIGINT or SIGTERM came; the state was saved where there is a folder.
      NonFiniteError: a loss is NaN or infinite; it says when, of which clients, and what to try.
      ProcessLostError: another process has ended, where there are several.
    """
    mode = Parallel() if mode is None else mode
    if not isinstance(mode, Mode):
        raise TypeError(f"mode must be a mode of msjax.split.modes, as Parallel(), got {mode!r}")
    clients, batch_size, epochs, test_every = (
        integer(name, value, 1)
        for name, value in {
            "clients": clients,
            "batch_size": batch_size,
            "epochs": epochs,
            "test_every": test_every,
        }.items()
    )
    if clients_per_group is not None:
        clients_per_group = integer("clients_per_group", clients_per_group, 1)
    seed = integer("seed", seed, 0, MAX_SEED)
    if workers is not None:
        workers = integer("workers", workers, 0)
    if alpha is not None:
        alpha = number("alpha", alpha, "a number above 0, or None", lambda value: 0 < value < math.inf)
    for name, value in {
        "compress_test": compress_test,
        "grad_kept_only": grad_kept_only,
        "shard_server": shard_server,
        "allow_nonfinite": allow_nonfinite,
        "quiet": quiet,
    }.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path or None, got {folder!r}")
    folder = None if folder is None else str(expand("folder", folder))
    if isinstance(augment, str) and augment not in data_lib.AUGMENTATIONS:
        raise ValueError(f"augment must be a function or one of {', '.join(data_lib.AUGMENTATIONS)}, got {augment!r}")
    dataset = data_lib.as_dataset(data)
    indices, samples = divide(dataset, clients, alpha=alpha, seed=seed, division=division)
    summary = DataSummary.of(dataset)
    inputs, labels = summary.inputs, summary.labels
    preprocess = Preprocess(
        dataset.augment if augment is None else augment,
        summary.mean,
        summary.std,
        maximum=pixel_maximum(inputs),
    )
    x = jax.eval_shape(lambda x: preprocess(x), inputs.batch(2))
    parts = as_parts(model, x, cut=cut, seed=seed)
    if any(isinstance(part.apply, RemoteApply) for part in parts):
        raise ValueError("model must have all its parts in one program, got a RemotePart among them")
    counts = (clients, samples, len(dataset.test), batch_size, epochs, test_every)
    schedule = Schedule(mode.seeded(seed), *counts, u_shaped=len(parts) == 3)
    is_new = folder is None or not os.path.exists(os.path.join(folder, "spec.json"))
    transformation, made_task = _optimizer(optimizer, schedule, is_new=is_new), _task(task, optimizer)
    check_optimizer("optimizer", transformation, parts)
    codecs = Codecs.of(MaskEncoded() if codec is None else codec)
    spec = make_spec(
        parts,
        inputs=inputs,
        labels=labels,
        schedule=schedule,
        task=made_task,
        optimizer=transformation,
        codec=codecs,
        grad_codec=Codecs.of(Identity() if grad_codec is None else grad_codec, "grad_codec"),
        grad_kept_only=grad_kept_only,
        test_codec=codecs.at_inference() if compress_test else Codecs(Identity()),
        update_codec=Identity() if update_codec is None else update_codec,
        cut_bits=cut_bits,
        cut_seconds=cut_seconds,
        link_bytes_per_second=link_bytes_per_second,
        preprocess=preprocess,
    )
    check_known_link(spec)
    check_labels(spec, dataset)
    warn_of_narrow(parts)
    # A run gives its state away, but the user's arrays are not its own.
    own = tuple(p._replace(params=_copied(p.params), stats=_copied(p.stats)) for p in parts)
    first = TrainState(init_part(spec.optimizer, own[0], *own[2:]), init_part(spec.optimizer, own[1]), jnp.int32(0))
    title = f"{dataset.name} {spec.task.name} {type(codecs.default).__name__}"
    options = (allow_nonfinite, workers, clients_per_group, shard_server)
    run = loaded.LoadedRun(spec, first, dataset, indices, seed, title, *options)
    loaded.check_processes(
        run,
        optimizer=describe_optimizer(optimizer),
        alpha=alpha,
        allow_nonfinite=allow_nonfinite,
        clients_per_group=clients_per_group,
        folder=folder,
    )
    run_folder = (
        None if folder is None else open_folder(folder, run, optimizer, alpha, own_division=division is not None)
    )
    if run_folder is None or run_folder.checkpoints.latest() is None:  # else it has been told
        warn_of_lost_signs(spec, first.client, dataset.train, server=first.server)
    try:
        finished = loop.train(run, run_folder, quiet=quiet)
        trained, up_bits = _trained(parts, finished.state), mean_up_bits(finished.state.up_bits)
        if run_folder is not None:
            step = int(finished.state.step)
            processes.from_first(lambda: write_parts(run_folder, trained, spec, summary, step=step, up_bits=up_bits))
    finally:
        if run_folder is not None:
            run_folder.close()
    test = finished.history[-1].get("test", {})
    return TrainResult(trained, finished.history, test, finished.traffic, spec, summary, up_bits)


def _task(task, optimizer):
    smoothing = optimizer.label_smoothing if isinstance(optimizer, OptimConfig) else 0
    if smoothing and task != "classification":
        raise ValueError(
            f"label_smoothing of the optimizer must be 0 for another task than 'classification', got {smoothing}: give "
            "it to the task, as tasks.classification(label_smoothing=…)"
        )
    if smoothing:
        return tasks.classification(label_smoothing=smoothing)
    if isinstance(task, tasks.Task):
        return task
    if task not in tasks.TASKS:
        raise ValueError(f"task must be a tasks.Task or one of {', '.join(tasks.TASKS)}, got {task!r}")
    try:
        return tasks.TASKS[task]()
    except TypeError:
        raise ValueError(f"task {task!r} needs options: give tasks.{task}(…)") from None


def _optimizer(optimizer, schedule, *, is_new):
    optimizer = as_transformation(optimizer)
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    if optimizer is None:
        optimizer = OptimConfig(learning_rate=0.05)
    if not isinstance(optimizer, OptimConfig):
        raise TypeError(f"optimizer must be an optax transformation or an OptimConfig, got {optimizer!r}")
    cfg = Config(optim=optimizer)  # checks its fields
    if is_new:
        check_used(cfg)
    return make_optimizer(optimizer, epochs=schedule.epochs, steps_per_epoch=schedule.epoch_steps)


def _copied(tree):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _trained(parts, state):
    """The parts with their trained arrays."""
    if len(parts) == 2:
        owners = (state.client, state.server)
        return tuple(p._replace(params=s.params, stats=s.stats) for p, s in zip(parts, owners, strict=True))
    found = []
    for name, part, owner in zip(PARTS, parts, (state.client, state.server, state.client), strict=True):
        if name == "server":
            found.append(part._replace(params=owner.params, stats=owner.stats))
        else:  # what the client has of both is kept together
            found.append(part.out_of(owner.params, owner.stats))
    return tuple(found)
