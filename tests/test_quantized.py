"""Bases in 4 and 8 bits: what they compute, and gradients through them.
Not here: the other ways to load a model (test_models.py)."""

import pytest
import torch
from families import TEXT_FAMILIES, bert, deberta, make_family
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers import Trainer, TrainingArguments

from darts_lora import Genotype, InputError, SearchConfig, Supernet
from darts_lora.config import ModelConfig
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.models import load_model
from small_models import randomise

KINDS = ("4bit", "8bit", "int8")
IDS = torch.arange(32).reshape(4, 8) % 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_family(TEXT_FAMILIES["llama"], str(tmp_path_factory.mktemp("llama")))


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def whole_weight(layer):
    """The weight of a quantized layer as the numbers that it stands for."""
    if type(layer.weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
    return layer.weight.dequantize()


def unquantized(folder, quantized):
    """A base in float32 with the weights that the quantized one stands for."""
    model = load_model(ModelConfig(folder)).to(quantized.device)
    for name, layer in layers_of(model).items():
        weight = whole_weight(quantized.get_submodule(name)).detach()
        assert 0.001 < (weight - layer.weight).norm() / layer.weight.norm() < 0.3, "quantized"
        layer.weight.data.copy_(weight)
    return model


def supernet_over(model):
    supernet = Supernet(model, SearchConfig(ranks=(0, 1, 2, 4)))
    randomise(supernet)
    return supernet


def gradients(model, parameters):
    """All of them there, finite and not zero."""
    ids = IDS.to(model.device)
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found)
    return found


def of_supernet(supernet):
    """Of the weights, and of a gate for each layer and row."""
    gates = supernet.mean_gates()
    places = torch.ones(len(gates), len(IDS), device=gates.device, requires_grad=True)
    found = gradients(supernet.model, supernet.weight_parameters())
    with supernet.probing(lambda rows: places[..., None] * gates[:, None]):
        return found + gradients(supernet.model, [places])


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits


def check_close(found, expected, close):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= close * other.norm()


@pytest.mark.parametrize(
    ("kind", "weight"), [("4bit", "Params4bit"), ("8bit", "Int8Params"), ("int8", "Int8Tensor")]
)
def test_all_layers_but_the_head_are_quantized(folder, kind, weight):
    model = load_model(ModelConfig(folder, quantization=kind))
    layers = layers_of(model)
    assert len(layers) == 14 and type(model.lm_head.weight) is nn.Parameter
    assert {type(layer.weight).__name__ for layer in layers.values()} == {weight}
    states = {getattr(layer.weight, "quant_state", None) is not None for layer in layers.values()}
    assert states == {kind == "4bit"}
    if kind == "4bit":
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert state.quant_type == "nf4" and state.nested


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_supernets_gradients_before_and_after_an_evaluation(folder, kind, recompute):
    config = ModelConfig(folder, quantization=kind, gradient_checkpointing=recompute)
    supernet = supernet_over(load_model(config))
    assert len(supernet.layers) == 14
    supernet.model.train()
    before = of_supernet(supernet)
    evaluate(supernet.model)
    of_supernet(supernet)  # in evaluation mode as well
    supernet.model.train()
    check_close(of_supernet(supernet), before, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_supernet_computes_with_the_weights_that_the_base_stands_for(folder, kind):
    model = load_model(ModelConfig(folder, quantization=kind))
    reference = supernet_over(unquantized(folder, model))
    supernet = supernet_over(model)
    # bitsandbytes' 8 bits round the activations too: on the CPU at evaluation, on a GPU always
    rounded = 0.1 if kind == "8bit" else 1e-5
    check_close([evaluate(supernet.model)], [evaluate(reference.model)], rounded)
    for each in (supernet, reference):
        each.model.train()
    if kind != "8bit" or model.device.type == "cpu":
        check_close(of_supernet(supernet), of_supernet(reference), 1e-4)


@pytest.mark.parametrize(
    ("dtype", "recompute"), [("float32", False), ("float32", True), ("bfloat16", False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_gradients_before_and_after_an_evaluation(folder, kind, dtype, recompute):
    config = ModelConfig(folder, quantization=kind, dtype=dtype, gradient_checkpointing=recompute)
    base = load_model(config)
    genotype = Genotype({name: 1 + i % 3 for i, name in enumerate(layers_of(base))})
    model = add_adapter(base, FinetuneConfig(), genotype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 14 and all(p.dtype == torch.float32 for p in parameters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.train()
    before = gradients(model, parameters)
    evaluate(model)
    gradients(model, parameters)
    model.train()
    check_close(gradients(model, parameters), before, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_lacks_is_trained_whole_or_refused(kind, tmp_path):
    folder = make_family(deberta, str(tmp_path))
    config = ModelConfig(folder, task="classification", quantization=kind)
    if kind != "int8":  # bitsandbytes has no layer for it
        with pytest.raises(
            InputError, match=rf"^quantization='{kind}': .* for pooler\.dense; leave"
        ):
            load_model(config)
        return
    supernet = supernet_over(load_model(config))
    ids = IDS.to(supernet.model.device)
    supernet.model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
    for parameter in supernet.saved_modules["pooler.dense"].parameters():
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_stays_whole_and_other_modules_to_save_are_refused(kind, tmp_path):
    config = ModelConfig(make_family(bert, str(tmp_path)), quantization=kind)
    model = load_model(config)
    head, original = model.classifier, load_model(ModelConfig(str(tmp_path))).classifier
    assert type(head.weight) is nn.Parameter
    assert torch.equal(head.weight.cpu(), original.weight)
    assert type(model.bert.pooler.dense.weight) is not nn.Parameter
    with pytest.raises(InputError, match=r"modules_to_save: bert\.pooler has quantized"):
        Supernet(load_model(config), SearchConfig(ranks=(0, 2), modules_to_save=["pooler"]))
    supernet = supernet_over(model)
    ids = IDS.to(model.device)
    model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
    for parameter in supernet.weight_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    assert supernet.remove().classifier is head


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_trainer_takes_a_supernet_over_a_quantized_base(kind, folder, tmp_path):
    supernet = supernet_over(load_model(ModelConfig(folder, quantization=kind)))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(3, 1)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = [w.detach().clone() for w in supernet.weight_parameters()]
    Trainer(supernet.model, args, train_dataset=rows).train()
    assert not any(map(torch.equal, before, supernet.weight_parameters()))
    assert "_hf_peft_config_loaded" not in vars(supernet.remove())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_four_bits_are_computed_with_in_the_dtype_of_what_stays_whole(stored, dtype, tmp_path):
    folder = make_family(TEXT_FAMILIES["llama"], str(tmp_path))
    load_model(ModelConfig(folder, dtype=stored)).save_pretrained(folder)
    model = load_model(ModelConfig(folder, dtype=dtype, quantization="4bit"))
    wanted = getattr(torch, stored if dtype == "auto" else dtype)
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {wanted}
    assert model.dtype == model.get_input_embeddings().weight.dtype == wanted
