"""Adapters as engines that serve read them: each engine's own rule gives PEFT's logits.
Not here: the rules (engines.py), the folder of a finetune (test_finetune.py)."""

import pytest
import torch
from engines import (
    ENGINES,
    RefusedError,
    llama_cpp,
    served,
    sglang,
    tgi,
    vllm,
    vllm_without_patterns,
)
from families import TEXT_FAMILIES, bert, llava, make_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from darts_lora import Genotype, InputError
from darts_lora.config import ModelConfig
from darts_lora.lora.models import load_model
from darts_lora.lora.padded import save_padded
from darts_lora.lora.parts import layer_type

WEIGHTS = "adapter_model.safetensors"
SMALL = ("gate_proj", "o_proj")  # module types with layers of rank 0


def adapter_of(base, folder, scaling=2.0, targets="", **options):
    """An adapter of ranks 0 to 5, q_proj without any, saved there; PEFT's model with it."""
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and targets in n]
    names = [name for name in names if "head" not in name and "q_proj" not in name]
    ranks = {n: (5, 3, 1, 2)[i % 4] for i, n in enumerate(names)}
    ranks |= {n: 0 for n in names if n.endswith(SMALL) and ".1." in n}
    config = Genotype(ranks, scaling).to_lora_config(base, **options)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a tiny Llama; folder of its adapter; the same for engines; tokens; logits."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("serve")
    model = ModelConfig(make_family(TEXT_FAMILIES["llama"], str(place / "llama")))
    base, ids = load_model(model), torch.randint(0, 11, (4, 7))
    plain = base.eval()(ids).logits
    adapted = adapter_of(base, place / "adapter")
    with torch.no_grad():
        expected = adapted(ids).logits
    save_padded(adapted, str(place / "adapter"), str(place / "padded"))
    assert (expected - plain).abs().max() > 0.1
    return model, place / "adapter", place / "padded", ids, expected


def off(engine, folder, llama):
    """How far the engine's logits are from PEFT's."""
    model, _, _, ids, expected = llama
    with torch.no_grad():
        logits = served(engine, folder, load_model(model)).eval()(ids).logits
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_each_engine_serves_what_was_trained(engine, llama):
    assert off(engine, llama[2], llama) <= 1e-5


def test_each_engine_serves_rslora(llama, tmp_path):
    """Whose layers have unlike scales, which only the newer vLLM reads as they are."""
    model, _, _, ids, _ = llama
    adapted = adapter_of(load_model(model), tmp_path / "adapter", use_rslora=True)
    with torch.no_grad():
        own = (model, None, None, ids, adapted(ids).logits)
    save_padded(adapted, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    assert max(off(engine, tmp_path / "padded", own) for engine in ENGINES) <= 1e-5
    assert off(vllm, tmp_path / "adapter", own) <= 1e-5
    assert off(vllm_without_patterns, tmp_path / "adapter", own) > 1e-2


def test_what_engines_make_of_the_adapter_as_it_was_trained(llama):
    """Why there is a second folder: one refuses it, others serve something else without a word."""
    own = llama[1]
    for engine in (vllm_without_patterns, vllm):
        assert off(engine, own, llama) <= 1e-5
    assert off(llama_cpp, own, llama) > 1e-2
    for engine in (sglang, tgi):
        with pytest.raises(RefusedError):
            off(engine, own, llama)


def test_zeros_alone_are_not_enough(llama, tmp_path):
    """With a regex of targets, and without the layers of rank 0."""
    config, state = LoraConfig.from_pretrained(llama[2]), load_file(llama[2] / WEIGHTS)
    empty = {key.split(".lora_")[0] for key, value in state.items() if not value.any()}
    assert len(empty) == 2
    state = {key: value for key, value in state.items() if key.split(".lora_")[0] not in empty}
    config.target_modules = "|".join({key[17:].split(".lora_")[0] for key in state})
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / WEIGHTS)
    for engine in (vllm_without_patterns, vllm, llama_cpp):
        assert off(engine, tmp_path, llama) <= 1e-5
    with pytest.raises(RefusedError, match="target_modules is a string"):
        off(sglang, tmp_path, llama)
    assert off(tgi, tmp_path, llama) > 1e-2


def test_what_is_written_for_engines(llama):
    model, _, padded, ids, expected = llama
    config = LoraConfig.from_pretrained(padded)
    assert config.target_modules == {
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert (config.r, config.lora_alpha) == (5, 10) and type(config.lora_alpha) is int
    assert not config.rank_pattern and not config.alpha_pattern
    loaded = PeftModel.from_pretrained(load_model(model), padded).eval()
    assert (loaded(ids).logits - expected).abs().max() <= 1e-5
    layers = {n: m for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 12 and {m.r["default"] for m in layers.values()} == {5}
    assert sum(not m.lora_B["default"].weight.any() for m in layers.values()) == 2


def test_names_that_other_layers_have_too_are_written_in_full(tmp_path):
    """The vision tower has a k_proj as well: the name alone would adapt it."""
    model = ModelConfig(make_family(llava, str(tmp_path / "llava")))
    base = load_model(model)
    adapter_of(base, tmp_path / "adapter", targets="language_model")
    save_padded(base, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    targets = LoraConfig.from_pretrained(tmp_path / "padded").target_modules
    loaded = PeftModel.from_pretrained(load_model(model), tmp_path / "padded")
    adapted = {n for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert targets == adapted and len(adapted) == 12
    assert all("language_model" in name for name in adapted)
    assert len({layer_type(name) for name in adapted}) == 6


def test_where_no_list_of_names_is_of_the_adapted_layers_alone(tmp_path):
    """PEFT matches lists by the ends of names, and one whole name is the end of another."""
    base = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(4, 4)}) for name in ("a", "b")})
    base["b"]["a"] = nn.ModuleDict({"q": nn.Linear(4, 4)})
    adapted = get_peft_model(base, Genotype({"a.q": 2}).to_lora_config(base))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="stays a regex, which SGLang refuses"):
        save_padded(adapted, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    assert LoraConfig.from_pretrained(tmp_path / "padded").target_modules == r"a\.q"


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_engines_cannot_read_is_refused_by_name(variant, tmp_path):
    base = load_model(ModelConfig(make_family(TEXT_FAMILIES["llama"], str(tmp_path / "llama"))))
    adapter_of(base, tmp_path / "adapter", **variant)
    (option,) = variant
    with pytest.raises(InputError, match=rf"^pad_to_max=true: {option}="):
        save_padded(base, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    assert not (tmp_path / "padded").exists()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_padding_a_saved_adapter_leaves_its_scaling_and_its_other_weights(tmp_path, use_rslora):
    folder = make_family(bert, str(tmp_path / "bert"))
    base, ids = load_model(ModelConfig(folder)), torch.randint(0, 11, (4, 7))
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    found = Genotype({n: (1, 3, 5)[i % 3] for i, n in enumerate(names)}, scaling=0.7)
    adapted = get_peft_model(
        base, found.to_lora_config(base, task_type="SEQ_CLS", use_rslora=use_rslora)
    )
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            nn.init.normal_(parameter)
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    save_padded(adapted, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    padded = PeftModel.from_pretrained(load_model(ModelConfig(folder)), tmp_path / "padded").eval()
    assert (padded(ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    for name in names:
        layer = padded.base_model.model.get_submodule(name)
        assert layer.r["default"] == 5
        scaling = 0.7 * (3 / 5) ** 0.5 if use_rslora else 0.7  # of the largest rank
        assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12)
    assert not LoraConfig.from_pretrained(tmp_path / "padded").use_rslora


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "alphas", [{"q_proj": 6}, {}, {"q_proj": 5, "layers.1.self_attn.v_proj": 7}]
)
def test_padding_an_adapter_whose_largest_rank_is_in_its_patterns(alphas, use_rslora, tmp_path):
    """As others write them: r is the smallest rank, alphas are not in proportion to the ranks."""
    wide = {"alpha_pattern": alphas, "rank_pattern": {"q_proj": 4}, "use_rslora": use_rslora}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **wide)
    folder = make_family(TEXT_FAMILIES["llama"], str(tmp_path / "llama"))
    ids = torch.randint(0, 11, (4, 7))
    adapted = get_peft_model(load_model(ModelConfig(folder)), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    save_padded(adapted, str(tmp_path / "adapter"), str(tmp_path / "padded"))
    padded = PeftModel.from_pretrained(load_model(ModelConfig(folder)), tmp_path / "padded").eval()
    found = padded.peft_config["default"]
    assert found.r == 4 and not found.alpha_pattern and not found.rank_pattern
    assert found.lora_alpha == pytest.approx(4 * 3 / (2**0.5 if use_rslora else 2))
    assert (padded(ids).logits - expected).abs().max() <= 1e-5
