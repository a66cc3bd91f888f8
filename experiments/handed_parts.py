"""What half precision costs where a client hands its part on to the next, in sequential mode.

    python -m experiments.handed_parts --data-dir DIR       # a TFDS directory with adult; a minute a run

A part travels with the state of its optimizer, twice in a turn: to the server, and on to the next client. Turns are
short here, of five steps, so that parts are handed on often. Nothing else is compressed. A convolutional network on the
embedded digits, and an MLP on a table (Adult). "Of everything" is the share of all training bytes that parts take.
"""

import dataclasses
import statistics
import sys

from benchmarks import timing
from experiments import driver, not_images, study
from msjax import compress, config
from msjax.split.sent import total_bytes

TITLE = "Parts handed on in half precision"
ARMS = {
    "float32": compress.Identity(),
    "bfloat16": compress.Cast("bfloat16"),
    "float16": compress.Cast("float16"),
}
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
    return study.with_seeds(arms, study.seeds(scale, lite=3))


def report(scale, records):
    groups, rows = study.by_arm(records), []
    for setting in settings(scale):
        plain = groups.get(study.label(setting, "float32"), [])
        for name in ARMS:
            found = groups.get(study.label(setting, name), [])
            if not found:
                continue
            share = statistics.mean(100 * parts_bytes(one["traffic"]) / total_bytes(one["traffic"]) for one in found)
            below = study.mean_and_deviation(study.lost(plain, found))
            cells = [setting, name, str(len(found)), study.top1(found), below]
            rows.append([*cells, f"{parts_bytes(found[0]['traffic']) / 1e6:,.1f}", f"{share:.0f} %"])
    header = ["network", "parts as", "seeds", "test top-1, %", "below float32", "parts, MB", "of everything"]
    return study.Page(timing.table(header, rows) + "\n", {})


def parts_bytes(traffic):
    """The bytes of the parts that are handed on, up and down."""
    return traffic["uplink_synchronization_bytes"] + traffic["downlink_synchronization_bytes"]


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))
