"""darts-lora search: arguments, data, model, RankSearch, and what the user sees at the end.
Not here: any step of the search (darts_lora/search.py)."""

import os
from dataclasses import dataclass

from accelerate import Accelerator
from transformers import set_seed

from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.files import check_writable, locked, write_json
from darts_lora.base.options import command, is_main_process, run, save_config
from darts_lora.config import DataConfig, ModelConfig, SearchConfig, TrainingConfig
from darts_lora.data.loaders import (
    checked_rows,
    how_tested,
    load_splits,
    make_collator,
    rows_read,
    search_dataloaders,
    split_record,
)
from darts_lora.data.places import ROW
from darts_lora.data.sources import Rows, load_source
from darts_lora.finetune import FinetuneConfig, check_finetune, finetune
from darts_lora.lora.models import load_model
from darts_lora.run.beginning import SPLIT_NAME, check_finetune_start, goes_on
from darts_lora.run.course import task_options
from darts_lora.run.launch import check_launch
from darts_lora.run.resume import check_start, is_finished, remove_search
from darts_lora.run.stream import taken_rows
from darts_lora.search import RankSearch
from darts_lora.supernet import Supernet
from darts_lora.views.console import show, show_batch, show_sizes, show_supernet
from darts_lora.views.trackers import check_trackers

EMBEDDED_CONFIG = os.path.join(os.path.dirname(__file__), "embedded.yaml")


@dataclass
class SearchRun:
    """Where the run writes."""

    output_dir: str = "runs/search"
    """Folder for the genotype, checkpoints, TensorBoard files and the resolved configuration."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir, or in finetune_dir where the search ended."""
    finetune_dir: str | None = None
    """Go on to the end of the run with the found ranks, and save the adapter in this folder;
    default: stop at the genotype, and recipes/finetune.py goes on."""
    cuda_graphs: bool = False
    """Launch each step's kernels as one CUDA graph: for small models, whose kernels take longer to
    launch than to run. Set pad_to_multiple_of as well: each length of batch is captured once."""
    report_to: str | list[str] = "tensorboard"
    """Trackers of the figures and pictures: one or several of tensorboard, wandb, trackio, mlflow,
    comet_ml and what else accelerate knows; all that are installed; or none."""
    dry_run: bool = False
    """Show one decoded batch, its labels, the searched layers and their parameters, and stop."""


def main(
    options: SearchRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Search the LoRA rank of every layer of a model.

    Without arguments: the embedded vision-language model and data, embedded.yaml.
    """
    check_launch()
    check_trackers(options.report_to)
    check_writable(options.output_dir)
    if options.finetune_dir is not None:
        check_finetune(options.finetune_dir, model, data)
    configs = search, model, data, training
    if options.dry_run:
        return _search(options, *configs)
    with locked(options.output_dir), locked(options.finetune_dir):
        check_start(options.output_dir, options.resume)
        if options.finetune_dir is not None and not is_finished(options.output_dir):
            check_finetune_start(options.finetune_dir, resume=False)  # no finetune of this search
        _search(options, *configs)


def _search(options: SearchRun, search, model, data, training) -> None:
    collator = make_collator(model, data)
    source = load_source(data)
    splits, supervised, reads = load_splits(data, source=source), {}, rows_read(training)
    for name, split in splits.items():
        splits[name], supervised[name] = checked_rows(split, collator, data, reads)
    set_seed(search.seed)  # a classification head may be new
    base = load_model(model)
    collator.limits.of_model(base)
    supernet = Supernet(base, search)
    loaders = search_dataloaders(splits, collator, training, search.seed)
    if options.dry_run:
        if is_main_process():
            show_batch(next(iter(loaders[0])), collator.tokenizer)
            show_supernet(supernet)
        return
    rows = split_record(splits, data)
    rank_search = RankSearch(
        supernet,
        *loaders,
        training=training,
        output_dir=options.output_dir,
        course=task_options(model, data, rows, training),
        cuda_graphs=options.cuda_graphs,
        report_to=options.report_to,
    )
    accelerator = rank_search.accelerator
    if options.resume:
        rank_search.resume()
    if accelerator.is_main_process:
        if not options.resume:
            remove_search(options.output_dir)
        save_config(options.output_dir, search, model, data, training)
        if not data.streaming:
            rows["taken"] = _taken(rank_search, splits["train"])
        write_json(os.path.join(options.output_dir, SPLIT_NAME), rows)
    _describe(accelerator, supernet, splits, supervised)
    accelerator.print(how_tested(source, data))
    genotype = rank_search.run()
    path = os.path.join(options.output_dir, "genotype.json")
    if accelerator.is_main_process:
        show(genotype)
        if "sizes" in genotype.found_by:
            show_sizes(genotype.found_by["sizes"])
        print(verdict_text(genotype.found_by["verdict"]))
    following = command("finetune", model, genotype=path)
    if options.finetune_dir is not None:
        del rank_search
        accelerator.free_memory()
        config = FinetuneConfig(
            path,
            output_dir=options.finetune_dir,
            resume=options.resume and goes_on(options.finetune_dir, genotype),
            report_to=options.report_to,
            seed=search.seed,
        )
        finetune(config, model, data, training, supernet)
        following = command("evaluate", model, adapter=options.finetune_dir)
    if accelerator.is_main_process:
        print(f"Genotype: {path}. Next: {following}")


def _taken(rank_search: RankSearch, rows: Rows) -> list[int]:
    """Rows (numbers in their source) of the epoch that the search ends in, which it will have taken
    then: the finetune begins with the others."""
    batches = rank_search.steps * rank_search.training.gradient_accumulation_steps
    numbers = rows[ROW]
    taken = taken_rows(rank_search.train_stream.dataloader, batches)
    return sorted(numbers[i] for i in taken)


def _describe(accelerator: Accelerator, supernet: Supernet, splits, supervised) -> None:
    for name, split in splits.items():
        rows = f"{len(split):,} rows" if hasattr(split, "__len__") else "a stream"
        share = supervised[name]
        learnt = "labels" if share is None else f"{share:.0%} of the text's tokens supervised"
        accelerator.print(f"{name}: {rows}, {learnt}")
    budget = f"{supernet.budget:,.0f} parameters"
    if supernet.sizes:
        budget = f"to be recommended, by a tolerance of {supernet.config.tolerance:g}"
    accelerator.print(
        f"{len(supernet.layers)} layers, candidate ranks {list(supernet.config.ranks)}, "
        f"budget: {budget} (uniform rank 1: {supernet.parameters_per_rank:,})"
    )


def start() -> None:
    """Parse the command line and run."""
    shared = SearchConfig, ModelConfig, DataConfig, TrainingConfig
    run(main, SearchRun, *shared, default_config=EMBEDDED_CONFIG)
