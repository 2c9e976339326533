"""Genotype: JSON, PEFT's view of it, padding, names of older releases, warm start.
Not here: how ranks are chosen (test_discretize.py), nor a padded folder (test_padded.py)."""

import json
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from families import TEXT
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from darts_lora import Genotype, InputError, SearchConfig, Supernet, discretize
from darts_lora.lora.handover import fold
from darts_lora.lora.targets import match_modules
from small_models import cut_to, randomise, residual


class Awkward(nn.Module):
    """Names that are suffixes of others, at the root and with characters of regular expressions."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.q_proj = nn.Linear(8, 8)
        self.part = nn.ModuleDict({"proj": nn.Linear(8, 8), "q+proj": nn.Linear(8, 8)})
        self.xproj = nn.Linear(8, 8)

    def forward(self, x):
        x = self.q_proj(self.proj(x))
        return self.xproj(self.part["q+proj"](self.part["proj"](x)))


class Deep(nn.Module):
    """516 linear layers: of the names, some are at the root, some suffixes or prefixes of others
    ("blocks.1.v" and "inner.blocks.1.v", "blocks.1" and "blocks.11"), some hold characters of
    regular expressions."""

    def __init__(self, inner: bool = True):
        super().__init__()
        names = ("v", "q_v", "q+v", "(v)|v$")
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
            for _ in range(100 if inner else 27)
        )
        self.v, self.q_v, self.blocks_v = (nn.Linear(8, 8) for _ in range(3))
        if inner:
            self.inner = Deep(inner=False)
            self.last, self.vv = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        layers = [layer for block in self.blocks for layer in block.values()]
        for layer in (*layers, self.v, self.q_v, self.blocks_v):
            x = x + 0.1 * torch.tanh(layer(x))
        return self.vv(self.last(self.inner(x))) if hasattr(self, "inner") else x


def deep():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Ranks drawn for 516 layers; the adapter's folder, and its outputs before it was saved."""
    random, model = Random(0), deep()
    ranks = {n: random.randrange(9) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    genotype = Genotype(ranks, scaling=1.5)
    peft = get_peft_model(model, genotype.to_lora_config(model))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    folder, x = tmp_path_factory.mktemp("adapter"), torch.randn(5, 8)
    peft.save_pretrained(folder)
    return genotype, folder, x, peft(x).detach()


def check_ranks(peft, genotype, use_rslora=False):
    """Each module has its rank and the genotype's scaling, or rsLoRA's, as PEFT holds them."""
    adapted = [rank for rank in genotype.ranks.values() if rank]
    for name, own in genotype.ranks.items():
        module = peft.base_model.model.get_submodule(name)
        if own == 0:
            assert not hasattr(module, "lora_A"), name
        else:
            assert module.r["default"] == own, name
            assert module.lora_A["default"].weight.shape[0] == own, name
            factor = (sum(adapted) / len(adapted) / own) ** 0.5 if use_rslora else 1
            scaling = pytest.approx(genotype.scaling * factor, rel=1e-12)
            assert module.scaling["default"] == scaling, name


def test_a_saved_adapter_of_516_layers_comes_back_bit_for_bit(saved):
    genotype, folder, x, expected = saved
    assert len(genotype.ranks) == 516 and set(genotype.ranks.values()) == set(range(9))
    assert not torch.allclose(deep()(x), expected, atol=1e-2)
    loaded = PeftModel.from_pretrained(deep(), folder)
    check_ranks(loaded, genotype)
    assert torch.equal(loaded(x), expected)


def test_each_key_of_the_patterns_hits_one_layer(saved):
    genotype, folder, _, _ = saved
    config = PeftModel.from_pretrained(deep(), folder).peft_config["default"]
    names = [name for name, _ in deep().named_modules()]
    wanted = {name: rank for name, rank in genotype.ranks.items() if 0 < rank < 8}
    for pattern, factor in ((config.rank_pattern, 1), (config.alpha_pattern, genotype.scaling)):
        hit = {}
        for key, value in pattern.items():
            (name,) = [n for n in names if re.match(rf"(.*\.)?({key})$", n)]  # PEFT's own rule
            hit[name] = value
        assert hit == {name: rank * factor for name, rank in wanted.items()}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("scaling", [2.0, 0.7])
def test_the_scaling_is_the_genotypes_for_every_rank_or_of_rslora(use_rslora, scaling):
    ranks = {"proj": 1, "part.proj": 3, "q_proj": 0, "part.q+proj": 7, "xproj": 2}
    genotype, model = Genotype(ranks, scaling), Awkward()
    config = genotype.to_lora_config(model, use_rslora=use_rslora)
    mean = (1 + 3 + 7 + 2) / 4
    assert config.lora_alpha == pytest.approx(scaling * (mean**0.5 if use_rslora else 7))
    peft = get_peft_model(model, config).double()
    check_ranks(peft, genotype, use_rslora)
    x = torch.randn(3, 8, dtype=torch.float64)
    for name, rank in ranks.items():
        if rank > 0:
            module = peft.base_model.model.get_submodule(name)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            nn.init.normal_(b)
            own = scaling * (mean / rank) ** 0.5 if use_rslora else scaling
            expected = module.base_layer(x) + own * x @ a.T @ b.T
            assert torch.allclose(module(x), expected, rtol=0, atol=1e-12)


def test_conv1d_layers_are_merged_as_they_run():
    """GPT-2 stores its weights transposed; merging must add B A the same way round."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
    names = match_modules(model, "all-linear")
    assert len(names) == 4 and all("c_" in name for name in names)
    genotype = Genotype({name: rank for name, rank in zip(names, (0, 1, 3, 2), strict=True)})
    assert genotype.with_shapes(model).shapes[names[0]] == (16, 48)
    config = genotype.to_lora_config(model)
    assert config.fan_in_fan_out
    peft = get_peft_model(model, config)
    check_ranks(peft, genotype)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = torch.randint(0, 32, (2, 7))
    with peft.disable_adapter():
        base = peft(ids).logits
    expected = peft(ids).logits
    assert not torch.allclose(base, expected, atol=1e-2)
    assert torch.allclose(peft.merge_and_unload()(ids).logits, expected, atol=1e-5)


def test_lora_config_gives_each_module_its_rank():
    ranks = {"proj": 1, "part.proj": 4, "q_proj": 0, "part.q+proj": 2, "xproj": 0}
    model = Awkward()
    config = Genotype(ranks, scaling=3.0).to_lora_config(model)
    peft = get_peft_model(model, config).base_model.model
    for name, rank in ranks.items():
        module = peft.get_submodule(name)
        if rank == 0:
            assert type(module) is nn.Linear
        else:
            assert module.r["default"] == rank and module.scaling["default"] == 3.0


def test_lora_config_of_one_uniform_rank():
    config = Genotype({"blocks.0": 2, "blocks.3": 2}).to_lora_config(residual())
    assert config.r == 2 and config.lora_alpha == 4 and not config.rank_pattern


def test_lora_config_errors():
    with pytest.raises(InputError, match="every rank is 0"):
        Genotype({"proj": 0}).to_lora_config()
    with pytest.raises(InputError, match=r"1 of its 2 modules are no linear .* first 'other'"):
        Genotype({"proj": 1, "other": 0}).to_lora_config(Awkward())
    with pytest.raises(InputError, match="no linear layers"):
        Genotype({"part": 1}).to_lora_config(Awkward())


def test_round_trip(tmp_path):
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1))
    randomise(supernet)
    genotype = discretize(supernet)
    genotype.save(tmp_path / "g.json")
    assert Genotype.load(tmp_path / "g.json") == genotype
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["version"] == 1 and content["candidates"] == [0, 1, 2]
    assert genotype.num_parameters == sum(r * 32 for r in genotype.ranks.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "g.json"]


def test_bare_ranks_with_names_from_before_transformers_5(tmp_path):
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig())
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    ranks = {name: (4, 8, 16, 32, 64)[i % 5] for i, name in enumerate(linear)}
    old = {
        "base_model.model."
        + n.removeprefix("model.").replace("language_model.", "language_model.model."): r
        for n, r in ranks.items()
    }
    assert "base_model.model.language_model.model.layers.3.cross_attn.q_proj" in old
    (tmp_path / "ranks.json").write_text(json.dumps(old))
    genotype = Genotype.load(tmp_path / "ranks.json")
    with pytest.raises(InputError, match="holds ranks alone"):
        _ = genotype.num_parameters
    current = genotype.with_shapes(model)
    assert current.ranks == ranks and len(ranks) == 520
    config = genotype.to_lora_config(model)
    assert config.r == 64 and len(config.rank_pattern) == sum(r != 64 for r in ranks.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ('{"version": 1, "ranks": {"a": 1', "cannot be read"),
        ("[1, 2]", "holds a list, not a genotype"),
        ("{}", "ranks={}: must map"),
        ('{"weights": {"a": 1}}', "ranks={'weights': {'a': 1}}: must map"),
    ],
)
def test_truncated_or_foreign_json(tmp_path, text, message):
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Genotype.load(path)
    assert str(path) in str(error.value)


def test_missing_file():
    with pytest.raises(InputError, match=r"genotype 'nowhere.json': cannot be read"):
        Genotype.load("nowhere.json")


def test_inherited_weights_give_the_supernets_output(tmp_path):
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4)))
    randomise(supernet)
    with torch.no_grad():  # one layer of each rank
        for i, layer in enumerate(supernet.layers.values()):
            layer.alpha[i] = 9.0
    genotype = discretize(supernet)
    assert list(genotype.ranks.values()) == [0, 1, 2, 4]
    x = torch.randn(3, 16)
    with cut_to(supernet, genotype.ranks):
        expected = supernet.model(x)
    state = genotype.inherited_state(supernet)
    save_file({k: v.contiguous() for k, v in supernet.state_dict().items()}, tmp_path / "s")
    from_file = genotype.inherited_state(tmp_path / "s")
    assert all(torch.equal(state[key], from_file[key]) for key in state)
    model = supernet.remove()
    peft = get_peft_model(model, genotype.to_lora_config(model))
    result = set_peft_model_state_dict(peft, state)
    assert not result.unexpected_keys
    assert torch.allclose(peft(x), expected, atol=1e-5)
    with pytest.raises(InputError, match="module 'other' is not in the supernet"):
        Genotype({"other": 1}).inherited_state(tmp_path / "s")
    with pytest.raises(InputError, match=r"searched weights .*nothing"):
        genotype.inherited_state(tmp_path / "nothing")


def test_any_rank_up_to_the_columns_can_be_inherited():
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4)))
    randomise(supernet)
    columns = 4
    for rank in (3, columns):
        genotype = replace(discretize(supernet), ranks=dict.fromkeys(supernet.layers, rank))
        state, searched = genotype.inherited_state(supernet), supernet.state_dict()
        for name in supernet.layers:
            a, b = (state[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            whole = fold(searched[f"{name}.lora_B"], searched[f"{name}.gates"])
            whole = whole @ searched[f"{name}.lora_A"].double()
            lost = (whole - b.double() @ a.double()).norm()
            wanted = torch.linalg.svdvals(whole)[rank:].norm()
            assert lost == pytest.approx(float(wanted), abs=1e-5), "Eckart and Young"
    with pytest.raises(InputError, match=f"rank={columns + 1}: the searched layer has {columns} c"):
        replace(genotype, ranks=dict.fromkeys(supernet.layers, columns + 1)).inherited_state(
            supernet
        )


def test_a_trained_head_goes_with_the_genotype_and_into_peft(tmp_path):
    torch.manual_seed(0)
    sizes = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    supernet = Supernet(model, SearchConfig(ranks=(0, 2)))
    randomise(supernet)
    nn.init.normal_(supernet.saved_modules["classifier"].weight)
    genotype = discretize(supernet)
    assert set(genotype.ranks.values()) == {0, 2} and "classifier" not in genotype.ranks
    genotype.save(tmp_path / "g.json")
    assert Genotype.load(tmp_path / "g.json").modules_to_save == ["classifier"]
    ids = torch.randint(0, 64, (4, 7))
    with cut_to(supernet, genotype.ranks):
        expected = supernet.model(ids).logits
    state = genotype.inherited_state(supernet)
    for task_type in (None, "SEQ_CLS"):
        fresh = BertForSequenceClassification(model.config).eval()
        fresh.load_state_dict(supernet.remove().state_dict())
        base = fresh(ids).logits
        peft = get_peft_model(fresh, genotype.to_lora_config(fresh, task_type=task_type))
        assert genotype.modules_to_save == ["classifier"], "PEFT adds to the list that it is given"
        assert not set_peft_model_state_dict(peft, state).unexpected_keys
        peft.eval().save_pretrained(tmp_path / "adapter")
        assert torch.allclose(peft(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(base, expected, atol=1e-1)
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for part in ("weight", "bias"):
            head = getattr(supernet.saved_modules["classifier"], part)
            assert torch.equal(saved[f"base_model.model.classifier.{part}"], head)
