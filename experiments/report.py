"""All studies' results as one page: `experiments/RESULTS.md` with its figures, and a self-contained HTML page.

python -m experiments.report                    # of all records that there are; takes seconds, trains nothing
python -m experiments.report --html report.html
"""

import argparse
import base64
import io
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable

import markdown_it

from experiments import (
    accelerator,
    activations,
    arithmetic_coder,
    asked_bits,
    beside_pytorch,
    beside_pytorch_training,
    biased_gradients,
    both_directions,
    cifar10_lite,
    claims,
    clients,
    compression_error,
    contexts,
    convergence,
    cut_sensitivity,
    decoder_features,
    depth,
    distributions,
    entropy_variants,
    estimated_bytes,
    everything,
    feature_memory,
    fine_tuning,
    frontier,
    frontier_untrained,
    full_width,
    gradient_noise,
    handed_parts,
    kept_gradients,
    language,
    language_schedule,
    language_sizes,
    mask_width,
    not_images,
    published_cuts,
    published_weights,
    rate_distortion,
    study,
    traffic,
    transforms,
    verdicts,
)

STUDIES = (
    compression_error,
    convergence,
    traffic,
    both_directions,
    frontier,
    cifar10_lite,
    everything,
    full_width,
    fine_tuning,
    biased_gradients,
    mask_width,
    cut_sensitivity,
    activations,
    depth,
    distributions,
    clients,
    handed_parts,
    not_images,
    language,
)
WITH_A_RECORD_OF_THEIR_OWN = {
    "Error against real bits, and the rate–distortion limit": rate_distortion,
    "What `EntropyMask` might have been": entropy_variants,
    "Features against those that the receiver remembers": feature_memory,
    "What neighbours save": contexts,
    "What an arithmetic coder would save": arithmetic_coder,
    "What `EntropyMask` makes of the bits it is asked for": asked_bits,
    "Transforms before the quantizer": transforms,
    kept_gradients.TITLE: kept_gradients,
    gradient_noise.TITLE: gradient_noise,
    estimated_bytes.TITLE: estimated_bytes,
    "Plain PyTorch beside msjax": beside_pytorch,
    "A whole training in PyTorch and in msjax": beside_pytorch_training,
    "Published weights": published_weights,
    "Published weights, cut behind the stem and each stage, nothing trained": published_cuts,
    "Rivals in one harness, untrained: accuracy against real bits": frontier_untrained,
    "Language models: which learning rate": language_schedule,
    "Hidden states of a decoder, untrained": decoder_features,
    "Language models of a billion parameters: what they need": language_sizes,
    "On a GPU": accelerator,
}
HEAD = """# Results

Made by `python -m experiments.report` from the records in `experiments/results/`; every record has its config, seeds,
command, versions, hardware and wall time. Accuracies are of the last epoch, on test data, as mean ± standard deviation
over seeds where there are several. "lite" is a narrow ResNet9 on CIFAR-10's original pixels with a short schedule,
unless a section says otherwise: codecs can be compared there with each other, but not with published figures. There
one setting's accuracies differ between seeds by 0.1 to 0.6 points (standard deviation): where there is one seed,
differences below about a point mean nothing. "paper" is the published setting. Earlier runs, on a lossy copy of the
images, are at the end.
"""
LOSSY_HEAD = """# On a lossy copy of CIFAR-10

The same studies at lite scale, run earlier on images of CIFAR-10 that had been stored as JPEG. Their accuracies are
lower than on the original pixels (by how much is not measured at equal settings) and are not to be compared with those
above; codecs can be compared with each other.
"""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem}img{max-width:100%}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=study.RESULTS, help="where the records are")
    parser.add_argument("--out", type=pathlib.Path, help="the page; of other records by default RESULTS.md among them")
    parser.add_argument("--html", type=pathlib.Path, help="where the HTML page goes; none by default")
    options = parser.parse_args()
    own = options.results.resolve() != study.RESULTS.resolve()
    out = options.out or (options.results if own else study.ROOT) / "RESULTS.md"
    text, figures = page(options.results)
    beside = os.path.relpath(options.results, out.parent)
    folder = (options.results if options.out is None else out.parent) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    # Those of studies with a record of their own lie beside it.
    drawn = {name: png for name, png in figures.items() if not (options.results / name).exists()}
    for name, png in drawn.items():
        (folder / name).write_bytes(png)
    drawn_in = os.path.relpath(folder, out.parent)
    out.write_text(_with_images(text, lambda name: f"{drawn_in if name in drawn else beside}/{name}"))
    print(f"{out}: {len(figures)} figures")
    if options.html:
        options.html.write_text(html(text, figures))
    return 0


def page(results: pathlib.Path, scales: Iterable[str] = ("lite", "paper")) -> tuple[str, dict[str, bytes]]:
    """Returns the whole page as Markdown, and its figures as PNG by the name that it calls them."""
    parts, figures = [HEAD, claims.page(verdicts.Results(results))], {}
    for module in STUDIES:
        parts.append(f"## {module.TITLE}\n\n{explanation(module)}\n")
        for scale in scales:
            wanted, found = module.runs(scale), study.records(module, scale, results)
            if not wanted:
                continue
            missing = [name for name in wanted if name not in found]
            parts.append(f"**{scale}**: {len(found)} of {len(wanted)} runs.{_not_run(missing)}\n")
            if not found:
                continue
            parts.append(_section(module, scale, found, scale, figures))
    for title, module in WITH_A_RECORD_OF_THEIR_OWN.items():
        file = results / f"{module.__name__.rpartition('.')[2]}.json"
        if file.exists():
            found = json.loads(file.read_text())
            calls = (found, *found.get("further", ()))
            made = ", and ".join(f"`{call['command']}`, {_minutes_on(call)}" for call in calls) + "."
            if again := found.get("bits"):
                made += f" Bits were measured anew: `{again['command']}`."
            parts.append(f"## {title}\n\n{explanation(module)}\n\n{made}\n\n{module.table(found['rows'])}\n")
            if (picture := file.with_suffix(".png")).exists():
                figures[picture.name] = picture.read_bytes()
                parts.append(f"![{title}]({picture.name})\n")
        else:
            parts.append(f"## {title}\n\n{explanation(module)}\n\nThere is no record: not run.\n")
    lossy = [(module, study.records(module, "lite", results, study.LOSSY)) for module in STUDIES]
    if any(found for _, found in lossy):
        parts.append(LOSSY_HEAD)
    for module, found in lossy:
        if found:
            parts.append(f"## {module.TITLE}, on the lossy copy\n")
            parts.append(f"{len(found)} of {len(module.runs('lite'))} runs.\n")
            parts.append(_section(module, "lite", found, study.LOSSY, figures))
    return "\n".join(parts).rstrip() + "\n", figures


def _minutes_on(call):
    return f"{call['wall_seconds'] / 60:.0f} minutes on {call['environment']['cpu']}"


def _section(module, scale, found, folder, figures):
    """What a study has to say of these records; its figures, named after the folder of the records, go to `figures`."""
    text, drawn = module.report(scale, found)
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        figures[f"{folder}_{name}.png"] = buffer.getvalue()
    return _with_images(text, lambda name: f"{folder}_{name}")


def explanation(module) -> str:
    """A study's docstring without its commands."""
    paragraphs = module.__doc__.strip().split("\n\n")
    return "\n\n".join(p for p in paragraphs if not p.strip().startswith("python -m"))


def html(text: str, figures: dict[str, bytes]) -> str:
    """Returns the page with its figures inside."""
    inside = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in figures.items()}
    markdown = markdown_it.MarkdownIt("commonmark").enable("table")
    markdown.validateLink = lambda url: True  # of images as data
    body = markdown.render(_with_images(text, lambda name: inside[name]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>msjax: results</title><style>{STYLE}</style>'
        f"<body>{body}</body></html>\n"
    )


def _not_run(missing):
    if not missing:
        return ""
    some = "; ".join(missing[:6])
    return f" Not run: {some}{f' and {len(missing) - 6} more' if len(missing) > 6 else ''}."


def _with_images(text, place):
    return re.sub(r"(!\[[^]]*\])\(([^)]*)\)", lambda found: f"{found[1]}({place(found[2])})", text)


if __name__ == "__main__":
    sys.exit(main())
