"""Models with random weights and batches for them: the shapes that speed_run.py can time.
Not here: any timing."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from darts_lora.lora.models import checkpoint_activations

TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass
class Shape:
    """A model's configuration, and a batch for it."""

    config: dict | None
    rows: int
    tokens: int
    checkpointing: bool = False


SHAPES = {
    "tiny": Shape(TINY, 2, 32),
    # None: the default MllamaConfig is the 11B model's
    "mllama_11b_batch4": Shape(None, 4, 512, checkpointing=True),
}


def make_model(shape: Shape, device: str) -> torch.nn.Module:
    with torch.device(device):
        if shape.config is None:
            config = MllamaConfig(vision_config={"image_size": 560})
            model = MllamaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
            for name, parameter in model.named_parameters():
                if name.endswith("_gate"):
                    parameter.data.fill_(0.5)  # closed gates give the vision tower no gradient
        else:
            model = LlamaForCausalLM._from_config(LlamaConfig(**shape.config), dtype=torch.bfloat16)
    model.requires_grad_(False).train()
    if shape.checkpointing:
        # preserve_rng_state: nothing random is computed again, and a capture forbids it
        checkpoint_activations(model, use_reentrant=False, preserve_rng_state=False)
    model.config.get_text_config().use_cache = False
    return model


def make_batch(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    vocabulary = 128 if shape.config is None else shape.config["vocab_size"]
    tokens = torch.randint(0, vocabulary, (shape.rows, shape.tokens), device=device)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if shape.config is None:
        rows, tiles = shape.rows, 4
        images = torch.randn(rows, 1, tiles, 3, 560, 560, device=device, dtype=torch.bfloat16)
        batch |= {
            "pixel_values": images,
            "aspect_ratio_ids": torch.full((rows, 1), 6, device=device),  # 2 x 2 tiles
            "aspect_ratio_mask": torch.ones(rows, 1, tiles, dtype=torch.long, device=device),
            "cross_attention_mask": torch.ones(
                rows, shape.tokens, 1, tiles, dtype=torch.long, device=device
            ),
        }
    return batch
