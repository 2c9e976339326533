"""The model card beside an adapter: what it is of, its ranks, its figures, how to load it.
Not here: the upload (run/hub.py), the report of a search (report.py)."""

from __future__ import annotations

import html
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from PIL import Image

from darts_lora.base.errors import printable
from darts_lora.base.files import remove, write_text
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.sources import LOADERS
from darts_lora.genotype import Genotype
from darts_lora.lora.adapter import PREFIX, adapted_ranks
from darts_lora.lora.models import auto_class
from darts_lora.views.console import by_part
from darts_lora.views.rank_images import rank_image

CARD, PICTURE = "README.md", "ranks.png"
BEGIN, END = "<!-- figures of evaluate.py -->", "<!-- end of figures -->"
PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
}


def write_card(
    folder: str,
    adapted: PeftModel,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    genotype: Genotype | None,
    record: Mapping[str, Any],
) -> None:
    """Write README.md, a card in the hub's form, and ranks.png, which it shows, into `folder`.

    No path of this machine stands in it: of a local model, or of files, the last part alone.

    Args:
        adapted: the model with its adapter.
        genotype: what was searched; None of a uniform rank without a search.
        record: what stands in finetune.json.

    Raises:
        InputError: they cannot be written.
    """
    base: Any = adapted.get_base_model()
    kind = auto_class(base.config, model.task).__name__
    ranks = dict.fromkeys(genotype.ranks if genotype else (), 0) | adapted_ranks(adapted)
    os.makedirs(folder, exist_ok=True)
    picture = Image.fromarray(rank_image(ranks, max(ranks.values())))
    picture.save(os.path.join(folder, PICTURE))
    uniform = record["rank"]
    title = f"LoRA of rank {uniform}" if uniform else "LoRA with a rank of its own for each layer"
    found = f"one rank, {uniform}, for all layers" if uniform else "found by darts_lora's search"
    budget = (genotype.found_by.get("budget_parameters") if genotype else None) or None
    loss, before = record.get("loss"), record.get("first_step")
    rows = {
        "base model": _text(_shown(model.model_name_or_path)),
        "task": PIPELINES[kind],
        "data": _data_text(data),
        "ranks": found,
        "variant": _variant(adapted),
        "trainable parameters": f"{record['trainable_parameters']:,}",
        "budget": "none" if budget is None or uniform else f"{budget:,.0f} parameters",
        "training": f"{record['steps']:,} steps of "
        f"{training.batch_size * training.gradient_accumulation_steps} rows on each process, "
        f"learning rate {training.learning_rate:g}"
        + (f", behind {before:,} steps of the search" if before else "")
        + ("" if loss is None else f", loss at the end {loss:.4f}"),
        "licence": "unknown; those of the base model and of the data hold for their parts",
    }
    text = "\n\n".join(
        [
            f"---\n{_metadata(model, data, kind).to_yaml()}\n---",
            f"# {title}: {_text(_shown(model.model_name_or_path))}",
            "Made with darts_lora, which finds a LoRA rank for every layer by one search.",
            _table(("", ""), rows.items()),
            "## Figures",
            f"{BEGIN}\n\nNot evaluated yet: recipes/evaluate.py writes its figures here.\n\n{END}",
            "## Ranks",
            "0: the layer has no adapter. From left to right in order of depth.",
            _ranks_table(ranks, _sizes(adapted)),
            f"![Ranks by module type and depth]({PICTURE})",
            "## How to load it",
            f"```python\n{_loading(model, kind)}\n```",
        ]
    )
    write_text(os.path.join(folder, CARD), text + "\n")


def update_figures(folder: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what was measured into the card in `folder`, if it is one of ours.

    Args:
        results: name of a model -> loss, exact_match (each a number or None),
            trainable_parameters (count) and, where it is known, rows (count).

    Raises:
        InputError: the card cannot be written.
    """
    text = _own_card(folder)
    if text is None:
        return
    rows = [
        (
            _text(name),
            "not finite" if figures["loss"] is None else f"{figures['loss']:.4f}",
            "-" if figures["exact_match"] is None else f"{figures['exact_match']:.1%}",
            f"{figures['trainable_parameters']:,}",
            f"{figures['rows']:,}" if type(figures.get("rows")) is int else "-",
        )
        for name, figures in results.items()
    ]
    header = ("model", "loss per token", "exact match", "trainable parameters", "test rows")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    block = f"\n\n{_table(header, rows)}\n\n"
    write_text(os.path.join(folder, CARD), text[:start] + block + text[end:])


def remove_card(folder: str) -> None:
    """Remove the card and the picture that an earlier finetune left; a README of others stays."""
    if _own_card(folder) is not None:
        for name in (CARD, PICTURE):
            remove(os.path.join(folder, name))


def _own_card(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, CARD), encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError):
        return None
    return text if 0 <= text.find(BEGIN) < text.find(END) else None


def _metadata(model: ModelConfig, data: DataConfig, kind: str) -> ModelCardData:
    local = {"embedded", "imagefolder", *LOADERS.values()}
    dataset = None if data.dataset in local else _hub_id(data.dataset)
    return ModelCardData(
        base_model=_hub_id(model.model_name_or_path),
        datasets=None if dataset is None else [dataset],
        license="unknown",
        library_name="peft",
        pipeline_tag=PIPELINES[kind],
        tags=["lora", "darts_lora"],
    )


def _hub_id(name: str) -> str | None:
    """The name if the hub may know it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name == "embedded" or os.path.exists(name) else name


def _shown(name: str) -> str:
    """A hub name as it is, of a path its last part."""
    return name if _hub_id(name) else os.path.basename(os.path.normpath(name))


def _data_text(data: DataConfig) -> str:
    """The data set, its configuration, its files by name."""
    files = data.data_files or []
    lists = files.values() if isinstance(files, dict) else [files]
    names = [name for one in lists for name in ([one] if isinstance(one, str) else one)]
    parts = [data.dataset, data.dataset_config, *names]
    return _text(", ".join(_shown(part) for part in parts if part))


def _variant(adapted: PeftModel) -> str:
    """PEFT's options that make the adapter another than plain LoRA."""
    config: Any = adapted.peft_config["default"]
    names = [f"`{name}`" for name in ("use_rslora", "use_dora") if getattr(config, name)]
    if isinstance(config.init_lora_weights, str):
        names.append(f"`init_lora_weights={config.init_lora_weights}`")
    return ", ".join(names) or "plain LoRA"


def _sizes(adapted: PeftModel) -> dict[str, int]:
    """Name of each adapted layer -> its trainable parameters."""
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            layer = name.removeprefix(PREFIX).split(".lora_")[0].replace(".base_layer", "")
            sizes[layer] += parameter.numel()
    return sizes


def _ranks_table(ranks: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    rows = []
    for part, kinds in by_part(ranks).items():
        for kind, layers in kinds.items():
            names = [layers[depth] for depth in sorted(layers)]
            own = [ranks[name] for name in names]
            label = part if kind == "-" else f"{part}.*.{kind}"
            held = sum(sizes.get(name, 0) for name in names)
            mean = f"{sum(own) / len(own):.1f}"
            rows.append((_text(label), " ".join(map(str, own)), mean, f"{held:,}"))
    return _table(("module type", "ranks", "mean", "trainable parameters"), rows)


def _loading(model: ModelConfig, kind: str) -> str:
    name = _hub_id(model.model_name_or_path)
    if name is None or model.gguf_file is not None:
        name = "embedded" if model.model_name_or_path == "embedded" else "FOLDER OF THE BASE MODEL"
        base = [
            "from darts_lora.config import ModelConfig",
            "from darts_lora.lora.models import load_model",
        ]
        load = f"load_model(ModelConfig({name!r}))"
    else:
        base, load = [f"from transformers import {kind}"], f"{kind}.from_pretrained({name!r})"
    last = 'PeftModel.from_pretrained(base, "THIS FOLDER OR HUB NAME")'
    return "\n".join([*base, "from peft import PeftModel", "", f"base = {load}", f"model = {last}"])


def _table(header: tuple[str, ...], rows) -> str:
    """A table in Markdown; the cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: str) -> str:
    """`value` as Markdown shows it letter by letter."""
    plain = html.escape(printable(value), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", plain)
