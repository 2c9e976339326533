"""Retrains what a search found as a plain PEFT adapter: arguments, and what the user sees.
Not here: the training (darts_lora/finetune.py)."""

from darts_lora.base.options import command, is_main_process, run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.finetune import FinetuneConfig, finetune


def main(
    options: FinetuneConfig, model: ModelConfig, data: DataConfig, training: TrainingConfig
) -> None:
    """Retrain a genotype as a plain PEFT adapter, on training and validation rows together.

    Model, data and training options default to those of the search that found the genotype.
    """
    if is_main_process():
        print(f"Model {model.model_name_or_path}, data {data.dataset}", flush=True)
    _, record = finetune(options, model, data, training)
    if is_main_process():
        print(
            f"{record['trainable_parameters']:,} trainable parameters, loss {record['loss']:.4f} "
            f"after {record['steps']} steps ({record['seconds']:.0f} s); adapter in "
            f"{options.output_dir}\nNext: {command('evaluate', model, adapter=options.output_dir)}"
        )


def start() -> None:
    """Parse the command line and run."""
    run(main, FinetuneConfig, ModelConfig, DataConfig, TrainingConfig, previous="genotype")
