"""Which part of a model a layer is of, where others have no such towers; whether a model that is to
generate sees later tokens, and would see the answer while it learns it.
Not here: families that people have (recipes/test_families.py), and heads (test_targets.py)."""

import importlib

import pytest
import torch
import transformers as t
from families import TEXT, make_family, text_family, tokenizer

from darts_lora.base.errors import InputError
from darts_lora.config import ModelConfig
from darts_lora.lora.causality import check_causal
from darts_lora.lora.models import load_model, load_model_config
from darts_lora.lora.parts import PARTS, model_parts

# type -> part -> prefixes of the layers' names; all other layers are of the connector
EXPECTED = {
    "git": {"vision": "git.image_encoder.vision_model.encoder", "language": "git.encoder output"},
    "t5gemma2": {
        "vision": "model.encoder.vision_tower.encoder",
        "language": "model.encoder.text_model model.decoder lm_head",
    },
    "pp_formulanet": {
        "vision": "model.encoder.layers",
        "language": "model.decoder.layers.0.self_attn model.decoder.layers.1.self_attn "
        "model.decoder.layers.0.fc model.decoder.layers.1.fc lm_head",
    },
    "video_llava": {
        "vision": "model.video_tower.encoder model.image_tower.encoder",
        "language": "model.language_model lm_head",
    },
    "deepseek_vl_hybrid": {
        "vision": "model.vision_model.encoder model.high_res_vision_model.vision_encoder",
        "language": "model.language_model lm_head",
    },
    "vision-encoder-decoder": {"vision": "encoder.layers", "language": "decoder"},
    "qwen2_5_omni_thinker": {
        "vision": "model.visual.blocks",
        "audio": "model.audio_tower.layers",
        "language": "model.language_model lm_head",
    },
    "idefics2": {"vision": "model.vision_model", "language": "model.text_model lm_head"},
    "blip-2": {"vision": "vision_model.encoder", "language": "language_model"},
}


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("recipes/benchmark")
        yield importlib.import_module("tiny_models")


@pytest.mark.parametrize("kind", EXPECTED)
def test_parts_follow_the_models_own_accessors(tiny, kind):
    with torch.device("meta"):
        config = tiny.tiny_config(kind, 32, None)
        model = t.AutoModelForImageTextToText.from_config(config)
    parts = model_parts(model)
    assert set(parts.values()) - {"connector"} == set(EXPECTED[kind]) <= set(PARTS)
    for name, part in parts.items():
        wanted = "connector"
        for own, prefixes in EXPECTED[kind].items():
            wanted = own if name.startswith(tuple(prefixes.split())) else wanted
        if "crossattention" in name or "encoder_attn" in name or "merger" in name:
            wanted = "connector"
        assert part == wanted, name


SIZES = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}


def masked(config_class, **options):
    """A model that was trained to fill in words, as published: it attends both ways."""
    return text_family(config_class, t.AutoModelForMaskedLM, **options)


def encoder_decoder(folder):
    config = t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    t.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("config_class", [t.BertConfig, t.RobertaConfig, t.ElectraConfig])
def test_a_model_that_attends_both_ways_is_refused(tmp_path, config_class):
    make_family(masked(config_class), str(tmp_path))
    with pytest.raises(InputError, match=r"attends to later tokens, .*or task=classification$"):
        load_model(ModelConfig(str(tmp_path)))
    load_model(ModelConfig(str(tmp_path), task="classification", num_labels=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoders_are_not(tmp_path, dtype):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    families = {
        "llama": text_family(t.LlamaConfig),
        "experts": text_family(t.Qwen3MoeConfig, head_dim=8, **experts),
        "bert": text_family(t.BertConfig, is_decoder=True),
    }
    for name, make in families.items():
        folder = make_family(make, str(tmp_path / name))
        load_model(ModelConfig(folder, dtype=dtype))


def test_an_encoder_with_a_decoder_is_refused_before_its_weights_are_read(tmp_path):
    make_family(encoder_decoder, str(tmp_path))
    with pytest.raises(InputError, match="t5 has an encoder and a decoder, which are not supp"):
        load_model_config(ModelConfig(str(tmp_path)))
    load_model_config(ModelConfig(str(tmp_path), task="classification"))


def test_a_model_that_cannot_be_probed_is_told_of(tmp_path):
    model = load_model(ModelConfig(make_family(text_family(t.LlamaConfig), str(tmp_path))))
    model.forward = lambda **inputs: 1 / 0
    with pytest.warns(UserWarning, match="cannot tell whether it attends to later tokens"):
        check_causal(model, "it")
