"""LoRA's variants on found ranks: they train, come back in plain PEFT, and take over what was
searched. Not here: the plain finetune (test_finetune.py), engines (test_padded.py)."""

from dataclasses import replace

import pytest
import torch
from families import TEXT_FAMILIES, make_family, make_moe
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from darts_lora import Genotype, InputError, SearchConfig, Supernet
from darts_lora.config import ModelConfig, TrainingConfig
from darts_lora.data.loaders import make_collator, training_rows
from darts_lora.finetune import finetune
from darts_lora.lora import variants as variants_module
from darts_lora.lora.adapter import adapted_ranks
from darts_lora.lora.models import load_model
from darts_lora.lora.variants import eva_weights
from darts_lora.run.beginning import FinetuneConfig, add_adapter, resolve_init
from small_models import randomise

TRAINING = TrainingConfig(max_steps=2, batch_size=8, logging_steps=1, learning_rate=0.02)
SCALES = [{"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}]
VARIANTS = [*SCALES[:2], {"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}]


@pytest.fixture(scope="module")
def genotype(base_config, tmp_path_factory):
    """A genotype with ranks 0, 2 and 5 in turn over the small model's layers, and its file."""
    modules = load_model(base_config).named_modules()
    names = [name for name, m in modules if isinstance(m, nn.Linear) and name != "lm_head"]
    found = Genotype({name: (0, 2, 5)[i % 3] for i, name in enumerate(names)})
    path = str(tmp_path_factory.mktemp("search") / "genotype.json")
    found.save(path)
    return found, path


@pytest.fixture(scope="module")
def batch(base_config, data):
    collator = make_collator(base_config, data)
    rows = training_rows(data)
    return collator([rows[i] for i in range(8)])


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_finetuned_variant_comes_back_in_plain_peft(
    variant, genotype, base_config, data, batch, tmp_path
):
    found, path = genotype
    config = FinetuneConfig(path, output_dir=str(tmp_path), **variant)
    trained, _ = finetune(config, base_config, data, TRAINING)
    expected, base = logits(trained, batch), load_model(base_config)
    assert (logits(base, batch) - expected).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert (logits(loaded, batch) - expected).abs().max() <= 1e-5
    assert adapted_ranks(loaded) == {n: r for n, r in found.ranks.items() if r}
    saved = LoraConfig.from_pretrained(tmp_path)
    for option, value in variant.items():
        assert getattr(saved, option) == value
    magnitudes = [k for k in load_file(tmp_path / "adapter_model.safetensors") if "magnitude" in k]
    wanted = sum(rank > 0 for rank in found.ranks.values()) if "use_dora" in variant else 0
    assert len(magnitudes) == wanted


def test_the_scale_of_rslora_falls_with_the_root_of_the_rank(genotype, base_config):
    found, path = genotype
    model = add_adapter(load_model(base_config), FinetuneConfig(path, use_rslora=True), found)
    mean = sum(found.ranks.values()) / sum(rank > 0 for rank in found.ranks.values())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        expected = found.scaling * (mean / layer.r["default"]) ** 0.5
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-12)
    assert len({layer.scaling["default"] for layer in layers}) == 2


@pytest.mark.parametrize("variant", SCALES, ids=str)
def test_a_variant_begins_with_the_function_that_was_searched(variant, base_config, batch):
    supernet = Supernet(load_model(base_config), SearchConfig(ranks=(0, 2, 5), scaling=0.7))
    randomise(supernet)
    for layer in supernet.layers.values():
        layer.lora_B.data.mul_(0.05)
    found = Genotype.from_supernet(supernet)
    assert {*found.ranks.values()} == {0, 2, 5}
    base = supernet.remove()
    plain = add_adapter(base, FinetuneConfig("x", init="inherit"), found, supernet)
    expected = logits(plain, batch)
    config = FinetuneConfig("x", init="inherit", **variant)
    model = add_adapter(plain.unload(), config, found, supernet)
    assert (logits(load_model(base_config), batch) - expected).abs().max() > 1e-2
    assert (logits(model, batch) - expected).abs().max() <= 1e-5
    assert all(p.requires_grad for n, p in model.named_parameters() if "magnitude" in n)


def test_pissa_begins_with_the_base_and_moves_a_part_of_it(genotype, base_config, batch):
    found, path = genotype
    base = load_model(base_config)
    expected = logits(base, batch)
    config = FinetuneConfig(path, init_lora_weights="pissa")
    model = add_adapter(base, config, found)
    assert (logits(model, batch) - expected).abs().max() <= 1e-4
    with model.disable_adapter():
        assert (logits(model, batch) - expected).abs().max() > 1e-2


def test_eva_points_a_along_the_inputs(genotype, base_config, data, batch):
    """A's rows are orthonormal, and hold more of the inputs' variance than any others as many."""
    found, path = genotype
    model = add_adapter(
        load_model(base_config), FinetuneConfig(path, init_lora_weights="eva"), found
    )
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    rows, seen = training_rows(data), {}
    eva_weights(model, rows, make_collator(base_config, data), 8)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert adapted_ranks(model) == {n: r for n, r in found.ranks.items() if r}

    def look(name, x):
        mask = batch["attention_mask"].bool()
        seen[name] = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])

    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, _, name=name: look(name, args[0]))
    logits(model, batch)
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4), name
        x = seen[name] - seen[name].mean(0)
        best = torch.linalg.svdvals(x)[: len(a)].square().sum()
        assert (x @ a.T).square().sum() > 0.9 * best, name


def test_eva_that_does_not_settle_ends_in_one_line(genotype, base_config, data, monkeypatch):
    found, path = genotype
    monkeypatch.setattr(variants_module, "EVA_PASSES", 2)
    model = add_adapter(
        load_model(base_config), FinetuneConfig(path, init_lora_weights="eva"), found
    )
    with pytest.raises(InputError, match=r"^init_lora_weights='eva': .* after 2 batches; leave it"):
        eva_weights(model, training_rows(data), make_collator(base_config, data), 8)


def test_the_rates_of_lora_plus(genotype, base_config, data, tmp_path):
    """Adam's first step is its rate, in either direction."""
    _, path = genotype
    training = replace(TRAINING, max_steps=1, weight_decay=0.0, lr_scheduler="constant")
    states = []
    for ratio in (None, 8.0):
        config = FinetuneConfig(path, output_dir=str(tmp_path), loraplus_lr_ratio=ratio)
        finetune(config, base_config, data, training)
        states.append(load_file(tmp_path / "adapter_model.safetensors"))
    plain, plus = states
    for key in plain:
        if "lora_B" in key and plain[key].any():
            moved = plain[key].abs() > 0.9 * training.learning_rate
            assert torch.allclose(plus[key][moved], 8 * plain[key][moved], rtol=1e-3)
        elif "lora_A" in key:  # B is 0, so that A does not move yet
            assert torch.equal(plus[key], plain[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "lora_ga"}, r"init_lora_weights='lora_ga': takes a part out of"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4': takes a"),
        ({"init_lora_weights": "orthogonal"}, r"init_lora_weights='orthogonal': is for even"),
        ({"init_lora_weights": "kaiming"}, r"init_lora_weights='kaiming': is none that is known"),
        ({"init_lora_weights": "eva", "init": "inherit"}, r"init_lora_weights='eva', init='inh"),
        ({"init_lora_weights": "pissa", "pad_to_max": True}, r"pad_to_max=true: init_lora_weight"),
        ({"use_dora": True, "pad_to_max": True}, r"pad_to_max=true: use_dora=true"),
        ({"loraplus_lr_ratio": 0.5}, r"loraplus_lr_ratio=0\.5: must be a number >= 1"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options, message):
    with pytest.raises(InputError, match=rf"^{message}"):
        FinetuneConfig("x", **options)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "eva"}], ids=str)
def test_experts_have_no_such_variant(options):
    found = Genotype({"model.layers.0.mlp.experts.down_proj": 1})
    with pytest.raises(InputError, match=r"^\w+(=true)?: PEFT has it for linear layers alone, not"):
        add_adapter(make_moe("mixtral"), FinetuneConfig("x", **options), found)


@pytest.mark.parametrize(
    ("options", "quantization", "message"),
    [
        ({"init_lora_weights": "pissa"}, "4bit", r"init_lora_weights='pissa', quantization='4bit'"),
        ({"use_dora": True}, "8bit", r"use_dora=true, quantization='8bit'"),
    ],
)
def test_a_variant_that_quantized_weights_do_not_allow(
    options, quantization, message, base_config, data, tmp_path
):
    config = FinetuneConfig(None, rank=1, output_dir=str(tmp_path), **options)
    with pytest.raises(InputError, match=f"^{message}"):
        finetune(config, replace(base_config, quantization=quantization), data, TRAINING)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "eva"}], ids=str)
def test_variants_over_a_base_in_4_bits(options, tmp_path):
    folder, ids = make_family(TEXT_FAMILIES["llama"], str(tmp_path)), torch.randint(0, 11, (4, 7))
    model = ModelConfig(folder, quantization="4bit")
    expected = load_model(model).eval()(ids).logits
    config = FinetuneConfig(None, rank=2, target_modules=["q_proj"], **options)
    adapted = add_adapter(load_model(model), config, None)
    if "use_dora" not in options:
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        eva_weights(adapted, [{}] * 8, lambda rows: batch, 4)
    assert (adapted.eval()(ids).logits - expected).abs().max() <= 1e-5


def test_first_weights_of_ones_own_begin_from_scratch():
    part = Genotype({"layer": 1}, found_by={"steps": 5, "run_steps": 40})
    assert resolve_init(FinetuneConfig("x"), part) == "inherit"
    assert resolve_init(FinetuneConfig("x", init_lora_weights="pissa"), part) == "scratch"
    assert resolve_init(FinetuneConfig("x", use_dora=True), part) == "inherit"
