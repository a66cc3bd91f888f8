"""`msjax export`: the parts of a trained network merged into one file."""

import argparse

from msjax.cli.options import preset_of, split_options
from msjax.pair import load_pair, save_network
from msjax.paths import expand

_DESCRIPTION = """\
Write a trained network, without the cut, as one safetensors file. VGG19 and the ResNets are named as in PyTorch, so
that PyTorch reads them (network.load_state_dict(safetensors.torch.load_file(FILE))), and --model.weights of msjax train
and eval, too; such a file does not say what inputs are normalised by, which is printed. A decoder becomes a folder that
Hugging Face's transformers reads, with the run's tokenizer and with adapters merged into the weights. All others, and
any with --names msjax, keep msjax's names, params/BLOCK/... and stats/BLOCK/..., with config and normalisation in the
header; msjax.load_part(FILE) reads them as one part, and of a model of one's own load_part(FILE,
preset=msjax.config.load_preset("mine.py")). Of a U-shaped run all three parts are merged, also the tail, which
had stayed with the client. What a codec did to the features between the parts is not in the file."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config")
    parser = argparse.ArgumentParser(prog="msjax export", description=_DESCRIPTION)
    parser.add_argument("network", help="the run folder, or CLIENT.safetensors SERVER.safetensors")
    parser.add_argument("server", nargs="?", help="with the file of the client's part: that of the server's")
    out = "the file to write; one that is there is replaced. Of a decoder a folder, new or empty"
    parser.add_argument("--out", required=True, metavar="FILE", help=out)
    parser.add_argument("--names", choices=("pytorch", "msjax"), help="by default pytorch where there are such")
    parser.add_argument("--config", metavar="FILE.py", help="the preset of a model of one's own")
    options = parser.parse_intermixed_args(rest)
    if options.network.endswith(".safetensors") != (options.server is not None):
        parser.error("the network must be a run folder, or CLIENT.safetensors SERVER.safetensors")
    pair = load_pair(options.network, options.server, preset=preset_of(where))
    out = expand("out", options.out)
    try:
        names = save_network(out, pair, names=options.names)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {options.out!r}: {error.strerror}") from None
    cfg, summary = pair.config, pair.summary
    print(f"{cfg.model.name} of step {pair.client.step} in {names}'s names: {out}")
    if names == "pytorch" and (cfg.model.first_block == "paper" or cfg.model.activation != "relu"):
        print(
            f"the network has first_block={cfg.model.first_block!r} and activation={cfg.model.activation!r}, which "
            "names and shapes do not say: PyTorch's usual network computes something else with these weights"
        )
    if names == "pytorch" and summary.mean is not None:
        scale = "pixels / 255" if summary.inputs.leaves[0].dtype == "uint8" else "inputs"
        numbers = (" ".join(f"{value:.6g}" for value in values) for values in (summary.mean, summary.std))
        print("{} are normalised by mean {} and std {}".format(scale, *numbers))
    return 0
