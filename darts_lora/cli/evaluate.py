"""Evaluates an adapter on the test rows, beside its base model: arguments, and the table.
Not here: how loss and exact match are counted (darts_lora/evaluate.py)."""

from rich.console import Console
from rich.table import Table

from darts_lora.base.options import is_main_process, run
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.evaluate import EvaluateConfig, evaluate


def main(options: EvaluateConfig, model: ModelConfig, data: DataConfig) -> None:
    """Loss and exact match of an adapter on the test rows, and of the base model without it.

    Model and data options default to those that the adapter was trained with.
    """
    results = evaluate(options, model, data)
    if is_main_process():
        Console().print(_table(results))


def _table(results: dict) -> Table:
    rows = results["adapter"]["rows"]
    table = Table(title=f"{rows:,} test rows")
    table.add_column("model")
    for column in ("loss per token", "exact match", "trainable parameters"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
        parameters = f"{result['trainable_parameters']:,}"
        exact = result["exact_match"]
        table.add_row(name, loss, "-" if exact is None else f"{exact:.1%}", parameters)
    return table


def start() -> None:
    """Parse the command line and run."""
    run(main, EvaluateConfig, ModelConfig, DataConfig, previous="adapter")
