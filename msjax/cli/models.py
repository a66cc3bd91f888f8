"""`msjax models`: each cut of a model, its feature map, and bytes a sample with each codec."""

import argparse

import jax
import rich.table

from msjax import compress, data, models
from msjax.runs import tables


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="msjax models",
        description="Print each cut of a model: its feature map, and bytes a sample with each codec.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        choices=(*models.NAMES, models.DECODER),
        help="default: all but decoder, which needs --decoder",
    )
    parser.add_argument(
        "--decoder", metavar="PATH", help="decoder: its config.json, or a folder of Hugging Face's that has one"
    )
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
    if (options.name == models.DECODER) != (options.decoder is not None):
        raise ValueError(f"--decoder must be given for decoder, and for no other, got {options.decoder!r}")
    if options.name == models.DECODER:
        for name in ("num_classes", "width", "first_block", "shortcut"):
            if (value := getattr(options, name)) != parser.get_default(name):
                raise ValueError(f"{name} must not be given for decoder, whose file says what it is, got {value!r}")
    codecs = [compress.from_string(c) for c in options.codec] if options.codec else [c() for c in compress.CODECS]
    usual = {"convnet": ((8, 8, 1), 10), "resnet34": ((224, 224, 3), 1000), "resnet18": ((32, 32, 3), 100)}
    usual |= {"mlp": ((108,), 2), "transformer": ((data.TEXT_LENGTH,), 2)}  # Adult, and texts of two classes
    console = tables.console()
    for name in [options.name] if options.name else models.NAMES:
        shape, classes = usual.get(name, ((32, 32, 3), 10))
        shape = tuple(options.input_shape or shape)
        classes = classes if options.num_classes is None else options.num_classes
        resnet = {"first_block": options.first_block, "shortcut": options.shortcut}
        resnet = resnet if options.name or name in models.RESNETS else {}
        if name == models.DECODER:
            model, of = _decoder(options)
        else:
            model = models.build(name, input_shape=shape, num_classes=classes, width=options.width, **resnet)
            of = f"{'×'.join(map(str, shape))}, {classes} classes"
        title = f"{name}, {of}, {models.count_params(model) / 1e6:.2f} M parameters; bytes a sample"
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


def _decoder(options):
    """The model of --decoder, and what it is."""
    described = models.DecoderConfig.load(options.decoder)
    length = min(data.TEXT_LENGTH, described.max_position_embeddings)
    if options.input_shape:
        if len(options.input_shape) != 1:
            raise ValueError(f"--input-shape must be one number of tokens for decoder, got {options.input_shape}")
        (length,) = options.input_shape
    return models.decoder(described, length=length), f"{length} tokens of {described.vocab_size}"


def _size(codec, batch):
    """Bytes a sample."""
    return f"{codec.payload_bytes(batch) / batch.shape[0]:,.0f}" + "*" * codec.entropy_coded
