"""Time and memory of a search step beside plain LoRA and other ways to mix ranks, in one process.
Not here: the ways themselves (speed_methods.py), nor what a search is worth (quality).

python recipes/benchmark/speed.py --shape smollm2 --output speed.json
python recipes/benchmark/speed.py --shape tiny --device cpu        # only to keep the script alive
"""

import gc
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from speed_methods import METHODS
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from darts_lora import InputError
from darts_lora.base.bounds import check_bounds
from darts_lora.base.files import write_json
from darts_lora.base.options import run
from darts_lora.lora.models import checkpoint_activations

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass
class Shape:
    """A model's configuration, and a batch for it."""

    config: dict | None
    rows: int
    tokens: int
    checkpointing: bool = False


SHAPES = {
    "tiny": Shape(TINY, 2, 32),
    "smollm2": Shape(SMOLLM2, 16, 256),
    "llama_1b": Shape(LLAMA_1B, 4, 256),
    "llama_8b": Shape(LLAMA_8B, 1, 1024),
    "mllama_11b": Shape(None, 1, 256),  # None: the default MllamaConfig is the 11B model's
    "mllama_11b_batch4": Shape(None, 4, 512, checkpointing=True),
}


@dataclass
class SpeedRun:
    """What is measured."""

    shape: str = "smollm2"
    """Model and batch: tiny, smollm2, llama_1b, llama_8b, mllama_11b, mllama_11b_batch4."""
    methods: list[str] | None = None
    """Which ways; default: all that the device can run."""
    ranks: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Candidate ranks; plain LoRA gets the largest."""
    steps: int = 20
    """Timed steps of each way (count), after a few for warming up."""
    rounds: int = 1
    """How often all ways are gone through (count): a host whose speed drifts hits all alike."""
    device: str = "cuda"
    """Device: cuda or cpu."""
    output: str = "speed.json"
    """File for the results (JSON)."""
    seed: int = 0
    """Seed of weights and batches."""

    def __post_init__(self):
        check_bounds(self, at_least={"steps": 2, "rounds": 1}, choices={"shape": tuple(SHAPES)})


def main(options: SpeedRun) -> None:
    """Median milliseconds of a step, their spread and the peak memory of each way, side by side."""
    on_gpu = ("graph", "compiled")  # the first have no CPU, the second would want a C++ compiler
    possible = [m for m in METHODS if options.device == "cuda" or not any(g in m for g in on_gpu)]
    methods = possible if options.methods is None else options.methods
    for name in methods:
        if name not in possible:
            raise InputError(
                f"methods={name!r}: must be one of {', '.join(possible)} on {options.device}"
            )
    torch.manual_seed(options.seed)
    shape = SHAPES[options.shape]
    model, batches = make_model(shape, options.device), make_batches(shape, options)
    found: dict[tuple[str, str], tuple[list[float], float | None]] = {}
    for name in methods * options.rounds:
        steps, close = METHODS[name](model, options.ranks)
        for kind, step in steps.items():
            before, earlier = found.get((name, kind), ([], None))
            times, peak = timed(step, batches, options)
            peaks = [earlier, peak]
            if kind == "bilevel" and len(steps) > 1:  # its graphs took their memory before
                peaks += [found[name, other][1] for other in steps if other != kind]
            found[name, kind] = before + times, max(filter(None, peaks), default=None)
            print(f"{name} {kind}: {statistics.median(times):.1f} ms, {peak} GiB", flush=True)
            write_json(options.output, _record(options, _results(found)))
        close()
        del steps, close, step
        gc.collect()  # graphs keep their memory until they are gone
    Console().print(_table(options, _results(found)))


def _results(found: dict) -> list[dict]:
    return [
        {"method": name, "step": kind} | summary(*measured)
        for (name, kind), measured in found.items()
    ]


def make_model(shape: Shape, device: str) -> torch.nn.Module:
    with torch.device(device):
        if shape.config is None:
            config = MllamaConfig(vision_config={"image_size": 560})
            model = MllamaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
            for name, parameter in model.named_parameters():
                if name.endswith("_gate"):
                    parameter.data.fill_(0.5)  # closed gates give the vision tower no gradient
        else:
            model = LlamaForCausalLM._from_config(LlamaConfig(**shape.config), dtype=torch.bfloat16)
    model.requires_grad_(False).train()
    if shape.checkpointing:
        # preserve_rng_state: nothing random is computed again, and a capture forbids it
        checkpoint_activations(model, use_reentrant=False, preserve_rng_state=False)
    model.config.get_text_config().use_cache = False
    return model


def make_batches(shape: Shape, options: SpeedRun) -> list[dict[str, torch.Tensor]]:
    return [_batch(shape, options.device) for _ in range(4)]


def _batch(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    vocabulary = 128 if shape.config is None else shape.config["vocab_size"]
    tokens = torch.randint(0, vocabulary, (shape.rows, shape.tokens), device=device)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if shape.config is None:
        rows, tiles = shape.rows, 4
        images = torch.randn(rows, 1, tiles, 3, 560, 560, device=device, dtype=torch.bfloat16)
        batch |= {
            "pixel_values": images,
            "aspect_ratio_ids": torch.full((rows, 1), 6, device=device),  # 2 x 2 tiles
            "aspect_ratio_mask": torch.ones(rows, 1, tiles, dtype=torch.long, device=device),
            "cross_attention_mask": torch.ones(
                rows, shape.tokens, 1, tiles, dtype=torch.long, device=device
            ),
        }
    return batch


def measure(step, batches: list, options: SpeedRun) -> dict:
    """Median and quartiles of the milliseconds of a step, and peak memory (GiB)."""
    return summary(*timed(step, batches, options))


def summary(times: list[float], peak: float | None) -> dict:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2), "peak_gib": peak}


def timed(step, batches: list, options: SpeedRun) -> tuple[list[float], float | None]:
    """Milliseconds between the starts of steps, without waiting in between, as in a training; the
    peak memory (GiB)."""
    cuda = options.device == "cuda"
    if cuda:  # a graph takes its memory when it is captured, in the first step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for batch in batches[:3]:
        step(batch)
    clock = _DeviceClock() if cuda else _HostClock()
    for i in range(options.steps):
        clock.mark()
        step(batches[i % len(batches)])
    times = clock.milliseconds()
    return times, round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None


class _HostClock:
    def __init__(self):
        self.marks = []

    def mark(self):
        self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between the marks, and from the last one to now."""
        self.mark()
        return [1000 * (end - start) for start, end in pairwise(self.marks)]


class _DeviceClock(_HostClock):
    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def milliseconds(self) -> list[float]:
        self.mark()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(self.marks)]


def _record(options: SpeedRun, results: list[dict]) -> dict:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    about = {name: getattr(options, name) for name in ("shape", "ranks", "steps", "rounds")}
    return {**about, "device": device, "torch": torch.__version__, "results": results}


def _table(options: SpeedRun, results: list[dict]) -> Table:
    table = Table(title=f"{options.shape}: milliseconds a step, median (quartiles)")
    table.add_column("method")
    for column in ("step", "ms", "quartiles", "over PEFT", "peak GiB"):
        table.add_column(column, justify="right")
    plain = {r["method"]: r["ms"] for r in results if r["step"] == "weights"}.get("peft_bf16")
    for result in results:
        table.add_row(
            result["method"],
            result["step"],
            f"{result['ms']:.1f}",
            f"{result['q1']:.1f}-{result['q3']:.1f}",
            "-" if plain is None else f"{result['ms'] / plain:.2f}",
            "-" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}",
        )
    return table


if __name__ == "__main__":
    run(main, SpeedRun)
