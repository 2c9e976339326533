"""PEFT's own ways to choose ranks: AdaLoRA and EVA.
Not here: all others (quality_methods.py)."""

from __future__ import annotations

import contextlib
import math

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model
from peft.helpers import disable_input_dtype_casting
from quality_allocation import parameters, scaled_to_budget
from quality_rows import model_inputs, supervised_loss
from quality_setting import Found, Setting
from torch import Tensor, nn
from torch.utils.data import DataLoader

from darts_lora.data.collator import IGNORED
from darts_lora.run.graphs import Graphed


def adalora(setting: Setting) -> Found:
    """PEFT's AdaLoRA from 1.5 times the budget's rank, as in its paper (arXiv 2303.10512);
    the ranks it ends with, scaled to the budget: it counts singular values, not parameters."""
    names, steps = list(setting.retrainer.shapes), setting.adalora_steps
    start = math.ceil(1.5 * setting.budget_rank)
    config = AdaLoraConfig(
        target_modules=names,
        init_r=start,
        target_r=setting.budget_rank,
        lora_alpha=setting.retrainer.scaling * start,
        tinit=steps // 10,
        tfinal=steps * 3 // 10,
        deltaT=max(1, min(10, steps // 40)),
        total_step=steps,
    )
    torch.manual_seed(setting.seed)
    model = get_peft_model(setting.retrainer.model, config)
    try:
        _train_adalora(model, setting, steps)
        with half_precision(model):
            own_loss = setting.judge(model) if setting.judge else None
    finally:
        model.unload()
    own = {name: sum(config.rank_pattern[f"{name}.lora_E.default"]) for name in names}
    shapes, capacity = setting.retrainer.shapes, setting.retrainer.capacity
    ranks = scaled_to_budget(own, shapes, capacity, setting.budget)
    notes = {"own_parameters": parameters(own, shapes), "own_test_loss": own_loss}
    return Found(ranks, notes | {"own_ranks": list(own.values())})


def _train_adalora(model: nn.Module, setting: Setting, steps: int) -> None:
    """AdamW with the retraining's clipping and a cosine; gradients as a CUDA graph on a GPU."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=setting.rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def gradients(batch):
        with half_precision(model):  # base_model adds the term of orthogonality, PeftModel does not
            loss = supervised_loss(model.base_model, batch)
        return loss.detach(), list(torch.autograd.grad(loss, weights, materialize_grads=True))

    on_gpu = setting.retrainer.device.type == "cuda"
    step = Graphed(gradients, pool=torch.cuda.graph_pool_handle()) if on_gpu else gradients
    model.train()
    for number, batch in enumerate(setting.batches(steps)):
        for weight, gradient in zip(weights, step(batch)[1], strict=True):
            weight.grad = gradient
        if setting.retrainer.training.max_grad_norm:
            nn.utils.clip_grad_norm_(weights, setting.retrainer.training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        model.base_model.update_and_allocate(number)


@contextlib.contextmanager
def half_precision(model: nn.Module):
    """PEFT's float32 adapters on a base in 16 bits, as finetune.py trains them."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    with (
        disable_input_dtype_casting(model, active=half),
        torch.autocast(model.device.type, model.dtype if half else None, enabled=half),
    ):
        yield


def eva_components(setting: Setting) -> dict[str, Tensor]:
    """Layer -> right singular vectors (rank, in) of its inputs by PEFT's EVA, its rank raised until
    the redistributed ranks reach the budget: EVA counts singular values and not parameters."""
    shapes = setting.retrainer.shapes
    chosen = list(setting.rows.batches(setting.indices, setting.batch_size, setting.seed))
    loader = DataLoader(chosen, batch_size=None, collate_fn=setting.rows.batch)
    most = min(min(shape) for shape in shapes.values()) // 2  # EVA looks at twice the rank
    for rank in range(min(setting.budget_rank, most), most + 1):
        config = LoraConfig(r=rank, target_modules=list(shapes), init_lora_weights="eva",
                            eva_config=EvaConfig(rho=2.0))  # fmt: skip
        components = get_eva_state_dict(
            setting.retrainer.model,
            loader,
            config,
            forward_fn=lambda model, batch: model(**model_inputs(batch), use_cache=False),
            prepare_model_inputs_fn=_answer_mask,
            prepare_layer_inputs_fn=_inputs_of_answers,
            show_progress_bar=False,
        )
        ranks = {name: len(components[name]) for name in shapes}
        if parameters(ranks, shapes) >= setting.budget:
            break
    return components


def _answer_mask(batch: dict[str, Tensor], _) -> Tensor:
    """Tokens that EVA looks at by default: those that are learnt."""
    return batch["labels"] != IGNORED


def _inputs_of_answers(x: Tensor | tuple, mask: Tensor, name: str) -> Tensor:
    x = x[0] if isinstance(x, tuple) else x
    return x[mask] if x.shape[:2] == mask.shape else x.flatten(0, -2)  # image patches: all


def eva(setting: Setting) -> Found:
    """EVA's redistribution of ranks by explained variance."""
    own = {name: len(vectors) for name, vectors in eva_components(setting).items()}
    own = {name: own[name] for name in setting.retrainer.shapes}
    shapes = setting.retrainer.shapes
    capacity = {name: min(own[name], most) for name, most in setting.retrainer.capacity.items()}
    ranks = scaled_to_budget(own, shapes, capacity, setting.budget)
    return Found(
        ranks, {"own_parameters": parameters(own, shapes), "own_ranks": list(own.values())}
    )
