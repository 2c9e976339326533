"""Tiny random mixtures of experts, whose experts are 3-D parameters. Not here: tests."""

import torch
import transformers as t
from families import tokenizer

SIZE = {
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
    "mixtral": lambda: t.MixtralConfig(**SIZE, num_local_experts=4),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**SIZE, **QWEN),
    "deepseek_v3": lambda: t.DeepseekV3Config(**SIZE, **DEEPSEEK),
    "gpt_oss": lambda: t.GptOssConfig(**SIZE, num_local_experts=4, head_dim=8),
}


def make_moe(family: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(MOE[family]()).eval()


def moe_family(name: str):
    """A maker for families.make_family."""

    def make(folder: str) -> None:
        make_moe(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    return make


MOE_FAMILIES = {name: moe_family(name) for name in MOE}
