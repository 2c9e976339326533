"""Loading models and processors by the Auto classes, and what cannot be loaded.
Not here: what a processor makes of a row (test_collator.py)."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from darts_lora.config import ModelConfig
from darts_lora.errors import InputError
from darts_lora.models import auto_class, load_model, load_processor
from small_models import vision_model, vision_processor


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Folder of a tiny Llama with a tokenizer that has no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_the_embedded_default_is_an_image_text_to_text_model():
    model, processor = load_model(ModelConfig()), load_processor(ModelConfig())
    assert isinstance(model, MllamaForConditionalGeneration)
    assert not model.training and not model.is_gradient_checkpointing
    assert processor.image_processor is not None and processor.tokenizer.pad_token is not None


def test_a_vision_language_model_from_a_folder(vision_folder):
    model, processor = (
        load_model(ModelConfig(vision_folder)),
        load_processor(ModelConfig(vision_folder)),
    )
    assert isinstance(model, MllamaForConditionalGeneration) and not model.training
    assert processor.image_processor is not None and processor.tokenizer.pad_token == "<pad>"
    reference = vision_model(vision_processor()).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_options_reach_the_model(vision_folder, recompute):
    config = ModelConfig(vision_folder, dtype="bfloat16", gradient_checkpointing=recompute)
    model = load_model(config)
    assert model.dtype == torch.bfloat16
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers and all(m.gradient_checkpointing == recompute for m in layers)
    assert model.config.text_config.use_cache != recompute


def test_a_text_model_from_a_folder(text_model):
    config = ModelConfig(text_model)
    assert load_model(config).config.model_type == "llama"
    tokenizer = load_processor(config)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MllamaConfig(), AutoModelForImageTextToText),
        (LlavaConfig(), AutoModelForImageTextToText),
        (LlamaConfig(), AutoModelForCausalLM),
    ],
)
def test_the_configuration_decides_the_auto_class(config, expected):
    assert auto_class(config) is expected


def test_a_name_that_is_no_model(tmp_path):
    for load in (load_model, load_processor):
        with pytest.raises(InputError, match=r"model_name_or_path='/no/such.*no local folder"):
            load(ModelConfig("/no/such/model"))
    with pytest.raises(InputError, match=r"cannot be loaded .*give a hub name, a folder"):
        load_model(ModelConfig(str(tmp_path)))


def test_a_damaged_weights_file(text_model, tmp_path):
    source = load_model(ModelConfig(text_model))
    source.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"\x00" * 20, weights[:-50], b""):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(ModelConfig(str(tmp_path)))


def test_weights_of_other_shapes(text_model, tmp_path):
    load_model(ModelConfig(text_model)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 12}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no such type"}'])
def test_a_damaged_configuration(text_model, tmp_path, content):
    load_model(ModelConfig(text_model)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)))
