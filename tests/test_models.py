"""Loading models and processors by the Auto classes."""

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


def test_options_reach_the_model():
    model = load_model(ModelConfig(dtype="bfloat16", gradient_checkpointing=True))
    assert model.dtype == torch.bfloat16
    assert model.is_gradient_checkpointing and not model.config.use_cache


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
    with pytest.raises(InputError, match="cannot be loaded .*give a hub name, a folder"):
        load_model(ModelConfig(str(tmp_path)))


def test_a_damaged_weights_file(text_model, tmp_path):
    source = load_model(ModelConfig(text_model))
    source.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)))
