"""What half precision costs where a client hands its part on to the next, in sequential mode.

    python -m experiments.handed_parts --data-dir DIR       # a TFDS directory with adult; a minute a run

A part travels with the state of its optimizer, twice in a turn: to the server, and on to the next client. Turns are
short here, of five steps, so that parts are handed on often. Nothing else is compressed. A convolutional network on the
embedded digits, and an MLP on a table (Adult). "Of everything" is the share of all training bytes that parts take.
"Coded" are the bits a value that the trained part takes, with the optimizer's state, where the sender codes its
messages without further loss (`compression="all"`); of one seed.
"""

import dataclasses
import statistics
import sys

import jax.numpy as jnp

from benchmarks import timing
from experiments import driver, not_images, study
from msjax import compress, config, wire
from msjax.runs import RunFolder
from msjax.split.sent import total_bytes
from msjax.split.trees import to_vector
from msjax.training.from_config import load_run
from msjax.training.loaded import placed
from msjax.training.saved import restore

TITLE = "Parts handed on in half precision"
ARMS = {
    "float32": compress.Identity(),
    "bfloat16": compress.Cast("bfloat16"),
    "float16": compress.Cast("float16"),
}
CODED = ", coded"
TURNS = config.ModeConfig(kind="sequential", turn_steps=5)


def settings(scale):
    digits = config.Config(model=config.ModelConfig("convnet"), clients=10, batch_size=16, epochs=5)
    if scale == "smoke":
        return {"convnet, digits": dataclasses.replace(study.base(scale), clients=4)}
    return {"convnet, digits": digits, "MLP, Adult": not_images.settings(scale)["MLP, Adult"].base}


def runs(scale):
    if scale == "paper":
        return {}
    arms = {
        study.label(setting, name): dataclasses.replace(
            study.with_cut(base, "medium"), codec=compress.Identity(), update_codec=codec, mode=TURNS
        )
        for setting, base in settings(scale).items()
        for name, codec in ARMS.items()
    }
    trained = study.with_seeds(arms, study.seeds(scale, lite=3))
    measured = {f"{arm}{CODED}": study.Measured(trained[f"{arm}, seed 0"], f"{__spec__.name}:measure") for arm in arms}
    return trained | measured


def measure(folder, cfg, scale):
    """Bits a value of the part that was handed on last, as payload and coded."""
    run = load_run(cfg)
    state, mesh = placed(run)
    state, *_ = restore(RunFolder.open(folder, read_only=True)[0], run, state, mesh)
    vector = jnp.asarray(to_vector(state.client.without(run.spec.client_constants)))
    payload = cfg.update_codec.encode(vector)
    message = wire.encode(payload, cfg.update_codec, vector, compression="all")
    bits = {"payload_bits": cfg.update_codec.payload_bytes(vector), "coded_bits": len(message)}
    return [{"values": vector.size} | {name: 8 * value / vector.size for name, value in bits.items()}]


def report(scale, records):
    groups = study.by_arm({name: record for name, record in records.items() if not name.endswith(CODED)})
    rows = []
    for setting in settings(scale):
        plain = groups.get(study.label(setting, "float32"), [])
        for name in ARMS:
            found = groups.get(study.label(setting, name), [])
            if not found:
                continue
            share = statistics.mean(100 * parts_bytes(one["traffic"]) / total_bytes(one["traffic"]) for one in found)
            below = study.mean_and_deviation(study.lost(plain, found))
            cells = [setting, name, str(len(found)), study.top1(found), below]
            measured = records.get(f"{study.label(setting, name)}{CODED}")
            coded = f"{measured['rows'][0]['coded_bits']:.1f}" if measured else "–"
            rows.append([*cells, f"{parts_bytes(found[0]['traffic']) / 1e6:,.1f}", f"{share:.0f} %", coded])
    header = ["network", "parts as", "seeds", "test top-1, %", "below float32", "parts, MB", "of everything", "coded"]
    return study.Page(timing.table(header, rows) + "\n", {})


def parts_bytes(traffic):
    """The bytes of the parts that are handed on, up and down."""
    return traffic["uplink_synchronization_bytes"] + traffic["downlink_synchronization_bytes"]


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))
