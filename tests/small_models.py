"""Small models that several test files search or finetune, and rows for the vision-language one.
Not here: tests, nor the fixtures that write them into a folder (conftest.py)."""

import contextlib

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil


class Residual(nn.Module):
    """`depth` residual layers of one width: blocks.0 ... blocks.{depth - 1}."""

    def __init__(self, width: int = 16, depth: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def residual(width: int = 16, depth: int = 4, seed: int = 0) -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual(width, depth)


def randomise(supernet, seed: int = 0) -> None:
    """Give B and alpha values that a search could have given them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in supernet.layers.values():
            for parameter in (layer.lora_B, layer.alpha):
                parameter.normal_(generator=generator)


@contextlib.contextmanager
def cut_to(supernet, ranks: dict[str, int]):
    """Inside, each layer is its mean mixture cut to its rank, as a genotype's adapter is."""
    columns = torch.arange(supernet.mean_gates().shape[1])
    gates = [supernet.config.scaling * (columns < ranks[name]) for name in supernet.layers]
    with supernet.in_directions(), supernet.probing(lambda rows: torch.stack(gates)):
        yield


SPECIAL = ["<pad>", "<s>", "</s>", "[user]", "[model]", "<|image|>"]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
WORDS = ["which", "colour", "is", "it", "please", *COLOURS, "very"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ 'model' if m.role == 'assistant' else 'user' }}]"
    "{% for part in m.content %}{% if m.role == 'assistant' %}{% generation %}{{ part.text }}"
    "{{ eos_token }}{% endgeneration %}{% elif part.type == 'image' %}<|image|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)


def word_tokenizer(words: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    """A word is a token, numbered by its place; `special` are those beside <pad>, <s> and </s>."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special,
    )  # fmt: skip


def make_tokenizer(template: str | None, words: str = "a b c d e f") -> PreTrainedTokenizerFast:
    """A tokenizer of these words, numbered from 6 on behind its own, with a chat template."""
    special = ["<image>", "[U]", "[A]"]
    made = word_tokenizer(["<pad>", "<s>", "</s>", *special, *words.split()], special)
    made.chat_template = template
    return made


def vision_processor() -> MllamaProcessor:
    """Word-level tokenizer; images of 16 x 16 pixels in one or two tiles."""
    wrapped = word_tokenizer([*WORDS, *SPECIAL], SPECIAL[3:])
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    return MllamaProcessor(images, wrapped, chat_template=TEMPLATE)


def vision_model(processor: MllamaProcessor, seed: int = 0) -> MllamaForConditionalGeneration:
    """A random Mllama whose answers depend on the image: large weights, open gates."""
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    vision = {
        **sizes, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 32,
        "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = {
        **sizes, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "cross_attention_layers": [1], "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
    return model.eval()


def vision_rows(count: int) -> Dataset:
    """Coloured images of three aspect ratios, with questions and answers of two lengths."""
    rows = []
    for i in range(count):
        name, colour = list(COLOURS.items())[i % 3]
        question = ("colour", "which colour is it please")[i // 2 % 2]
        answer = name if i % 5 else f"very {name}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        image = PILImage.new("RGB", ((16, 16), (32, 16), (16, 32))[i // 4 % 3], colour)
        rows.append({"messages": turns, "image": image})
    turn = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, Features({"messages": [turn], "image": Image()}))


def branch_weights(layer, rank):
    """(A, B) of one candidate of a layer of rank branches."""
    columns = layer.membership[:, layer.ranks.index(rank)].bool()
    return layer.lora_A[..., columns, :], layer.lora_B[..., columns]
