"""A finished (or unfinished) search as one HTML file with its pictures, and the pictures as PNGs.
Not here: the folders that it reads (runs.py), the table on the screen (console.py)."""

from __future__ import annotations

import base64
import html
import io
import os
import platform
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.errors import InputError
from darts_lora.base.files import check_writable, remove, write_into, write_text
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.run.runs import Search
from darts_lora.views.console import by_part
from darts_lora.views.rank_images import rank_image

MOST_CURVES = 20  # in one panel
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
figure { margin: 1rem 0; overflow-x: auto } figure img { max-width: 100% }
figure.wide img { max-width: none }
table { border-collapse: collapse; font-size: 0.9rem } td, th { padding: 0.2rem 0.8rem 0.2rem 0;
        text-align: left; vertical-align: top; border-bottom: 1px solid #ddd;
        overflow-wrap: anywhere }
code { background: #f3f3f3; padding: 0.1rem 0.3rem; overflow-wrap: anywhere }
@media print { body { margin: 0; max-width: none } figure, table { break-inside: avoid }
               figure.wide img { max-width: 100% } }
"""


def write_report(search: Search, finetunes: list[dict[str, Any]], output: str) -> None:
    """Write `output` (HTML) and, in the folder beside it named as it is, each picture as a PNG.

    Raises:
        InputError: it cannot be written.
    """
    if os.path.isdir(output):
        raise InputError(f"output={output!r}: is a folder; name a file")
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name is a character
        pictures = _pictures(search, finetunes)
    folder = check_writable(os.path.splitext(output)[0] + "_pictures", "output")
    remove(output)  # so that none stands beside pictures of another report if this run is killed

    def write(temporary: str) -> None:
        os.mkdir(temporary)
        for name, content in pictures.items():
            with open(os.path.join(temporary, f"{name}.png"), "wb") as file:
                file.write(content)

    write_into(folder, write, last="ranks.png")
    write_text(output, _page(search, finetunes, pictures))


def _pictures(search: Search, finetunes: list[dict[str, Any]]) -> dict[str, bytes]:
    pictures = {
        "ranks": _png(rank_image(search.ranks, search.candidates[-1], search.parts)),
        "losses": _figure(_draw_losses, search),
        "parameters": _figure(_draw_parameters, search),
        "trajectories": _trajectories(search),
        "parts": _figure(_draw_parts, search),
    }
    if finetunes:
        pictures["finetunes"] = _figure(_draw_finetunes, finetunes)
    return pictures


def _png(pixels) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)  # twice as large: screens have fine pixels
    picture.resize((2 * picture.width, 2 * picture.height)).save(stream, "PNG")
    return stream.getvalue()


def _figure(draw, content) -> bytes:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    draw(panel, content)
    return _saved(figure)


def _saved(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _draw_losses(panel, search: Search) -> None:
    curves = {"train_loss": "training rows", "validation_gain": "taken off on validation rows"}
    for name, label in curves.items():
        points = [(r["step"], r[name]) for r in search.records if r[name] is not None]
        panel.plot(*zip(*points, strict=True), label=label) if points else None
    panel.set(xlabel="step", ylabel="loss")
    panel.legend(frameon=False)


def _draw_parameters(panel, search: Search) -> None:
    steps = [record["step"] for record in search.records]
    panel.plot(steps, [r["expected_parameters"] for r in search.records], label="expected")
    if search.budget:
        panel.axhline(search.budget, color="k", linestyle=":", label="budget")
    if search.genotype is not None:
        label = "chosen"
        panel.plot(steps[-1], search.genotype.num_parameters, "o", color="C1", label=label)
    panel.set(xlabel="step", ylabel="trainable parameters", ylim=(0, None))
    panel.legend(frameon=False)


def _trajectories(search: Search) -> bytes:
    """Mean expected rank of each module type, a panel for each part of the model."""
    names = {name: place for place, name in enumerate(search.layers)}
    parts = {part: _most_curves(kinds) for part, kinds in by_part(search.layers).items()}
    steps = [record["step"] for record in search.records]
    figure = Figure(figsize=(7, 2.6 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (part, kinds) in zip(panels, parts.items(), strict=True):
        for number, (kind, layers) in enumerate(kinds.items()):
            places = [names[name] for name in layers.values()]
            means = [
                sum(r["expected_ranks"][i] for i in places) / len(places) for r in search.records
            ]
            label, style = _short(part) if kind == "-" else kind, "--" if number > 9 else "-"
            panel.plot(steps, means, style, label=label, linewidth=1.2)
        panel.set_title(_short(part), fontsize=9, loc="left")
        panel.set_ylabel("expected rank")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel("step")
    panels[0].set_ylim(bottom=0)  # of all: they share the axis, and it holds all curves by now
    return _saved(figure)


def _most_curves(kinds: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    """The module types of a part that get a curve of their own, and the others as one."""
    items = list(kinds.items())
    if len(items) <= MOST_CURVES:
        return kinds
    own, others = items[: MOST_CURVES - 1], items[MOST_CURVES - 1 :]
    names = [name for _, layers in others for name in layers.values()]
    return {**dict(own), f"{len(others)} others": dict(enumerate(names))}


def _draw_parts(panel, search: Search) -> None:
    sizes = {
        _short(part): sum(
            parameters_per_rank(*search.layers[name]) * search.ranks[name]
            for layers in kinds.values()
            for name in layers.values()
        )
        for part, kinds in by_part(search.layers).items()
    }
    bars = panel.barh(list(sizes), list(sizes.values()))
    panel.bar_label(bars, [f"{size:,.0f}" for size in sizes.values()], padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set(xlabel="trainable parameters")


def _draw_finetunes(panel, finetunes: list[dict[str, Any]]) -> None:
    """Test loss against parameters, uniform ranks and derived models alike."""
    for run in finetunes:
        if run["loss"] is None:  # not finite: the table says so
            continue
        (point,) = panel.plot(run["trainable_parameters"], run["loss"], "o")
        place = (run["trainable_parameters"], run["loss"])
        panel.annotate(
            run["name"], place, xytext=(5, 5), textcoords="offset points", color=point.get_color()
        )
    panel.margins(0.25)
    panel.set(xlabel="trainable parameters", ylabel="test loss per token")


def _short(part: str) -> str:
    """The telling end of a part's name: "model.language_model.layers" is "language_model"."""
    pieces = [piece for piece in part.split(".") if piece not in ("model", "layers", "base_model")]
    return ".".join(pieces[-2:]) or part


def _page(search: Search, finetunes: list[dict[str, Any]], pictures: dict[str, bytes]) -> str:
    name = html.escape(os.path.basename(os.path.abspath(search.folder)))
    title = f"LoRA ranks found by {name}"
    sections = [
        f"<h1>{title}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in _result(search)),
        _section("Ranks", pictures, "ranks", "A row a module type, depth to the right.", "wide"),
        _section("Losses", pictures, "losses", "While the ranks were searched."),
        _section(
            "Parameters",
            pictures,
            "parameters",
            "Trainable parameters that alpha expects, against the budget.",
        ),
        _section(
            "Expected ranks",
            pictures,
            "trajectories",
            "Mean over depth of each module type. Until alpha moves, all ranks are alike.",
        ),
        _section("Where the parameters are", pictures, "parts", ""),
    ]
    if finetunes:
        sections.append(_section("Finetuned models", pictures, "finetunes", ""))
        sections.append(_finetune_table(finetunes))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"matplotlib": matplotlib.__version__}
    sections += ["<h2>Configuration</h2>", _table(search.options)]
    sections += ["<h2>Versions of this report</h2>", _table(versions)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _result(search: Search) -> list[str]:
    last = search.records[-1]
    if search.genotype is None:
        whole = search.options.get("max_steps", "?")
        text = f"Not finished: step {last['step']} of a run of {whole}."
        return [f"{text} Ranks are the expected ones."]
    genotype = search.genotype
    adapted = sum(rank > 0 for rank in genotype.ranks.values())
    return [
        f"{adapted} of {len(genotype.ranks)} layers adapted, {genotype.num_parameters:,} trainable "
        f"parameters; {last['step']} steps in {last['seconds']:.0f} s.",
        *_verdict(genotype),
    ]


def _verdict(genotype: Genotype) -> list[str]:
    try:
        return [verdict_text(genotype.found_by["verdict"])]
    except (
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
    ):  # of another tool: the ranks are there all the same
        return []


def _section(title: str, pictures: dict, name: str, caption: str, kind: str = "") -> str:
    content = base64.b64encode(pictures[name]).decode()
    return (
        f'<h2>{title}</h2><figure class="{kind}"><img alt="{title}" '
        f'src="data:image/png;base64,{content}"><figcaption>{caption}</figcaption></figure>'
    )


def _finetune_table(finetunes: list[dict[str, Any]]) -> str:
    head = ["model", "trainable parameters", "test loss", "exact match"]
    rows = [("base", run["base"]) for run in finetunes if run["base"]][:1]
    rows += [(run["name"], run) for run in finetunes]
    cells = [
        [
            name,
            f"{run['trainable_parameters']:,}",
            "-" if run["loss"] is None else f"{run['loss']:.4f}",
            "-" if run["exact_match"] is None else f"{run['exact_match']:.1%}",
        ]
        for name, run in rows
    ]
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{body}</table>"


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"
