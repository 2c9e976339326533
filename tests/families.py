"""Tiny random models of the families that people have, in folders as save_pretrained writes them.
Not here: the tests (recipes/test_families.py)."""

from importlib import import_module

import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["which", "colour", "is", "it", "please", "red", "green", "blue", "very", "user", "model"]
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += [
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "[CLS]",
    "[SEP]",
]
SPECIAL += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)] + ["\n", "\n\n"]
TEMPLATE = (
    "{{{{ bos_token }}}}{{% for m in messages %}}{{{{ m.role }}}} {{% if m.content is string %}}"
    "{{{{ m.content }}}}{{% else %}}{{% for part in m.content %}}{{% if part.type == 'image' %}}"
    "{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}} "
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}assistant {{% endif %}}"
)
TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    "bos_token_id": 13, "eos_token_id": 14, "pad_token_id": 12, "initializer_range": 0.3,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def tokenizer(image: str = "<image>") -> t.PreTrainedTokenizerFast:
    """Word level, 64 tokens at most, with a chat template that does not mark answers."""
    words = {word: i for i, word in enumerate([*WORDS, "assistant", *SPECIAL])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {
        "image_token": image, "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "</s>", "boi_token": "<|vision_start|>",
        "eoi_token": "<|vision_end|>",
    }  # fmt: skip
    return t.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        cls_token="[CLS]", sep_token="[SEP]", chat_template=TEMPLATE.format(image=image),
        additional_special_tokens=SPECIAL[3:], extra_special_tokens=named,
    )  # fmt: skip


def text_family(config_class: type, model_class: type = t.AutoModelForCausalLM, **options):
    def make(folder: str) -> None:
        wanted = {**TEXT, **options}
        if config_class is t.GPT2Config:
            wanted = {
                "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512,
                "bos_token_id": 13, "eos_token_id": 14, "initializer_range": 0.3,
            }  # fmt: skip
        model_class.from_config(config_class(**wanted)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    return make


def llava(folder: str) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = tokenizer()
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    t.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    t.LlavaProcessor(
        images, text, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=text.chat_template,
    ).save_pretrained(folder)  # fmt: skip


def idefics(prefix: str):
    """Idefics3, and SmolVLM, which takes videos as well."""

    def make(folder: str) -> None:
        name, text = prefix.lower(), tokenizer()
        config = getattr(t, f"{prefix}Config")(
            vision_config={**VISION, "image_size": 32},
            text_config=t.LlamaConfig(**TEXT),
            image_token_id=text.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=12,
        )
        getattr(t, f"{prefix}ForConditionalGeneration")(config).save_pretrained(folder)
        pil = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
        size = {"longest_edge": 32}
        images = getattr(pil, f"{prefix}ImageProcessorPil")(size=size, max_image_size=size)
        videos = [t.SmolVLMVideoProcessor()] if prefix == "SmolVLM" else []
        getattr(t, f"{prefix}Processor")(
            images, text, *videos, image_seq_len=4, chat_template=text.chat_template
        ).save_pretrained(folder)

    return make


def gemma3(folder: str) -> None:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    text = tokenizer()
    text.chat_template = TEMPLATE.format(image=text.boi_token)
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION),
        text_config=t.Gemma3TextConfig(**TEXT, head_dim=8),
        mm_tokens_per_image=4,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        boi_token_index=text.boi_token_id,
        eoi_token_index=text.eoi_token_id,
    )
    model = t.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # 0, or no image would be seen
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    model.save_pretrained(folder)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    t.Gemma3Processor(
        images, text, image_seq_length=4, chat_template=text.chat_template
    ).save_pretrained(folder)


def qwen_vl(version: str):
    def make(folder: str) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        mark = "<|vision_start|><|image_pad|><|vision_end|>"
        text = tokenizer("<|image_pad|>")
        text.chat_template = TEMPLATE.format(image=mark)
        vision = {
            "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }  # fmt: skip
        if version == "2":
            vision |= {"embed_dim": 16, "hidden_size": 16}
        else:
            vision |= {
                "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16,
                "window_size": 16, "fullatt_block_indexes": [1],
            }  # fmt: skip
        ids = {
            f"{name}_token_id": text.convert_tokens_to_ids(token)
            for name, token in {
                "image": "<|image_pad|>", "video": "<|video_pad|>",
                "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
            }.items()
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        prefix = "Qwen2VL" if version == "2" else "Qwen2_5_VL"
        config = getattr(t, f"{prefix}Config")(
            vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **ids
        )
        getattr(t, f"{prefix}ForConditionalGeneration")(config).save_pretrained(folder)
        images = Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2,
            size={"shortest_edge": 64, "longest_edge": 1024},
        )  # fmt: skip
        getattr(t, f"{prefix}Processor")(
            images, text, t.Qwen2VLVideoProcessor(), chat_template=text.chat_template
        ).save_pretrained(folder)

    return make


def bert(folder: str) -> None:
    config = t.BertConfig(
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}, num_labels=3
    )
    t.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def deberta(folder: str) -> None:
    """As DeBERTa is published: without the pooler and the head of a classifier."""
    config = t.DebertaV2Config(**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"})
    t.DebertaV2ForMaskedLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


TEXT_FAMILIES = {
    "llama": text_family(t.LlamaConfig),
    "qwen2": text_family(t.Qwen2Config),
    "gemma": text_family(t.GemmaConfig, head_dim=8),
    "mistral": text_family(t.MistralConfig),
    "gpt2": text_family(t.GPT2Config),
}
IMAGE_FAMILIES = {"llava": llava, "idefics3": idefics("Idefics3"), "gemma3": gemma3}
TORCHVISION_FAMILIES = {
    "smolvlm": idefics("SmolVLM"),
    "qwen2_vl": qwen_vl("2"),
    "qwen2_5_vl": qwen_vl("2.5"),
}


MOE_SIZE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": 13, "eos_token_id": 14, "pad_token_id": 12,
    "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 8, "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}
# dense and shared layers beside the experts (deepseek_v3), experts stored transposed (gpt_oss)
MOE = {
    "mixtral": lambda: t.MixtralConfig(**MOE_SIZE, num_local_experts=4),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**MOE_SIZE, **QWEN),
    "deepseek_v3": lambda: t.DeepseekV3Config(**MOE_SIZE, **DEEPSEEK),
    "gpt_oss": lambda: t.GptOssConfig(**MOE_SIZE, num_local_experts=4, head_dim=8),
}


def make_moe(family: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(MOE[family]()).eval()


def moe_family(name: str):
    """A maker for make_family."""

    def make(folder: str) -> None:
        make_moe(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    return make


MOE_FAMILIES = {name: moe_family(name) for name in MOE}


def make_family(make, folder: str) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make(folder)
    return folder
