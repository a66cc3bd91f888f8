"""Features against those that the receiver remembers: does sending their change pay?

    python -m experiments.feature_memory --data-dir DIR      # about an hour on two cores

`compress.FeatureMemory` (AQ-SGD, arXiv 2206.01299; SplitCom, 2602.10564) beside its base codec alone, at several rates.
Two clients of 125, samples in a new order every epoch, no augmentation, gradients uncompressed. Alone, a codec for
features behind a ReLU is unsigned; in a memory it has to be signed. The step is that of `msjax.split.step`; features
are encoded before it, and the server gets what is decoded. The gradient goes on only of samples that were sent, but for
arms "with all gradients". Bits are those of every message of `msjax.wire` up, Huffman-coded, by the number of values; a
memory's have the bit a sample on top. "Change" is what a sample's features differ by from what the memory has, squared
and relative; "error" what they differ by from what the server got. Accuracy is of the last epoch, with test features as
they are, and through the codec of the first epoch, as they have no memory. A run ends where its loss is not finite.

Settings: a small network on a table, from scratch; a transformer on 10,000 texts, from scratch with its dropout, and
from weights of two epochs on 20,000 other texts, with a tenth of the learning rate and without dropout at the clients.

What the record says. On the table (three seeds) `EntropyMask` with a memory needs 21 to 47 % fewer bits than alone for
the same training loss, and with test features as they are it is no less accurate. But where test features come with as
few bits and no memory, a server trained with one is worse, by up to 3.6 points. Fine-tuning the transformer (one seed;
a standard error of the accuracy is 1.4 points), features change by only 1 % from the first epoch to the second, and
their error falls as it should, but training gains little: for its loss a memory needs 23 % more bits at one bit a
value, about as many at half a bit, 7 % more or fewer with the thresholds. It needs half as many behind a finer first
epoch and a third at 0.25 bits; these two are 8.5 and 6.3 points less accurate than no compression with test features as
they are, 2.4 and 4.8 through the codec. From scratch with
dropout, features change by 60 %; no memory was run there. Whether gradients go on of all samples or only of those that
were sent makes no difference beyond the noise at these rates.
"""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from experiments.feature_memory_page import TESTS, plot, table
from experiments.feature_memory_training import (
    BATCH,
    CLIENTS,
    Arm,
    Run,
    Setting,
    arm_of,
    empty_memory,
    load,
    named,
    test,
    train_epoch,
)
from msjax.compress import EntropyMask, Identity, MaskEncoded
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig

OUT = pathlib.Path(__file__).parent / "results" / "feature_memory"


def settings(options: Any) -> dict[str, Setting]:
    """Returns each setting by name, with the data where the options say."""
    table = Config(
        ModelConfig("mlp"),
        DataConfig("adult", data_dir=options.data_dir),
        OptimConfig(learning_rate=0.05),
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=6,
    )
    text = Config(
        ModelConfig("transformer", width=0.25, activation="gelu"),
        DataConfig("glue/sst2", data_dir=options.data_dir, text_length=40),
        OptimConfig("adamw", learning_rate=1e-3, weight_decay=0.01, warmup_epochs=0.2),
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=4,
    )
    return {
        "MLP, Adult": Setting(table, 32_500, 16_250, 250, 3, signed=False),
        "transformer, SST-2": Setting(text, 10_000, 872, 218, 1, signed=True),
        "transformer, SST-2, fine-tuned": Setting(text, 10_000, 872, 218, 1, signed=True, frozen=True, earlier=20_000),
    }


def arms(*, signed: bool) -> list[Arm]:
    """Returns what is compared; the first one compresses nothing and measures how features change."""

    def entropy_mask(bits, signed=True):
        return EntropyMask(bits=bits, signed=signed)

    found = [Arm(Identity(), True), *(Arm(entropy_mask(bits, signed)) for bits in (0.25, 0.5, 1.0, 2.0))]
    found += [Arm(entropy_mask(bits), True) for bits in (0.25, 0.5, 1.0)]
    found += [Arm(EntropyMask(error=0.25, signed=True), True, threshold=threshold) for threshold in (0.1, 0.3)]
    later = Arm(entropy_mask(0.25), True, entropy_mask(1.0))
    found += [later, later._replace(all_gradients=True)]
    return [*found, Arm(MaskEncoded(bits=1, signed=signed)), Arm(MaskEncoded(bits=1, signed=True), True)]


def measure(setting: Setting, start_from: Run, arm: Arm, seed: int) -> dict[str, Any]:
    """Trains with one arm; returns what each epoch measured, and the test of the last."""
    begin = time.monotonic()
    run = start_from._replace(state=jax.tree.map(jnp.array, start_from.state))  # its own, as steps give theirs away
    memory, history = empty_memory(run, arm), []
    for epoch in range(setting.config.epochs):
        options = {"frozen": setting.frozen, "all_gradients": arm.all_gradients}
        run, memory, found = train_epoch(run, arm.coder(epoch), memory, epoch, seed, **options)
        if found is None:
            break
        history.append(found)
    row = {
        **named(arm),
        "seed": seed,
        "history": history,
        "diverged": len(history) < setting.config.epochs,
    }
    if not row["diverged"]:
        row |= {n: test(run, c, setting.test_batch, seed) for n, c in zip(TESTS, (Identity(), arm.whole), strict=True)}
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", required=True, help="a TFDS data directory with adult and glue/sst2")
    parser.add_argument("--settings", nargs="+", help="beginnings of names of some settings; by default all")
    options = parser.parse_args()
    made = timing.Continued(options.out)
    rows = made.rows
    done = {_id(row) for row in rows}
    wanted = {n: s for n, s in settings(options).items() if n.startswith(tuple(options.settings or [""]))}
    for seed in range(max(setting.seeds for setting in wanted.values())):
        for name, setting in wanted.items():
            todo = [arm for arm in arms(signed=setting.signed) if (name, *named(arm).values(), seed) not in done]
            run = load(setting, seed) if todo and seed < setting.seeds else None
            for arm in todo if run else []:
                rows.append({"setting": name} | measure(setting, run, arm, seed))
                print(_line(rows[-1]), flush=True)
                made.save(options)
    print(table(rows))
    made.draw(plot(rows))
    return 0


def _id(row):
    return tuple(row[name] for name in ("setting", "codec", "remembers", "first", "threshold", "all_gradients", "seed"))


def _line(row):
    bits, errors, changes = (
        "/".join(f"{epoch[name]:.3f}" for epoch in row["history"]) for name in ("bits", "error", "change")
    )
    tested = " ".join(f"{row[name]['top1_percent']:.2f}" for name in TESTS if name in row) or "diverged"
    what = f"{row['setting']}, seed {row['seed']}: {arm_of(row)}: bits {bits} error {errors} change {changes}"
    return f"{what} loss {row['history'][-1]['train_loss']:.4f} top-1 {tested}"


if __name__ == "__main__":
    sys.exit(main())
