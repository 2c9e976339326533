"""Llama-3.2-11B-Vision's shape with random weights, and rows for it: its memory and speed.
Not here: the search that is measured (recipes/search.py).

python recipes/benchmark/random_mllama.py                        # runs/mllama-11b/{model,data}
accelerate launch recipes/search.py --config recipes/configs/llama_3_2_11b_vision_ocrvqa.yaml \
    --model_name_or_path runs/mllama-11b/model \
    --dataset runs/mllama-11b/data --dataset_config null \
    --max_steps 20 --search_fraction 1 --gradient_accumulation_steps 1 \
    --logging_steps 1 --save_steps 0
"""

import os
from dataclasses import dataclass

import numpy
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from darts_lora.base.files import check_writable
from darts_lora.base.options import run
from darts_lora.config import ModelConfig
from darts_lora.data.collator import Collator
from darts_lora.lora.models import load_processor


@dataclass
class RandomMllama:
    """What is written."""

    output_dir: str = "runs/mllama-11b"
    """Folder for model/ (21 GB) and data/."""
    tiny: bool = False
    """Two narrow layers instead of the 11B shape: to try the script."""
    rows: int = 32
    """Rows of data, each with an image of four tiles (count)."""
    tokens: int = 512
    """Length of a row (tokens)."""
    seed: int = 0
    """Seed of weights and data."""


def main(options: RandomMllama) -> None:
    """Write a random Mllama of the 11B shape with its processor, and rows of the wanted length."""
    check_writable(options.output_dir)
    torch.manual_seed(options.seed)
    processor = load_processor(ModelConfig())  # the embedded model's words
    size = 32 if options.tiny else 560
    processor.image_processor = MllamaImageProcessorPil(
        size={"height": size, "width": size}, max_image_tiles=4
    )
    folder = os.path.join(options.output_dir, "model")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MllamaForConditionalGeneration._from_config(
            _config(processor, size, options.tiny), dtype=torch.bfloat16
        )
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)  # closed gates would give the vision tower no gradient
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    rows = _rows(processor, 2 * size, options)
    rows.to_parquet(os.path.join(options.output_dir, "data", "train.parquet"))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters in {folder}, {len(rows)} rows of {options.tokens} tokens")


def _config(processor, size: int, tiny: bool) -> MllamaConfig:
    tokenizer = processor.tokenizer
    text = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"image_size": size}
    if tiny:
        narrow = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
        text |= {**narrow, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
        text |= {"cross_attention_layers": [1]}
        vision |= {**narrow, "num_global_layers": 1, "attention_heads": 4, "patch_size": 16}
        vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 256}
    return MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id
    )


def _rows(processor, side: int, options: RandomMllama) -> Dataset:
    generator = numpy.random.default_rng(options.seed)
    special = set(processor.tokenizer.all_special_tokens)
    words = [word for word in processor.tokenizer.get_vocab() if word.isalpha()]
    words = [word for word in words if word not in special]

    def row(length: int) -> dict:
        turns = [" ".join(generator.choice(words, n)) for n in (length - 16, 16)]
        noise = generator.integers(0, 256, (side, side, 3), dtype=numpy.uint8)
        return {"prompt": turns[0], "completion": turns[1], "image": PILImage.fromarray(noise)}

    first = row(options.tokens)
    batch = Collator(processor, max_length=2 * options.tokens + 100)([first])
    extra = batch["input_ids"].shape[1] - options.tokens
    rows = [row(options.tokens - extra) for _ in range(options.rows)]
    string = Value("string")
    return Dataset.from_list(
        rows, Features({"prompt": string, "completion": string, "image": Image()})
    )


if __name__ == "__main__":
    run(main, RandomMllama)
