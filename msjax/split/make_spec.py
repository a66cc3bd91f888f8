"""The description of a run from its parts, data and codecs, checked on shapes alone; and the first states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msjax.checks import quoted
from msjax.compress import Cast, Codec, EntropyMask, Identity
from msjax.compress._straight_through import check_granularity_of_kept
from msjax.models import ModelPart, RemoteApply, constants_of
from msjax.split.budget import fixed_bytes
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.spec import Preprocess, RunSpec
from msjax.split.state import PartState, without_constants
from msjax.split.trees import TreeSpec, count_floats, float_leaves, is_float, named_leaves
from msjax.tasks import Task


def make_spec(
    parts: tuple[ModelPart, ...],
    *,
    client_values: tuple[int, int, int] | None = None,
    inputs: TreeSpec,
    labels: TreeSpec,
    schedule: Schedule,
    task: Task,
    optimizer: optax.GradientTransformation,
    codec: Codecs,
    grad_codec: Codecs,
    grad_kept_only: bool = False,
    test_codec: Codecs,
    update_codec: Codec,
    cut_bits: float | None = None,
    cut_seconds: float | None = None,
    link_bytes_per_second: float | None = None,
    preprocess: Preprocess,
) -> RunSpec:
    """Returns the description of a run, checked on shapes alone.

    Args:
      parts: client, server and, where `schedule.u_shaped`, tail; arrays, or their shapes and dtypes. Of a part that
        another party has its `apply` is a `models.RemoteApply`.
      client_values: how many floating values the client's part has without and with the optimizer's state, and how
        many of them are statistics; needed where it is another party's.
      inputs: one sample as the data set stores it.

    Raises:
      TypeError: `update_codec` is no codec.
      ValueError: a part does not take what the one before returns, loss or metrics do not fit, a codec is named for an
        array that is not there, `update_codec` does not fit the mode or the optimizer, `grad_codec` or `update_codec`
        is not signed, `grad_codec` takes samples where none are left of what was kept, `cut_bits` does not fit the
        codecs, or there is a `cut_seconds` without it, or a `link_bytes_per_second` without that.
    """
    check_cut_budget(cut_bits, cut_seconds, link_bytes_per_second, codec, grad_codec)
    if cut_bits is not None:
        grad_codec = Codecs(_within(grad_codec.default, cut_bits / 2))
    names = ("client", "server", "tail")[: len(parts)]
    batch = 2
    key = jax.random.key(0)
    preprocess.check(labels)
    x = _shapes_of(
        "preprocessing",
        "what the data set stores",
        lambda y, x: preprocess.augmented(x, y, key)[0],
        labels.batch(batch),
        inputs.batch(batch),
    )
    found, before = [], "the data"
    for name, part in zip(names, parts, strict=True):
        if isinstance(part.apply, RemoteApply):
            y = TreeSpec(*part.apply.outputs).batch(batch)
        else:
            y = _part_outputs(name, part, x, before)
        found.append(TreeSpec.of_batch(y, batch, f"what {name} returns"))
        for where, leaf in named_leaves(part.params):
            if not is_float(leaf):
                raise ValueError(f"{name} must have floating parameters, got {leaf.dtype} at {where!r}: see as_part")
        x, before = y, name
    features, outputs = found[0], found[1]
    if not (floats := float_leaves(features.batch(1))):
        raise ValueError(f"client must return at least one floating array to be compressed, got {features}")
    if not all(leaf.size for leaf in floats):
        raise ValueError(f"client must return floating arrays with values, got {features}")
    if client_values is None:
        client = jax.eval_shape(lambda: init_part(optimizer, parts[0], *parts[2:]))
        averaged = count_floats((client.params, client.stats))
        client_values = averaged, count_floats(client), count_floats(client.stats)
    here = [None if isinstance(part.apply, RemoteApply) else part.apply for part in parts]
    update_values, state_values, statistic_values = client_values
    spec = RunSpec(
        client=here[0],
        server=here[1],
        tail=here[2] if len(parts) > 2 else None,
        features=features,
        outputs=outputs,
        tail_outputs=found[2] if len(parts) > 2 else None,
        labels=labels,
        client_update_values=update_values,
        client_state_values=state_values,
        client_statistic_values=statistic_values,
        codec=codec,
        grad_codec=grad_codec,
        grad_kept_only=grad_kept_only,
        test_codec=test_codec,
        update_codec=update_codec,
        cut_bits=cut_bits,
        cut_seconds=cut_seconds,
        link_bytes_per_second=link_bytes_per_second,
        optimizer=optimizer,
        task=task,
        preprocess=preprocess,
        schedule=schedule,
    )
    _check_update_codec(update_codec, schedule, optimizer, parts)
    for one in grad_codec.all:
        _check_signed("grad_codec", one)
    codec.for_tree(features)
    grad_codec.for_tree(features, "grad_codec")
    payloads = [spec.gradient_payload(batch), *([spec.tail_gradient_payload(batch)] if spec.u_shaped else [])]
    for payload in payloads:
        of_features = payload.kept_by or (None,) * len(payload.wholes)
        for args in zip(payload.codecs, of_features, payload.wholes, payload.likes, strict=False):
            check_granularity_of_kept(*args, "grad_kept_only")
    _check_room_for_codes(spec)
    _ = spec.metric_sums_like
    task.check_sums(found[-1].batch(3), labels.batch(3))
    return spec


def _check_room_for_codes(spec):
    """Raises ValueError where messages of a full batch take the whole budget without a single code."""
    if spec.cut_bits is None:
        return
    fixed, values = fixed_bytes(spec), spec.feature_payload(spec.schedule.full_batch_size).float_values
    if 8 * fixed >= spec.cut_bits * values:
        raise ValueError(
            f"cut_bits must leave room for codes, got {spec.cut_bits}: a step's messages of {values} values take "
            f"{8 * fixed / values:.2g} bits a value for their headers alone. Take larger batches, or no budget"
        )


def _check_signed(name, codec):
    """Gradients have both signs, of which one would be lost."""
    if not getattr(codec, "signed", True):
        raise ValueError(f"{name} must have signed=True, as gradients are of both signs, got {codec}")


def check_cut_budget(
    cut_bits: float | None,
    cut_seconds: float | None,
    link_bytes_per_second: float | None,
    codec: Codecs,
    grad_codec: Codecs,
) -> None:
    """Raises ValueError where `cut_bits` and what goes with it do not fit each other, or the codecs."""
    _check_link(cut_bits, cut_seconds, link_bytes_per_second)
    if cut_bits is not None:
        _check_bits(cut_bits, codec, grad_codec)


_LEAST, _MOST = 1e-30, 1e30  # far within float32


def _check_bits(bits, codec, grad_codec):
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= 32:
        raise ValueError(f"cut_bits must be a number above 0, at most 32, or None, got {bits!r}")
    for name, codecs in {"codec": codec, "grad_codec": grad_codec}.items():
        if other := next((one for one in codecs.all if not isinstance(one, EntropyMask)), None):
            also = (
                ", also of arrays that have no name (the name '')" if codecs.named and other is codecs.default else ""
            )
            raise ValueError(f"{name} must be an EntropyMask where cut_bits is given{also}, got {other}")
    if grad_codec.named or grad_codec.default.error is None or grad_codec.default.bits is not None:
        raise ValueError(f"grad_codec must have an error and no bits where cut_bits is given, got {grad_codec}")


def _within(codec, bits):
    """The gradients' codec with the most bits that it may take; with levels for both targets, if they are its own."""
    own = dataclasses.replace(codec, levels=None).levels == codec.levels
    return dataclasses.replace(codec, bits=bits, levels=None if own else codec.levels)


def _check_link(cut_bits, cut_seconds, link_bytes_per_second):
    for name, value, needed, given in (
        ("cut_seconds", cut_seconds, "cut_bits", cut_bits),
        ("link_bytes_per_second", link_bytes_per_second, "cut_seconds", cut_seconds),
    ):
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not _LEAST <= value <= _MOST:
            raise ValueError(f"{name} must be a number in {_LEAST:g}..{_MOST:g}, or None, got {value!r}")
        if given is None:
            raise ValueError(f"{name} must be None without {needed}, got {value!r}")


def _check_update_codec(codec, schedule, optimizer, parts):
    if not isinstance(codec, Codec):
        raise TypeError(f"update_codec must be a codec of msjax.compress, got {codec!r}")
    if codec == Identity():
        return
    _check_signed("update_codec", codec)
    try:
        codec.payload_like(jax.ShapeDtypeStruct((1,), np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"update_codec must be one of float32 vectors, got {codec}: {error}") from None
    mode = schedule.mode
    if mode.one_at_a_time or mode.hands_parts_on(schedule):
        if not isinstance(codec, Cast):
            where = "in sequential mode and with a client_fraction below 1, where whole parts are handed on"
            raise ValueError(f"update_codec must be Identity() or a Cast {where}, got {codec}")
        if codec.dtype == "float16":
            _check_no_squares(codec, optimizer, parts)
    if getattr(codec, "granularity", "tensor") != "tensor":
        raise ValueError(f'update_codec must have granularity="tensor", as averages have no samples, got {codec}')


_SQUARES = {"nu", "nu_max", "sum_of_squares", "v", "v_row", "v_col"}
"""What Optax calls an optimizer's sums and means of squared gradients."""


def _check_no_squares(codec, optimizer, parts):
    """Squares of gradients are too small for float16, and where they become 0 the next step is divided by nothing."""
    here = next(part.params for part in parts if not isinstance(part.apply, RemoteApply))
    paths = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, here))
    if found := sorted({getattr(key, "name", None) for path, _ in paths for key in path} & _SQUARES):
        raise ValueError(
            f"update_codec must not be of float16 where parts are handed on with squares of gradients, as this "
            f"optimizer has them ({', '.join(found)}): they are too small for it. Take Cast(), got {codec}"
        )


def _part_outputs(name, part, x, before):
    def run(params, stats, x):
        return part.apply(params, stats, x, train=True, key=jax.random.key(0))

    y, stats = _shapes_of(name, f"what {before} returns", run, part.params, part.stats, x)
    changing = without_constants(part.stats, constants_of(part.apply))
    expected, got = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (changing, stats))
    if expected != got:
        grows = jax.tree.structure(changing) != jax.tree.structure(stats)
        hint = ". What is sown grows: keep it among the intermediates" if grows else ""
        raise ValueError(f"{name} must return statistics of the structure that it gets, {expected}; got {got}{hint}")
    return y


def _shapes_of(name, what, function, *args):
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        raise ValueError(f"{name} must take {what}, {TreeSpec.of(args[-1])}, but raised {quoted(error)}") from error


def init_part(optimizer: optax.GradientTransformation, *parts: ModelPart) -> PartState:
    """Returns what a party that has these parts of the model starts with.

    Raises:
      ValueError: two parts have arrays of one name.
    """
    params, stats = {}, {}
    if len(parts) == 1:
        params, stats = parts[0].params, parts[0].stats
    else:
        params, stats = merge_arrays(*(part.params for part in parts)), merge_arrays(*(part.stats for part in parts))
    return PartState(params, stats, _apart(optimizer.init(params), params))


_FEW = 1024  # values, which are soon copied


def _apart(state, params):
    """An optimizer's state of which no array is another's, or a parameter: a step may not be given one array twice.

    Some keep the parameters as they were at first, begin two of their sums with one array of zeros, or give each party
    one array of their own options.
    """
    leaves, structure = jax.tree.flatten(state)
    seen, found = {id(leaf) for leaf in jax.tree.leaves(params)}, []
    for leaf in leaves:
        found.append(jnp.array(leaf, copy=True) if id(leaf) in seen or np.size(leaf) < _FEW else leaf)
        seen.add(id(leaf))
    return jax.tree.unflatten(structure, found)


def merge_arrays(*dicts: dict[str, Any]) -> dict[str, Any]:
    """Returns the union of dicts of arrays whose names must differ.

    Raises:
      ValueError: a name is in two of them.
    """
    merged: dict[str, Any] = {}
    for arrays in dicts:
        if twice := sorted(merged.keys() & arrays.keys()):
            raise ValueError(f"client and tail must have arrays of different names, got {twice[0]!r} in both")
        merged |= arrays
    return merged
