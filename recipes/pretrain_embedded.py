"""Makes the embedded default: pretrains a small Mllama on easy-vqa, writes model and data.
Not here: loading either of them (darts_lora/lora/models.py, data/loaders.py), nor any search.

python recipes/pretrain_embedded.py                          # into darts_lora/data/embedded
python recipes/pretrain_embedded.py --output_dir runs/embedded --max_steps 20
"""

import importlib.metadata
import io
import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader, WeightedRandomSampler
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    get_scheduler,
    set_seed,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from darts_lora.base.bounds import check_bounds
from darts_lora.base.files import check_writable, write_text, write_whole
from darts_lora.base.options import run
from darts_lora.data.collator import Collator
from darts_lora.evaluate import score
from darts_lora.lora.models import EMBEDDED
from darts_lora.run.graphs import Graphed

SPECIAL = ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|user|>", "<|assistant|>")
IMAGE_TOKEN = "<|image|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IMAGE_SIZE = 48  # the processor scales the 64 pixels of easy-vqa down: half the patches


@dataclass
class PretrainRun:
    """How the embedded model is pretrained, and where it goes."""

    output_dir: str = str(EMBEDDED)
    """Folder for model/ and data/."""
    max_steps: int = 6000
    """Optimizer steps."""
    batch_size: int = 64
    """Questions of a batch."""
    learning_rate: float = 2e-3
    """Peak learning rate (AdamW)."""
    seed: int = 0
    """Seed of the weights, of the batches and of the questions that the data set keeps."""
    num_workers: int = 2
    """Processes that prepare batches; 0: none."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"seed": 0, "num_workers": 0},
            above={"max_steps": 0, "batch_size": 0, "learning_rate": 0.0},
        )


def main(options: PretrainRun) -> None:
    """Pretrain the embedded model on easy-vqa's images as they are; write the adaptation data,
    the same kinds of questions about images that look otherwise."""
    check_writable(options.output_dir)
    folder = Path(options.output_dir)
    rows = {split: read_rows(split) for split in ("train", "test")}
    write_data(folder / "data", {split: adapted(rows[split], options.seed) for split in rows})
    set_seed(options.seed)
    processor = build_processor(rows["train"])
    model = build_model(processor)
    collator = Collator(processor)
    pretrain(model, collator, rows["train"], options)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    result = score(model, choose_rows(rows["test"], options.seed), collator, name="test")
    print(f"{model.num_parameters():,} parameters, test images as in pretraining: {result}")


def pretrain(
    model: MllamaForConditionalGeneration,
    collator: Collator,
    rows: list[dict],
    options: PretrainRun,
    *,
    autocast: bool = False,
) -> None:
    """Train all weights that are not frozen on batches with as many questions of one kind as of
    another, on a GPU by CUDA graphs.

    autocast: to bfloat16 on a GPU.
    """
    accelerator = Accelerator()
    low = autocast and accelerator.device.type == "cuda"
    counts = Counter(map(kind, rows))
    sampler = WeightedRandomSampler(
        [1 / counts[kind(row)] for row in rows],
        options.max_steps * options.batch_size,
        generator=torch.Generator().manual_seed(options.seed),
    )
    loader = DataLoader(
        rows,
        options.batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=options.num_workers,
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, options.max_steps // 20, options.max_steps)
    model.to(accelerator.device).train()

    def gradients(batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast(
            accelerator.device.type, torch.bfloat16, enabled=low, cache_enabled=False
        ):
            loss = model(**batch).loss
        return loss.detach(), list(torch.autograd.grad(loss, weights, allow_unused=True))

    step = Graphed(gradients) if accelerator.device.type == "cuda" else gradients
    for batch in (bar := tqdm(loader, "pretrain", unit="step")):
        loss, found = step({key: value.to(accelerator.device) for key, value in batch.items()})
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        if scheduler.last_epoch % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


def read_rows(split: str) -> list[dict]:
    """All questions of easy-vqa's split as rows: messages, image (PIL, RGB)."""
    train = split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    images = {key: PILImage.open(path).convert("RGB") for key, path in sorted(paths.items())}
    return [
        {"image": images[image], "image_id": image, "messages": turns(question, answer)}
        for question, answer, image in zip(*questions, strict=True)
    ]


def turns(question: str, answer: str) -> list[dict]:
    """A row's messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def adapted(rows: list[dict], seed: int) -> list[dict]:
    """The adaptation data: a few questions about each image, in negative colours."""
    kept = choose_rows(rows, seed, per_image=2)
    return [{**row, "image": ImageOps.invert(row["image"])} for row in kept]


def write_data(folder: Path, rows: dict[str, list[dict]]) -> None:
    """<split>.parquet: each row's image (PNG) and messages; easy-vqa's licence."""
    os.makedirs(folder, exist_ok=True)
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"image": Image(), "messages": [message]})
    for split, of_split in rows.items():
        table = [{"image": _png(r["image"]), "messages": r["messages"]} for r in of_split]
        data = Dataset.from_list(table, features=features)
        write_whole(folder / f"{split}.parquet", data.to_parquet)
    licence = importlib.metadata.distribution("easy-vqa").read_text("LICENSE")
    write_text(folder / "LICENSE", f"Questions and images of easy-vqa 1.0:\n\n{licence}")


def choose_rows(rows: list[dict], seed: int, per_image: int = 1) -> list[dict]:
    """`per_image` questions of every image, each kind of question as often as another."""
    generator = random.Random(seed)
    chosen = []
    for of_image in by_image(rows):
        kinds: dict[str, list[dict]] = {}
        for row in of_image:
            kinds.setdefault(kind(row), []).append(row)
        for name in generator.sample(sorted(kinds), min(per_image, len(kinds))):
            chosen.append(generator.choice(kinds[name]))
    return chosen


def by_image(rows: list[dict]) -> Iterable[list[dict]]:
    """The rows of each image."""
    images: dict[int, list[dict]] = {}
    for row in rows:
        images.setdefault(row["image_id"], []).append(row)
    return images.values()


def said(row: dict) -> tuple[str, str]:
    """Question and answer."""
    question, answer = (turn["content"] for turn in row["messages"])
    return question, answer


def kind(row: dict) -> str:
    """What a question asks for: colour, shape, or yes/no."""
    question, answer = said(row)
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if "color" in question else "shape"


def _png(image: PILImage.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def build_processor(rows: list[dict]) -> MllamaProcessor:
    """A word-level tokenizer over the questions' and answers' words, Mllama's image processor."""
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    # like Llama's: the image token is the last, it has an input embedding and no output
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<|unknown|>", *words, IMAGE_TOKEN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token="<|unknown|>",
        additional_special_tokens=[*SPECIAL[3:], IMAGE_TOKEN],
        model_max_length=64,
    )
    images = MllamaImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        max_image_tiles=1,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return MllamaProcessor(images, wrapped, chat_template=CHAT_TEMPLATE)


def build_model(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    """A random Mllama of half a million parameters, its cross-attention gates open."""
    tokenizer = processor.tokenizer
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "attention_heads": 4,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "intermediate_layers_indices": [1],
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "vision_output_dim": 128,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "initializer_range": 0.08,
    }
    text = {
        "vocab_size": len(tokenizer) - 1,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.08,
    }
    config = MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id
    )
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            torch.nn.init.constant_(parameter, 0.5)  # at 0, the start, no gradient reaches vision
    model.generation_config = GenerationConfig.from_model_config(config.text_config)
    return model


if __name__ == "__main__":
    run(main, PretrainRun)
