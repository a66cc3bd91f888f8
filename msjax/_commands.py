"""What the commands do; apart from `cli`, so that `msjax --help` needs no JAX."""

import argparse
import dataclasses
import json
import sys

import jax
import rich.console
import rich.table
import tyro

from msjax import compress, config, data, display, models, runs, simulate, train


def run(command: str, arguments: list[str]) -> int:
    """Runs one command and returns its exit status; an expected error becomes one line."""
    try:
        return {"train": _train, "eval": _eval, "models": _models, "serve": _serve, "client": _client}[command](
            arguments
        )
    except KeyboardInterrupt:  # before or after the training loop, where there is nothing to save
        return 130
    except SystemExit as error:  # the argument parsers have printed what is wrong
        return error.code
    except (ValueError, TypeError, OSError, data.DataError) as error:
        print(f"msjax {command}: {error}", file=sys.stderr)
        return 2


DEFAULT = config.Config(
    optim=config.OptimConfig(learning_rate=0.1, warmup_epochs=1.0),
    batch_size=16,
    epochs=20,
    compare=True,
)
"""The run without a preset: scikit-learn's digits, for which 16 samples a client make 9 steps an epoch."""


def _train(arguments):
    # The two flags that say where the config comes from; tyro handles what is in it.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--resume")
    first.add_argument("--name")
    where, rest = first.parse_known_args(arguments)
    if where.resume:
        if rest or where.config or where.name:
            raise ValueError(f"--resume takes the run's own config, got also {' '.join(rest) or '--config or --name'}")
        folder, cfg = runs.RunFolder.open(where.resume)
        simulate.split_cpu(cfg.clients)
        job = None
    else:
        default = config.load_preset(where.config) if where.config else DEFAULT
        description = (
            "Train a split network. Also: --config FILE.py (a preset), --resume RUN, --name NAME (of the run)."
        )
        cfg = tyro.cli(config.Config, args=rest, default=default, prog="msjax train", description=description)
        simulate.split_cpu(cfg.clients)
        # Before there is a folder, so that a config that does not work leaves none behind.
        job = train.prepare(cfg)
        folder = runs.RunFolder.create(cfg, where.name)
    summaries = []
    try:
        if cfg.compare:
            base = dataclasses.replace(train.uncompressed(cfg), out=str(folder.path))
            summaries.append(_finish(*runs.RunFolder.open_or_create(base, "uncompressed")))
        summaries.append(_finish(folder, cfg, job))
    except train.Interrupted:
        print(f"interrupted and saved; continue with: msjax train --resume {folder.path}")
        return 130
    display.print_summaries(summaries)
    return 0


def _finish(folder, cfg, job=None):
    """The summary of a run: read where it is there, else trained for."""
    try:
        summary = folder.path / "summary.json"
        return json.loads(summary.read_text()) if summary.exists() else train.train(cfg, folder, job=job)
    finally:
        folder.close()


def _eval(arguments):
    if any(a.partition("=")[0] == "--server" for a in arguments):
        return _network().evaluate(arguments)
    parser = argparse.ArgumentParser(
        prog="msjax eval", description="Test a trained run on its test set, or with --server a client's half."
    )
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--uncompressed", action="store_true", help="send test features as they are")
    parser.add_argument("--data-dir", help="where the data set is on this machine")
    options = parser.parse_args(arguments)
    if options.run.endswith(".safetensors"):
        raise ValueError(f"the run must be a folder; a half is tested with --server, got {options.run!r} without it")
    folder, cfg = runs.RunFolder.open(options.run, read_only=True)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=None))  # the checkpoint has newer ones
    if options.data_dir:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, data_dir=options.data_dir))
    if options.uncompressed:
        cfg = dataclasses.replace(cfg, eval_compressed=False)
    simulate.split_cpu(cfg.clients)
    job = train.prepare(cfg)
    found = folder.restore((job.state, simulate.zero_sums(job.mesh)))
    folder.close()
    if found is None:
        raise ValueError(f"the run must have a checkpoint, got {options.run!r} without one")
    (state, _), _ = found
    result = train.Evaluator(cfg, job)(state)
    how = cfg.codec.at_inference() if cfg.eval_compressed else "no compression"
    print(runs.to_json({"run": str(folder.path), "step": int(state.step), "features": str(how), **result}, indent=2))
    return 0


def _serve(arguments):
    return _network().serve(arguments, DEFAULT)


def _client(arguments):
    return _network().client(arguments)


def _network():
    try:
        from msjax import _network
    except ImportError as error:
        raise ValueError(f"serve, client and eval --server need the extra msjax[net]: {error}") from None
    return _network


def _models(arguments):
    parser = argparse.ArgumentParser(
        prog="msjax models",
        description="Print each cut of a model: its feature map, and bytes a sample with each codec.",
    )
    parser.add_argument("name", nargs="?", choices=models.NAMES, help="default: all")
    parser.add_argument("--input-shape", type=int, nargs="+", metavar="N", help="H W C; of a text or table its length")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--first-block", choices=("residual", "paper"), default="residual")
    parser.add_argument("--shortcut", choices=("projection", "zero_padding"), default="projection")
    parser.add_argument("--batch-size", type=int, default=256, help="samples that are compressed together")
    parser.add_argument("--codec", action="append", help="default: each, at the paper's settings")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    codecs = [compress.from_string(c) for c in options.codec] if options.codec else [c() for c in compress.CODECS]
    usual = {"convnet": ((8, 8, 1), 10), "resnet34": ((224, 224, 3), 1000), "resnet18": ((32, 32, 3), 100)}
    usual |= {"mlp": ((108,), 2), "transformer": ((data.TEXT_LENGTH,), 2)}  # Adult, and texts of two classes
    console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
    for name in [options.name] if options.name else models.NAMES:
        shape, classes = usual.get(name, ((32, 32, 3), 10))
        shape = tuple(options.input_shape or shape)
        classes = classes if options.num_classes is None else options.num_classes
        resnet = {"first_block": options.first_block, "shortcut": options.shortcut}
        resnet = resnet if options.name or name in models.RESNETS else {}
        model = models.build(name, input_shape=shape, num_classes=classes, width=options.width, **resnet)
        count = models.count_params(model) / 1e6
        title = f"{name}, {'×'.join(map(str, shape))}, {classes} classes, {count:.2f} M parameters; bytes a sample"
        table = rich.table.Table(title=title)
        for heading in ("cut", "name", "after block", "feature map"):
            table.add_column(heading)
        for codec in codecs:
            table.add_column(str(codec) if options.codec else type(codec).__name__, justify="right")
        for cut in models.list_cuts(model):
            batch = jax.ShapeDtypeStruct((options.batch_size, *cut.shape), cut.dtype)
            sizes = [_size(codec, batch) for codec in codecs]
            table.add_row(str(cut.layer), cut.name or "", cut.block, "×".join(map(str, cut.shape)), *sizes)
        console.print(table)
    if any(codec.entropy_coded for codec in codecs):
        console.print("*: before lossless coding, to a few times less; how far depends on the values.")
    return 0


def _size(codec, batch):
    """Bytes a sample."""
    return f"{codec.payload_bytes(batch) / batch.shape[0]:,.0f}" + "*" * codec.entropy_coded
