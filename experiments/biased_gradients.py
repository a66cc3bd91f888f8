"""What compressed features do to the gradients (the paper's Theorem 1, Lemma 2 and Theorem 3).

    python -m experiments.biased_gradients --data-dir DIR

At each cut of a network trained without compression, and of the same before training: the gradients of one batch with
its features as they are, and through a codec. Of random codecs several draws. All are relative to the exact gradient's
norm: the error is the root of the mean squared distance; the bias is the distance of the draws' mean, less what their
variance leaves in a mean of so few. An unbiased codec (its name has a star) has unbiased features, and Theorem 1 says
that its gradients are biased all the same. H and J are the smallest factors with which Lemma 2's bounds hold for these
draws, ‖ĝs − gs‖/‖ε‖ and ‖ĝc − gc‖/(H·‖ε‖), where ε is the features' error: from below, estimates of the constants that
would hold for any. Theorem 3 has training end the worse the larger that error is: networks trained with some of the
codecs (runs of `convergence` and `mask_width`) show whether it does.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import driver, feature_maps, study
from msjax import compress, tasks

TITLE = "Biased gradients (Theorem 1, Lemma 2, Theorem 3)"
DRAWS, SAMPLES = 16, 250
STATES = ("untrained", "trained")
CODECS = {
    **{f"MS, {bits} bits": compress.MaskEncoded(bits=bits) for bits in (1, 2, 3, 4)},
    **{f"QU, {bits} bits": compress.Uniform(bits=bits) for bits in (2, 3, 4, 6)},
    **{f"SP, {ratio:.1%}": compress.TopK(ratio=ratio) for ratio in (0.95875, 0.9, 0.8)},
    "RT, 95.9%": compress.RandTopK(ratio=0.95875),
    **{f"random-k*, {ratio:.0%}": compress.RandK(ratio=ratio) for ratio in (0.9, 0.5)},
    **{f"stochastic QU*, {bits} bits": compress.StochasticUniform(bits=bits) for bits in (2, 3, 4)},
    **{f"EntropyMask, error {e}": compress.EntropyMask(error=e, levels=31) for e in (0.07, 0.01)},
    **{
        f"EntropyMask*, error {e}": compress.EntropyMask(error=e, levels=31, rounding="stochastic")
        for e in (0.07, 0.01)
    },
}
TRAINED_WITH = (*(f"MS, {bits} bits" for bits in (1, 2, 3, 4)), "QU, 3 bits", "SP, 95.9%", "RT, 95.9%")


def runs(scale):
    base = study.with_cut(study.base(scale), "medium")
    arms = {f"training, {name}": dataclasses.replace(base, codec=CODECS[name]) for name in TRAINED_WITH}
    few = dict(list(arms.items())[: 1 if scale == "smoke" else None])
    return study.measured(scale, f"{__spec__.name}:measure") | study.with_seeds(few, study.seeds(scale))


def measure(folder, cfg, scale):
    codecs = dict(list(CODECS.items())[:: 6 if scale == "smoke" else 1])
    rows = []
    for state in STATES:
        network = feature_maps.load(str(folder), trained=state == "trained", **study.places(cfg))
        x, labels = network.batch(SAMPLES)
        for cut in study.cuts(scale):
            client, server = network.cuts(cut)
            exact = Exact(client, server, x, labels, network.cfg.optim.label_smoothing)
            rows += [{"state": state, "cut": cut, "codec": n, **exact.compare(codec)} for n, codec in codecs.items()]
    return rows


class Exact:
    """A batch's features and gradients, as they are."""

    def __init__(self, client, server, x, labels, label_smoothing):
        def features(params):
            return client.apply(params, client.stats, x, train=True, key=jax.random.key(0))[0]

        def loss(params, h):
            logits, _ = server.apply(params, server.stats, h, train=True, key=jax.random.key(1))
            return tasks.cross_entropy(logits, labels, label_smoothing).mean()

        @jax.jit
        def gradients(back, h):
            of_server, g = jax.grad(loss, argnums=(0, 1))(server.params, h)
            return [_flat(of_server), _flat(back(g)[0])]

        # `back` holds the activations: an argument, since XLA folds what it takes for constants.
        self.h, back = jax.jit(lambda params: jax.vjp(features, params))(client.params)
        self.gradients = functools.partial(gradients, back)
        self.of_parties = self.gradients(self.h)

    def compare(self, codec):
        """Errors and biases of the features' and of both parties' gradients, relative; and Lemma 2's factors."""
        draws = DRAWS if codec.needs_key else 1
        means, squares, distances = [0.0] * 3, np.zeros(3), []
        exact = [self.h.reshape(-1), *self.of_parties]
        for draw in range(draws):
            h = _roundtrip(self.h, jax.random.key(100 + draw), codec=codec)
            off = [a - b for a, b in zip([h.reshape(-1), *self.gradients(h)], exact, strict=True)]
            means = [mean + o / draws for mean, o in zip(means, off, strict=True)]
            distance = np.array([float(jnp.linalg.norm(o)) for o in off])
            squares += distance**2 / draws
            distances.append(distance)
        norms = np.array([float(jnp.linalg.norm(e)) for e in exact])
        # The squared norm of a mean of n draws has a part of their variance in it, which is (mean square − bias²)/n.
        of_mean = np.array([float(jnp.linalg.norm(mean)) for mean in means]) ** 2
        bias = np.sqrt(np.maximum(of_mean - (squares - of_mean) / max(draws - 1, 1), 0)) if draws > 1 else of_mean**0.5
        lipschitz = max(d[1] / d[0] for d in distances) if norms[0] else 0.0
        jacobian = max(d[2] / (lipschitz * d[0]) for d in distances) if lipschitz else 0.0
        names = ("features", "server", "client")
        found = {f"{n}_error": float(e) for n, e in zip(names, np.sqrt(squares) / norms, strict=True)}
        found |= {f"{n}_bias": float(b) for n, b in zip(names, bias / norms, strict=True)}
        return found | {"h": float(lipschitz), "j": float(jacobian), "draws": draws}


@functools.partial(jax.jit, static_argnames="codec")
def _roundtrip(h, key, *, codec):
    return codec.roundtrip(h, key)


def _flat(tree):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def report(scale, records):
    rows = study.measurements(records)
    if not rows:
        return study.Page("", {})  # trained networks alone say nothing of gradients
    parts = []
    names = ("features_error", "features_bias", "server_error", "server_bias", "client_error", "client_bias")
    header = ["codec", "‖ε‖/‖h‖", "its bias", "server's gradient: error", "bias", "client's: error", "bias", "H", "J"]
    for state in STATES:
        lines = []
        for codec in CODECS:
            own = [r for r in rows if (r["state"], r["cut"], r["codec"]) == (state, "medium", codec)]
            if own:
                means = [f"{np.mean([row[name] for row in own]):.3f}" for name in names]
                factors = [f"{np.mean([row[name] for row in own]):.3g}" for name in ("h", "j")]
                lines.append([codec, *means, *factors])
        parts += [f"Medium cut, {state}:", "", timing.table(header, lines), ""]
    lines = []
    for state in STATES:
        for cut in study.CUTS:
            own = [r for r in rows if (r["state"], r["cut"]) == (state, cut) and r["features_error"] > 0]
            if own:
                e, s, c = (np.log([r[f"{n}_error"] for r in own]) for n in ("features", "server", "client"))
                cells = [f"{np.corrcoef(e, s)[0, 1]:.2f}", f"{np.polyfit(e, s, 1)[0]:.2f}"]
                cells += [f"{np.corrcoef(e, c)[0, 1]:.2f}", f"{np.polyfit(e, c, 1)[0]:.2f}"]
                lines.append([state, cut, *cells])
    header = ["network", "cut", "server: correlation", "slope", "client: correlation", "slope"]
    parts += [
        "The logarithms of the gradients' errors against that of the features', over all codecs. Lemma 2 bounds the",
        "former by a multiple of the latter:",
        "",
        timing.table(header, lines),
        "",
        "Training with the codec, medium cut, against the features' error in the trained network:",
        "",
        _trend(rows, study.by_arm(study.trained(records))),
        "",
        "![Gradient error against compression error](biased_gradients.png)",
        "",
    ]
    return study.Page("\n".join(parts), {"biased_gradients": plot(rows)})


def _trend(rows, trained):
    """Theorem 3's: by rising error, how training ended."""
    lines = []
    for codec in TRAINED_WITH:
        at = [r for r in rows if (r["state"], r["cut"], r["codec"]) == ("trained", "medium", codec)]
        if at and (own := trained.get(f"training, {codec}")):
            losses = [record["train"]["loss"] for record in own]
            lines.append((np.mean([r["features_error"] for r in at]), codec, losses, own))
    cells = [
        [codec, f"{error:.3f}", study.mean_and_deviation(losses, digits=3), study.top1(own), str(len(own))]
        for error, codec, losses, own in sorted(lines, key=lambda line: line[0])
    ]
    return timing.table(["codec", "‖ε‖/‖h‖", "last epoch's training loss", "test top-1, %", "seeds"], cells)


def _kind(codec):
    """What is before the comma of a name in `CODECS`."""
    return codec.partition(",")[0]


def plot(rows):
    figure = matplotlib.figure.Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, len(study.CUTS), sharex=True, sharey="row")
    kinds = list(dict.fromkeys(map(_kind, CODECS)))
    for column, cut in enumerate(study.CUTS):
        for line, party in enumerate(("server", "client")):
            axes = panels[line, column]
            for color, kind in enumerate(kinds):
                for state, marker in zip(STATES, "xo", strict=True):
                    own = [r for r in rows if (r["state"], r["cut"]) == (state, cut) and _kind(r["codec"]) == kind]
                    points = [(row["features_error"], row[f"{party}_error"]) for row in own]
                    if points:
                        name = kind if state == "trained" else None  # one entry a kind in the legend
                        axes.loglog(*zip(*points, strict=True), marker, color=f"C{color}", label=name)
            axes.set(title=f"{party}, {cut} cut")
        panels[1, column].set(xlabel="‖ε‖/‖h‖")
    panels[0, 0].set(ylabel="relative error of the gradient (o trained, x not)")
    study.legend(figure.axes, fontsize="x-small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))
