"""Whether transforms before the quantizer save real bytes: DCT, Haar, KLT and others beside plain steps.

    python -m experiments.transforms --weights DIR --data-dir DIR      # seven minutes on two busy cores
    python -m experiments.transforms --run FOLDER --data-dir DIR       # three minutes more

Features and gradients of the mean loss behind three blocks of the published ResNet20 (see `published_weights`), and at
the named cuts of a network that was trained here (`convergence`, without a codec, seed 0), of CIFAR-10's first training
images, not augmented: gradients as in training, features as at test, so that labels tell what the network makes of
them. Bases that follow from data (KLT, low rank) and energies are those of the training images behind, which are
measured nowhere. They are known to both ends and not counted; scales of channels are, in 16 bits each.

Every transform is orthonormal but for the scales, and its coefficients are quantized with one step: nearest with the
dead zone and conditional means of `EntropyMask` for features, at random for gradients. Channels of which more than a
fiftieth is beyond 15 codes have a byte a value, the others half of one; what is beyond is an outlier of 16 bits. Both
groups are coded as `msjax.wire` codes a buffer, with classes by neighbours where these pay, and bytes are those of
all. "Plain" goes the same way without a transform, so that the codings differ in nothing else. Decoded features are no
less than 0.

Measured at four steps each: the squared error relative to the energy; of features top-1 and the divergence (KL) of the
network's outputs from those without a codec, of gradients the error of the gradient of the client's weights. The table
has the real bits of each transform where it is as good as the plain one at a medium rate. A transform would be worth a
place in the library that takes 5 % less at every cut at equal divergence or gradient. Writes a record; what is done is
kept, and not done again.

What the record says. No transform is in the library, since none pays at every cut. Of the network that was trained
here 46 to 55 % of the features are zeros, which classes and flags code nearly for free; transforms spread single
values over them. There all that mix values take 14 to 98 % more at equal error, and 2 to 77 % more at equal divergence.
Behind the first and third block of the published network fewer features are zeros, and DCT takes 3 to 39 % off at equal
error, but DCT of 4x4 from 64 % less to 6 % more at equal divergence, and behind the first only KLT with DCT takes less
at both rates. Behind its sixth, where most are zeros, these take 15 to 58 % more at equal error. Only at the coarsest
step, below half a bit, is DCT better there, too; by divergence it already is at the next finer one.

Of gradients KLT and a low rank take 8 to 28 % off at all cuts of the network that was trained here, and at most 10 %
in the published one. "Kept alone" is no transform: only the gradients of features above 0 are sent, as
`grad_kept_only` does. At equal gradient of the client's weights that takes 43 to 49 % off, and 11 to 30 % in the
published network: more than any transform. Both together do not go, as every pixel keeps other channels. Top-1 on
training images is near 100 % where anything would be used, and tells little.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import feature_maps, published_cuts, published_weights
from msjax import compress
from msjax.compress import _buffers, _contexts

OUT = pathlib.Path(__file__).parent / "results" / "transforms"
BLOCKS = ("stage1_block1", "stage1_block3", "stage2_block3")
STEPS = (0.5, 0.9, 1.5, 2.6)
"""Against the root of the mean square of the map."""
NAMES = (
    "plain",
    "steps by channel",
    "DCT 2x2",
    "DCT 4x4",
    "Haar 4x4",
    "DCT 4x4 by energy",
    "KLT",
    "low rank",
    "KLT, DCT 2x2",
)
KEPT = "kept alone"
"""Of gradients: not transformed, but sent only where the feature is above 0, as `grad_kept_only` does."""
DEAD_ZONE = 0.1
NARROW, WIDE = 15, 255
"""Levels of the codes of two values in a byte, and of one."""
MOST_BEYOND = 0.02


class Transform:
    """An orthonormal map of channels and of blocks of pixels, then scales of what comes out.

    Args:
      name: one of `NAMES`.
      known: float32 (N, height, width, channels), other samples of the same map.
    """

    def __init__(self, name: str, known: np.ndarray):
        self.name = name
        self.channels = np.eye(known.shape[-1], dtype=np.float32)
        if "KLT" in name or name == "low rank":
            values, vectors = np.linalg.eigh(_covariance(known))
            self.channels = vectors[:, ::-1].astype(np.float32)
            if name == "low rank":
                share = np.cumsum(values[::-1]) / values.sum()
                self.channels = self.channels[:, : int(np.searchsorted(share, 0.99)) + 1]
        side = 4 if "4x4" in name else 2 if "2x2" in name else 1
        self.block = _haar() if name.startswith("Haar") else _dct(side)
        self.scales = np.ones(1, np.float32)
        energy = np.mean(np.square(self._rotated(known)), (0, 1, 2))
        if name == "steps by channel":
            spread = np.sqrt(np.maximum(energy, energy.max() * 1e-6))
            self.scales = (np.exp(np.log(spread).mean()) / spread) ** 0.5
        if name == "DCT 4x4 by energy":
            order = np.argsort(-energy)
            low = np.cumsum(energy[order]) > 0.9 * energy.sum()
            self.scales = np.where(low[np.argsort(order)], 0.5, 1.0)
        self.scales = self.scales.astype(np.float16).astype(np.float32)

    @property
    def side_bytes(self) -> int:
        """What scales take in a message."""
        return 2 * self.scales.size if self.scales.size > 1 else 0

    def forward(self, h: np.ndarray) -> np.ndarray:
        """Returns the coefficients (samples, height / side, width / side, side² · channels)."""
        return self._rotated(h) * self.scales

    def inverse(self, c: np.ndarray) -> np.ndarray:
        """Returns what `forward` was given, but for what a low rank lost."""
        side = len(self.block)
        n, height, width, _ = c.shape
        c = (c / self.scales).reshape(n, height, width, side, side, -1)
        h = np.einsum("nhwuvc,uy,vx->nhywxc", c, self.block, self.block, optimize=True)
        return h.reshape(n, height * side, width * side, -1) @ self.channels.T

    def _rotated(self, h):
        side = len(self.block)
        n, height, width, _ = h.shape
        h = (h @ self.channels).reshape(n, height // side, side, width // side, side, -1)
        c = np.einsum("nhywxc,uy,vx->nhwuvc", h, self.block, self.block, optimize=True)
        return c.reshape(n, height // side, width // side, -1)


def _covariance(h):
    rows = h.reshape(-1, h.shape[-1]).astype(np.float64)
    return rows.T @ rows / len(rows)


def _dct(side):
    """The orthonormal DCT-II, (frequencies, pixels)."""
    at = np.arange(side)
    basis = np.cos(np.pi * at[:, None] * (2 * at[None] + 1) / (2 * side)) * np.sqrt(2 / side)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _haar():
    """Two levels of Haar's transform of four pixels; one level is the DCT of two."""
    half = np.sqrt(0.5)
    rows = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [half, -half, 0, 0], [0, 0, half, -half]]
    return np.array(rows, np.float32)


def quantized(c: np.ndarray, step: float, *, random: bool) -> tuple[np.ndarray, int]:
    """Returns coefficients as they are decoded, and the bytes of their message without scales and headers."""
    rng = np.random.default_rng(0)
    steps = np.abs(c) / np.float32(step)
    if random:
        codes = np.floor(steps + rng.random(c.shape, np.float32))
    else:
        codes = np.where(steps < 0.5 + DEAD_ZONE, 0, np.floor(steps + 0.5))
    signed = bool((c < 0).any())
    narrow_most = NARROW // 2 if signed else NARROW - 1
    beyond = (codes > narrow_most).mean((0, 1, 2))
    is_wide = beyond > MOST_BEYOND
    if np.count_nonzero(~is_wide) % 2:  # two of them share a byte
        is_wide[np.flatnonzero(~is_wide)[np.argmax(beyond[~is_wide])]] = True
    out, total = np.empty_like(c), -(-is_wide.size // 8) + 4
    for levels, group in ((NARROW, ~is_wide), (WIDE, is_wide)):
        if group.any():
            decoded, count = _group(c[..., group], steps[..., group], codes[..., group], levels, signed, random)
            out[..., group] = decoded * np.float32(step)
            total += count
    return out, total


def quantized_kept(g: np.ndarray, step: float, is_kept: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns what `quantized` does of gradients, of which only those of kept features are sent."""
    sent = g[is_kept]
    sent = np.append(sent, np.zeros(sent.size % 2, np.float32)).reshape(-1, 1, 1, 2)
    decoded, count = quantized(sent, step, random=True)
    out = np.zeros_like(g)
    out[is_kept] = decoded.reshape(-1)[: np.count_nonzero(is_kept)]
    return out, count


def _group(c, steps, codes, levels, signed, random):
    """(decoded in steps, bytes) of channels whose codes have as many levels."""
    most = levels // 2 if signed else levels - 1
    outlier = codes > most
    inside = np.minimum(codes, most).astype(np.int64)
    if random:
        values = codes
    else:
        kept = ~outlier
        counts = np.bincount(inside[kept], minlength=most + 1)
        means = np.bincount(inside[kept], steps[kept], minlength=most + 1) / np.maximum(counts, 1)
        if signed:
            means[0] = 0
        values = np.where(outlier, steps, means.astype(np.float16)[inside]).astype(np.float16)
    values = np.where(c < 0, -values, values).astype(np.float32)
    digits = np.where(outlier, levels, np.where(c < 0, -inside, inside) + (most if signed else 0)).astype(np.uint8)
    codec = compress.EntropyMask(bits=1.0, levels=levels, signed=signed)
    packed = digits.reshape(-1) if levels == WIDE else digits.reshape(-1, 2) @ np.array([1, 16], np.uint8)
    coded = _buffers.shortest(packed, _contexts.grid_of(codec, c))[1]
    return values, min(packed.size, len(coded)) + 2 * np.count_nonzero(outlier) + 2 * (most + 1)


class Cut:
    """A network cut in two, and maps of it: those measured, and those of other images."""

    def __init__(self, network: feature_maps.Network, layer: int | str, samples: int):
        images, labels = map(jnp.asarray, network.run.dataset.train.fetch(np.arange(2 * samples)))
        x = network.run.spec.preprocess(images)
        client, server = network.cuts(layer)
        self._labels = np.asarray(labels[:samples])
        self.features, self.gradients, self.is_kept = {}, {}, {}
        for name, part in (("own", slice(samples)), ("known", slice(samples, None))):
            self.features[name] = np.asarray(published_cuts.features_of(client, x[part]))
            h, g = feature_maps.at_cut(client, server, x[part], labels[part], label_smoothing=0.0)
            self.gradients[name], self.is_kept[name] = np.asarray(g), np.asarray(h > 0)
        self._logits = functools.partial(_logits, server)
        self._plain = np.asarray(jax.nn.log_softmax(self._logits(self.features["own"])))

        self._weights_gradient = functools.partial(_weights_gradient, client, x[:samples])
        self._whole = np.asarray(self._weights_gradient(self.gradients["own"]), np.float64)

    def judge(self, kind: str, decoded: np.ndarray) -> dict[str, float]:
        """Returns what the network makes of decoded features, or the client of decoded gradients."""
        if kind == "gradients":
            off = np.asarray(self._weights_gradient(decoded), np.float64) - self._whole
            return {"damage": float(off @ off / (self._whole @ self._whole))}
        logits = np.asarray(jax.nn.log_softmax(self._logits(decoded)))
        divergence = (np.exp(self._plain) * (self._plain - logits)).sum(1).mean()
        top1 = 100 * float((logits.argmax(1) == self._labels).mean())
        return {"damage": float(divergence), "top1_percent": top1}


@jax.jit
def _logits(server, h):
    return server.apply(server.params, server.stats, h, train=False, key=None)[0]


@jax.jit
def _weights_gradient(client, x, g):
    """The gradient of the client's weights, as a vector, from that of its features."""

    def forward(params):
        return client.apply(params, client.stats, x, train=True, key=jax.random.key(0))[0]

    return jax.flatten_util.ravel_pytree(jax.vjp(forward, client.params)[1](g)[0])[0]


def measure(block: str, cut: Cut, kind: str) -> list[dict]:
    """Returns a row a transform and step."""
    maps, rows = getattr(cut, kind), []
    h, random = maps["own"], kind == "gradients"
    scale, energy = float(np.sqrt(np.mean(np.square(h)))), float(np.vdot(h, h))
    for name in (*NAMES, KEPT) if random else NAMES:
        transform = Transform(name, maps["known"])
        c = transform.forward(h)
        for step in STEPS:
            if name == KEPT:
                decoded, count = quantized_kept(h, step * scale, cut.is_kept["own"])
            else:
                decoded, count = quantized(c, step * scale, random=random)
                decoded = transform.inverse(decoded)
            decoded = decoded if random else np.maximum(decoded, 0)
            off = decoded - h
            rows.append(
                {
                    "block": block,
                    "kind": kind,
                    "transform": name,
                    "step": step,
                    "values": h.size,
                    "bits": 8 * (count + transform.side_bytes) / h.size,
                    "error": float(np.vdot(off, off)) / energy,
                    **cut.judge(kind, decoded),
                }
            )
    return rows


def bits_at(rows: list[dict], quantity: str, wanted: float) -> float:
    """Returns the bits at which a quantity that falls with them is as wanted; NaN outside what was measured."""
    points = sorted((np.log(max(row[quantity], 1e-12)), row["bits"]) for row in rows)
    x, y = (np.array(column) for column in zip(*points, strict=True))
    return float(np.interp(np.log(wanted), x, y, left=np.nan, right=np.nan))


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: by how much the bits of each transform differ from plain ones where it is as good."""
    lines = []
    for kind in ("features", "gradients"):
        for block in dict.fromkeys(row["block"] for row in rows):
            own = [row for row in rows if (row["block"], row["kind"]) == (block, kind)]
            by_name = {name: [row for row in own if row["transform"] == name] for name in (*NAMES, KEPT)}
            if not own:
                continue
            for step in STEPS[1:3]:
                plain = next(row for row in by_name["plain"] if row["step"] == step)
                for quantity in ("error", "damage"):
                    cells = [f"{kind}, {block}, equal {quantity} {plain[quantity]:.3g}", f"{plain['bits']:.3f}"]
                    for name in (*NAMES[1:], KEPT):
                        found = bits_at(by_name[name], quantity, plain[quantity]) if by_name[name] else np.nan
                        cells.append("–" if np.isnan(found) else f"{100 * (found / plain['bits'] - 1):+.1f} %")
                    lines.append(cells)
    return timing.table(["where", "plain, bits", *NAMES[1:], KEPT], lines)


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=pathlib.Path, help="the folder of the published ResNet20's safetensors file")
    source.add_argument("--run", help="the folder of a finished run, whose network is measured at its named cuts")
    parser.add_argument("--data-dir", required=True, help="where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--samples", type=int, default=250)
    options: argparse.Namespace = parser.parse_args()
    network, cuts = _network_of(options)
    made = timing.Continued(options.out)
    rows = made.rows
    given = timing.record(options, [], 0)["options"]
    for call in (made.earlier, *made.earlier.get("further", ())):
        for name in ("run", "weights", "samples"):
            before, now = call.get("options", {}).get(name), given[name]
            if None not in (before, now) and before != now:
                parser.error(f"--out must be new where --{name} is another, got {now}: the record there has {before}")
    done = {(row["block"], row["kind"]) for row in rows}
    for block, layer in cuts.items():
        kinds = [kind for kind in ("features", "gradients") if (block, kind) not in done]
        cut = Cut(network, layer, options.samples) if kinds else None
        for kind in kinds:
            rows += measure(block, cut, kind)
            print(f"{kind} behind {block}: {made.seconds:.0f} s", flush=True)
            made.save(options)
    print(table(rows))
    return 0


def _network_of(options):
    """The network that is measured, and the layers behind which it is, by name."""
    if options.run:
        network = feature_maps.load(options.run, data_dir=options.data_dir)
        return network, {name: name for name in network.named_cuts()}
    network = published_weights.network("resnet20", options.weights / "resnet20.safetensors", options.data_dir)
    return network, {cut.block: cut.layer for cut in network.list_cuts() if cut.block in BLOCKS}


if __name__ == "__main__":
    sys.exit(main())
