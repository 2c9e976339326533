"""Which part of a model a layer is of, in models whose towers are where others have none.
Not here: families that people have, and heads (test_targets.py)."""

import importlib

import pytest
import torch
import transformers as t

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
