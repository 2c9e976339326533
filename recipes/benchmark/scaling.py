"""How a search scales over processes: time, rows a second and memory of its steps, weak scaling.
Not here: shapes, batches and clocks (speed.py), nor other ways to mix ranks (speed_methods.py).

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/benchmark/scaling.py
"""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from rich.table import Table
from speed import SHAPES, SpeedRun, make_batches, make_model, measure
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.base.bounds import check_bounds, check_ranks
from darts_lora.base.files import check_writable, read_json, write_json
from darts_lora.base.options import run
from darts_lora.config import TrainingConfig
from darts_lora.run.bilevel import BilevelStep
from darts_lora.run.launch import DDP_OPTIONS
from darts_lora.run.tokens import model_loss

STEPS = {"weights": False, "bilevel": True}  # name -> whether alpha is trained as well
ENDLESS = 10**9  # weight steps
SETTING = ("shape", "ranks", "adapter_dtype", "device", "torch")  # equal, or nothing to compare


@dataclass
class ScalingRun:
    """What each process does; how many there are and how they share a model is accelerate's."""

    shape: str = "smollm2"
    """Model and batch of a process: tiny, smollm2, llama_1b, llama_8b, mllama_11b,
    mllama_11b_batch4."""
    ranks: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Candidate ranks, nested branches; the middle one is the budget's."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights; that of the base model is bfloat16."""
    steps: int = 20
    """Timed steps of each kind (count), after a few for warming up."""
    output: str = "scaling.json"
    """File of records (JSON): this run's is added, or replaces that of an equal launch."""

    def __post_init__(self):
        self.ranks = list(check_ranks(self.ranks))
        check_bounds(self, at_least={"steps": 2}, choices={"shape": tuple(SHAPES)})


def main(options: ScalingRun) -> None:
    """Milliseconds, rows a second and peak memory of a search's steps on one or several processes,
    each with a batch of its own, beside what the file holds of earlier runs."""
    check_writable(os.path.dirname(options.output) or ".", "output")
    read_records(options.output)  # what is wrong with it is told before anything is measured
    accelerator = Accelerator(kwargs_handlers=[DDP_OPTIONS])
    record = measure_steps(options, accelerator)
    if accelerator.is_main_process:
        records = read_records(options.output)
        records["{shape}, {kind}, {processes}".format_map(record)] = record
        write_json(options.output, records)
        for shape in sorted({record["shape"] for record in records.values()}):
            Console().print(table(shape, records))


def measure_steps(options: ScalingRun, accelerator: Accelerator) -> dict:
    """This run's record: setting, distribution, and figures of each kind of step."""
    shape, device = SHAPES[options.shape], accelerator.device.type
    speed = SpeedRun(steps=options.steps, device=device)
    ranks, dtype = options.ranks, options.adapter_dtype
    budget_rank = ranks[len(ranks) // 2]
    set_seed(0)  # FSDP2 takes a shard of each process's weights: they must be equal
    config = SearchConfig(ranks, branches="nested", budget_rank=budget_rank, adapter_dtype=dtype,
                          arch_every=1)  # fmt: skip
    supernet = Supernet(make_model(shape, device), config)
    set_seed(0, device_specific=True)  # batches and samples are each process's own
    steps = BilevelStep(supernet, accelerator, TrainingConfig(), model_loss, ENDLESS)
    threads = f"cpu, {torch.get_num_threads()} threads"  # they decide a CPU's times
    record = {
        "shape": options.shape, "ranks": ranks, "adapter_dtype": dtype, "budget_rank": budget_rank,
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "torch": torch.__version__, **distribution(accelerator, steps.weights.model),
        "steps": options.steps, "results": {},
    }  # fmt: skip
    batches, rows = make_batches(shape, speed), shape.rows * accelerator.num_processes
    for name, trains_alpha in STEPS.items():
        # in the second half of a search, whose end does not come
        steps.architect.taken = ENDLESS // 2 if trains_alpha else 0

        def step(batch):
            steps.step(iter([batch]), iter([batch]))

        record["results"][name] = joined(gather_object([measure(step, batches, speed)]), rows)
    return record


def distribution(accelerator: Accelerator, model: torch.nn.Module) -> dict:
    """What became of the launch, seen on the prepared model; InputError where it isn't as meant."""
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    ddp = isinstance(model, DistributedDataParallel)
    kind = "fsdp2" if any(sharded) else "ddp" if ddp else "single"
    launched = int(os.environ.get("WORLD_SIZE", 1))
    as_meant = {"single": launched == 1, "ddp": True, "fsdp2": all(sharded)}[kind]
    if accelerator.num_processes != launched or not as_meant:
        raise InputError(
            f"num_processes={launched}: accelerate runs {accelerator.num_processes}, with a "
            f"{type(model).__name__} of {sum(sharded)} sharded tensors out of {len(sharded)}; "
            "use single.yaml, ddp.yaml or fsdp2.yaml of recipes/accelerate_configs"
        )
    found = {"kind": kind, "processes": accelerator.num_processes, "launched": launched}
    return found | {"sharded_tensors": sum(sharded), "tensors": len(sharded)}


def joined(seen: list[dict], rows: int) -> dict:
    """The slowest process's times, all processes' memory; training rows alone are counted."""
    slowest = max(seen, key=lambda result: result["ms"])
    peaks = [result["peak_gib"] for result in seen]
    return slowest | {"rows_per_second": round(1000 * rows / slowest["ms"], 3), "peak_gib": peaks}


def read_records(path: str) -> dict[str, dict]:
    """What earlier runs left, by key; InputError where the file holds anything else."""
    if not os.path.exists(path):
        return {}
    try:
        records = read_json(path)
        ours = all({"kind", "results", *SETTING} <= record.keys() for record in records.values())
    except (InputError, AttributeError):
        ours = False
    if not ours:
        raise InputError(f"output={path!r}: holds no records of this benchmark; name another file")
    return records


def efficiency(record: dict, records: dict[str, dict], step: str) -> float | None:
    """Rows a second of a process over those of one that ran alone in the same setting; None where
    none did."""
    same = [r for r in records.values() if all(r[name] == record[name] for name in SETTING)]
    alone = [r for r in same if r["kind"] == "single"]
    if not alone:
        return None
    ours, base = (r["results"][step]["rows_per_second"] for r in (record, alone[0]))
    return ours / record["processes"] / base


def table(shape: str, records: dict[str, dict]) -> Table:
    """A row for each of the shape's records and kinds of step."""
    made = Table(title=shape, caption="efficiency: rows/s of a process over those of one alone")
    for column in ("kind", "processes", "step", "ms", "rows/s", "efficiency", "peak GiB"):
        made.add_column(column, justify="left" if column in ("kind", "step") else "right")
    chosen = [record for record in records.values() if record["shape"] == shape]
    for record in sorted(chosen, key=lambda r: (r["processes"], r["kind"])):
        for step, result in record["results"].items():
            share, peaks = efficiency(record, records, step), result["peak_gib"]
            figures = [f"{result['ms']:.1f}", f"{result['rows_per_second']:.2f}"]
            figures.append("-" if share is None else f"{share:.2f}")
            figures.append("-" if None in peaks else f"{max(peaks):.1f}")
            made.add_row(record["kind"], str(record["processes"]), step, *figures)
    return made


if __name__ == "__main__":
    run(main, ScalingRun)
