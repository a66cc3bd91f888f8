"""What is sent in a step, and how long that takes on a link."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from msjax import compress, config, models
from msjax.split import budget
from msjax.split.payloads import Codecs, PayloadSpec, header_bytes
from msjax.split.spec import RunSpec
from msjax.split.traffic import Measure, Traffic, epoch_traffic


class Link(NamedTuple):
    """How fast messages travel, in 10⁶ bits a second of each direction; up and down do not overlap in a step.

    Attributes:
      client_mbit: of each client's own link.
      server_mbit: of the server's, which all its clients share; None where that is no limit.
    """

    client_mbit: float = 100.0
    server_mbit: float | None = None

    def seconds(self, client_bytes: float, clients: int) -> float:
        """Returns how long it takes that each of `clients` sends so many bytes, or gets them, all at once."""
        own = 8 * client_bytes / (self.client_mbit * 1e6)
        shared = 0.0 if self.server_mbit is None else 8 * client_bytes * clients / (self.server_mbit * 1e6)
        return max(own, shared)

    def bytes_per_second(self, clients: int) -> np.float32:
        """Returns what each of `clients` has of it, all at once."""
        return np.float32(1 / self.seconds(1.0, clients))


class Sent(NamedTuple):
    """What a codec makes of a run's messages, of one client.

    Attributes:
      up_bytes, down_bytes: of a step: the mean over the run, labels and averages with it.
      feature_bytes: of those, the features up.
      gradient_bytes: the gradients down (U-shaped, what the server sends).
      average_up_bytes, average_down_bytes: what keeps the clients equal.
      exact: whether these are what is sent. Of entropy-coded codecs with a number of bits it is what they aim at, of
        others the bytes before coding, which is the most, with headers. Of a budget (`cut_bits`) it is all of it, which
        features and gradients share as in the first step.
      seconds: of a step's messages on the link.
    """

    up_bytes: float
    down_bytes: float
    feature_bytes: float
    gradient_bytes: float
    average_up_bytes: float
    average_down_bytes: float
    exact: bool
    seconds: float


class Row(NamedTuple):
    """One choice of codecs in the table."""

    name: str
    codec: str
    grad_codec: str
    sent: Sent


def sent(spec: RunSpec, link: Link) -> Sent:
    """Returns what a client sends and gets in a step, the mean over the run, and how long that takes on a link."""
    schedule = spec.schedule
    at_once = len(schedule.position(0).clients)
    client_steps = schedule.total_steps * at_once
    traffic = _with_budget(spec, link, _of_run(spec, _about_bytes))
    codecs = [spec.codec, spec.grad_codec, *([Codecs(spec.update_codec)] if spec.compresses_updates else [])]
    mean = {field.name: getattr(traffic, field.name) / client_steps for field in dataclasses.fields(Traffic)}
    up, down = traffic.uplink_bytes / client_steps, traffic.downlink_bytes / client_steps
    return Sent(
        up,
        down,
        mean["uplink_feature_bytes"],
        mean["downlink_gradient_bytes"] + mean["downlink_feature_bytes"],
        mean["uplink_synchronization_bytes"],
        mean["downlink_synchronization_bytes"],
        not any(codec.entropy_coded for codec in codecs),
        link.seconds(up, at_once) + link.seconds(down, at_once),
    )


@functools.lru_cache(maxsize=16)
def _about_bytes(payload: PayloadSpec) -> int:
    """About the bytes of a message; where any codec is entropy-coded with headers, as a run then counts it."""
    if not any(codec.entropy_coded for codec in payload.codecs):
        return payload.aimed_bytes
    return payload.aimed_bytes + sum(map(header_bytes, payload.codecs, payload.likes))


def _of_run(spec: RunSpec, measure: Measure) -> Traffic:
    """The traffic of a run. In the first epoch less is handed on, and all later ones are alike, but for their tests."""
    first, later = epoch_traffic(spec, 0, measure), spec.schedule.epochs - 1
    return first + epoch_traffic(spec, 1, measure) * later if later else first


def _with_budget(spec, link, traffic):
    """The traffic of a run where features and gradients of the first cut have one budget: shared as at first."""
    if spec.cut_bits is None:
        return traffic
    bits = float(budget.budget_bits(spec, link.bytes_per_second(len(spec.schedule.position(0).clients))))
    values = _of_run(spec, lambda payload: payload.float_values)
    exact = _of_run(spec, lambda payload: payload.exact_bytes)
    shares = {"uplink_feature_bytes": budget.FIRST, "downlink_gradient_bytes": 1 - budget.FIRST}
    sizes = {n: getattr(exact, n) + round(bits * share * getattr(values, n) / 8) for n, share in shares.items()}
    return dataclasses.replace(traffic, **sizes)


def alternatives(cfg: config.Config) -> dict[str, tuple[compress.Codec, compress.Codec]]:
    """Returns by name the codecs of features and gradients that are set beside a config's.

    No compression; the paper's, at its rates; EntropyMask one way and both ways.
    """
    signed = cfg.model.name == models.DECODER or cfg.model.cut_before_activation or getattr(cfg.codec, "signed", False)
    none, entropy = compress.Identity(), functools.partial(compress.EntropyMask, signed=signed)
    unbiased = compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic")
    return {
        "none": (none, none),
        "QU, 3 bits": (compress.Uniform(bits=3), none),
        "SP, 4.1 %": (compress.TopK(ratio=0.95875), none),
        "MS": (compress.MaskEncoded(ratio=0.99, bits=2, signed=signed), none),
        "EntropyMask, 2 bits": (entropy(bits=2.0), none),
        "EntropyMask, 2 bits up, 1.5 down": (entropy(bits=2.0), unbiased),
    }


def with_codecs(spec: RunSpec, codec: compress.Codec, grad_codec: compress.Codec) -> RunSpec:
    """Returns the same run with these codecs at the cut, for all arrays and without a common budget."""
    changed = {"codec": Codecs(codec), "test_codec": Codecs(codec).at_inference(), "grad_codec": Codecs(grad_codec)}
    none = dict.fromkeys(("cut_bits", "cut_seconds", "link_bytes_per_second"))
    return dataclasses.replace(spec, **changed, **none, grad_kept_only=False)
