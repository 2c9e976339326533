"""A better model at equal budget and equal cost? The uniform-rank curve, the search, and other ways
to choose ranks. Not here: methods, cells, retraining, tables (quality_*.py).

python recipes/benchmark/quality.py --config recipes/benchmark/quality/embedded_vqa.yaml
python recipes/benchmark/quality_tables.py           # whatever is finished, as tables and plots
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
import time
import traceback
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from quality_cells import TUNING_SEED, Cell, QualityRun, Store, cells
from quality_methods import METHODS
from quality_rows import EncodedRows, mean_loss, task_digest, task_model, task_rows
from quality_setting import Found, Setting, parameters
from quality_stacked import linear_modules
from quality_training import Retrainer, Retraining

from darts_lora import DivergedError, InputError, SearchConfig
from darts_lora.base.files import check_writable, write_json
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.loaders import load_splits, make_collator
from darts_lora.data.splits import hold_back
from darts_lora.evaluate import score
from darts_lora.lora.targets import match_modules, match_saved_modules, outside

Options = tuple[QualityRun, SearchConfig, ModelConfig, DataConfig, TrainingConfig]


def main(
    options: QualityRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Measure every way to choose ranks on one task, each with its own tuned learning rates."""
    started = time.monotonic()
    folder = Path(check_writable(os.path.join(options.output_dir, options.benchmark)))
    everything = (options, search, model, data, training)
    _check_same_task(folder, everything)
    digest = task_digest(model, data)
    store = Store(folder, digest)
    list(map(store.get, cells(options, store)))  # refused before a worker is started
    store.forget_failures()
    if options.workers == 1:
        work(everything, digest, started)
    else:
        context = get_context("forkserver")  # which, unlike this one, has not used the GPU
        context.set_forkserver_preload(["darts_lora.search"])
        processes = [
            context.Process(target=work, args=(everything, digest, started))
            for _ in range(options.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise InputError("a worker ended early, see above; what is finished stays")
    if store.failures():
        raise InputError(f"{folder}: failed, see their .error: {', '.join(store.failures())}")


def _check_same_task(folder: Path, everything: Options) -> None:
    """Cells of one folder are made with the same options, but for those that only say which."""
    options, *rest = everything
    which = ("output_dir", "methods", "budgets", "seeds", "tuning_seeds", "workers", "stack")
    which += ("split_by",)  # task_rows has one of its own
    which += (
        "max_minutes",
        "eval_batch_size",
        "data_files",
        "model_name_or_path",
    )  # this machine's
    wanted = {name: value for part in (options, *rest) for name, value in asdict(part).items()}
    wanted = {name: value for name, value in wanted.items() if name not in which}
    wanted, path = json.loads(json.dumps(wanted)), folder / "options.json"
    if not path.exists():
        write_json(path, wanted)
    # an option that is newer than the file was as its default is
    defaults = {name: value for part in everything for name, value in asdict(type(part)()).items()}
    found = json.loads(json.dumps(defaults)) | json.loads(path.read_text())
    changed = {name for name, value in wanted.items() if found[name] != value}
    if changed:
        raise InputError(
            f"{path}: its cells were made with another {', '.join(sorted(changed))}; "
            "name another benchmark or output_dir"
        )


def work(everything: Options, digest: str, started: float) -> None:
    """Compute one cell after the other until all are done or the time is up."""
    options = everything[0]
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    store = Store(Path(options.output_dir) / options.benchmark, digest)
    if not _to_do(options, store, math.inf):
        return  # no model is loaded for nothing
    task = Task(*everything)
    end = math.inf if options.max_minutes is None else started + 60 * options.max_minutes
    while todo := _to_do(options, store, end - time.monotonic()):
        if not _compute_some(todo, task, store):
            time.sleep(1)  # all are claimed by others; what depends on them comes then


def _to_do(options: QualityRun, store: Store, seconds: float) -> list[Cell]:
    """Unfinished cells that can be computed now and, as far as is known, in this time (s)."""
    longest: dict[tuple[str, str], float] = {}
    for cell, record in store.finished.items():
        kind = cell.stage, cell.method
        longest[kind] = max(longest.get(kind, 0.0), record["cell_seconds"])
    return [
        cell
        for cell in cells(options, store)
        if not store.get(cell)
        and not store.failed(cell)
        and (cell.stage == "find" or store.get(cell.plan))
        and longest.get((cell.stage, cell.method), 0.0) < seconds
    ]


def _compute_some(todo: list[Cell], task: Task, store: Store) -> bool:
    """Compute cells that no other worker has claimed, retrainings as many at once as may be or else
    a plan to be found (several where their method can); whether there were any. Plans come first
    that others wait for: cheap ones, and those before the retrainings that are to be next."""
    finds = [cell for cell in todo if cell.stage == "find"]
    retrainings = [cell for cell in todo if cell.stage != "find"]
    full = task.options.stack
    last = todo.index(retrainings[:full][-1]) if retrainings else 0
    first = [cell for cell in finds if not cell.find_rate or cell in todo[:last]]
    for choices, least, most in (
        (first, 1, full), (retrainings, full, full), (finds, 1, full), (retrainings, 1, full)
    ):  # fmt: skip
        with contextlib.ExitStack() as claims:
            found: list[Cell] = []
            for cell in choices:
                fits = not found or (len(found) < most and _together(found[0], cell))
                if fits and claims.enter_context(store.claimed(cell)):
                    found.append(cell)
            if len(found) >= least:
                _compute(found[: 2 ** int(math.log2(len(found)))], task, store)  # few sizes
                return True
    return False


def _together(one: Cell, other: Cell) -> bool:
    """Whether two cells can be computed at once: retrainings, or plans of a method that can."""
    if "find" not in (one.stage, other.stage):
        return True
    same = (one.stage, one.method, one.budget) == (other.stage, other.method, other.budget)
    return same and METHODS[one.method].at_once


def _compute(cells: list[Cell], task: Task, store: Store) -> None:
    begun = time.perf_counter()
    try:
        records = task.compute(cells, store)
    except Exception:  # a method that cannot run here must not stop the others
        for cell in cells:
            store.fail(cell, traceback.format_exc())
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the device is lost: no cell can run
    else:
        seconds = round(time.perf_counter() - begun, 3)
        times = {"cell_seconds": seconds, "device": task.device_name}
        for cell, record in zip(cells, records, strict=True):
            store.put(cell, {**record, **times})
            if cell.stage != "find" and METHODS[cell.method].goes_on:
                store.forget(cell.plan)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the GPU's other workers may need what this cell did
    names = ", ".join(cell.name for cell in cells)
    print(f"{names}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)


class Task:
    """Model and rows, loaded once for all cells of a process.

    A larger vision-language model needs no more than its YAML file: what loads and encodes here
    are the Auto classes and the collator of darts_lora.
    """

    def __init__(
        self,
        options: QualityRun,
        search: SearchConfig,
        model: ModelConfig,
        data: DataConfig,
        training: TrainingConfig,
    ):
        self.options, self.search, self.data = options, search, data
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        self.device_name = torch.cuda.get_device_name() if on_gpu else "cpu"
        self.collator = make_collator(model, data)
        self.test_rows = load_splits(data, ["test"])["test"]
        self.rows = EncodedRows(task_rows(data), self.collator, device, options.group_by_length)
        self.test = EncodedRows(self.test_rows, self.collator, device)
        self.all = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(data.split_seed)
        ).tolist()
        self.tuning, self.validation = hold_back(
            self.all, self.rows.prompts, options.tuning_fraction
        )
        base = task_model(model).to(device)
        saved = match_saved_modules(base, search.modules_to_save)
        others = sorted({*options.methods} - {"uniform", "one_run", "one_run_scratch"})
        if saved and others:
            raise InputError(f"methods={others}: cannot train {saved[0]} in full; leave them out")
        names = match_modules(base, search.target_modules, search.exclude_modules)
        self.retrainer = Retrainer(
            base,
            outside(names, saved),
            whole=linear_modules(base, saved),
            largest=max(*options.curve, *search.ranks),
            scaling=search.scaling,
            training=training,
            stack=options.stack,
        )
        smallest = min(self.retrainer.capacity, key=self.retrainer.capacity.get)
        if max(options.curve) > self.retrainer.capacity[smallest]:
            most = self.retrainer.capacity[smallest]
            raise InputError(f"curve={options.curve}: {smallest} takes ranks up to {most}")

    def compute(self, cells: list[Cell], store: Store) -> list[dict[str, Any]]:
        """The records of cells that find plans together, or that retrain plans."""
        if cells[0].stage == "find":
            return self._find(cells, store)
        jobs = {cell: self._job(cell, store) for cell in cells}
        steps = {cell: (job.taken, job.run_steps) for cell, job in jobs.items()}
        records: dict[Cell, dict[str, Any]] = {}
        while rest := [cell for cell in cells if cell not in records]:
            same = [cell for cell in rest if steps[cell] == steps[rest[0]]]
            some = same[: 2 ** int(math.log2(len(same)))]  # a stack has as many steps each
            found = self._retrain(some, [jobs[cell] for cell in some])
            records |= zip(some, found, strict=True)
        return [records[cell] for cell in cells]

    def setting(self, cell: Cell) -> Setting:
        """What the method of a cell may use."""
        return Setting(
            self.retrainer,
            self.rows,
            self.tuning if cell.seed >= TUNING_SEED else self.all,
            budget_rank=cell.budget,
            seed=cell.seed,
            rate=cell.find_rate,
            search=self.search,
            validation_fraction=self.data.validation_fraction,
        )

    def _find(self, cells: list[Cell], store: Store) -> list[dict[str, Any]]:
        settings, started = list(map(self.setting, cells)), time.perf_counter()
        try:
            plans = METHODS[cells[0].method].plans(settings)
        except DivergedError as error:
            plans = [Found.diverged(setting, str(error)) for setting in settings]
        seconds = round(time.perf_counter() - started, 3)
        if self.retrainer.device.type == "cuda":
            gc.collect()  # graphs of a search hold memory and stand in cycles
        records = []
        for cell, setting, found in zip(cells, settings, plans, strict=True):
            count = parameters(found.ranks, self.retrainer.shapes)
            if count > setting.budget:
                raise RuntimeError(
                    f"{cell.name}: {count:,} parameters, the budget is {setting.budget:,}"
                )
            record = {"ranks": list(found.ranks.values()), "parameters": count} | found.notes
            record |= {"seconds": seconds, "stack": len(cells), "workers": self.options.workers}
            records.append(record)
            if setting.kept:
                store.keep(cell, setting.kept)
        return records

    def _retrain(self, cells: list[Cell], jobs: list[Retraining]) -> list[dict[str, Any]]:
        records = self.retrainer.retrain(jobs, self.rows)
        for number, (cell, job) in enumerate(zip(cells, jobs, strict=True)):
            count = parameters(job.plan, self.retrainer.shapes)
            records[number] |= {"parameters": count, "workers": self.options.workers}
            with self.retrainer.adapters(number) as model:
                records[number] = self._judged(cell, model) | records[number]
        return records

    def _job(self, cell: Cell, store: Store) -> Retraining:
        plan = store.get(cell.plan)
        method = METHODS[cell.method]
        job = Retraining(
            dict(zip(self.retrainer.shapes, plan["ranks"], strict=True)),
            self.tuning if cell.stage == "tune" else self.all,
            cell.seed,
            cell.rate,
        )
        job.taken, job.read = plan.get("taken", 0), plan.get("read", 0)
        job.run_steps = plan.get("run_steps")
        if method.afresh:
            job.taken, job.run_steps = 0, self.retrainer.training.max_steps - plan["passes"]
        if method.goes_on and any(plan["ranks"]):
            first = store.kept(cell.plan)
            if not first:  # it was trained before
                method.plans([setting := self.setting(cell.plan)])
                first = setting.kept
            job.first, job.first_b = ({n: ab[i] for n, ab in first.items()} for i in (0, 1))
            layers = self.retrainer.shapes
            job.plan |= {name: len(a) for name, a in job.first.items() if name in layers}
        return job

    def _judged(self, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
        size = self.options.eval_batch_size
        if cell.stage == "tune":
            return {"loss": mean_loss(model, self.rows, self.validation, size)}
        record = {"loss": mean_loss(model, self.test, range(len(self.test)), size)}
        if self.options.exact_match:
            result = score(model, self.test_rows, self.collator, batch_size=size)
            record["exact_match"] = result["exact_match"]
        return record


if __name__ == "__main__":
    run(
        main,
        QualityRun,
        SearchConfig,
        ModelConfig,
        DataConfig,
        TrainingConfig,
        default_config=os.path.join(os.path.dirname(__file__), "quality", "embedded_vqa.yaml"),
    )
