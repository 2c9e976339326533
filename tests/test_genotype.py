"""Genotype: JSON, PEFT's view of it, names of older releases, warm start.
Not here: how ranks are chosen (test_discretize.py)."""

import json

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

from darts_lora import Genotype, InputError, SearchConfig, Supernet, discretize
from small_models import randomise, residual


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
        ("{}", "ranks must map"),
        ('{"weights": {"a": 1}}', "ranks must map"),
        ('{"a": "4"}', "ranks must map"),
        ('{"a": -1}', "ranks must map"),
        ('{"a": true}', "ranks must map"),
        ('{"version": 2, "ranks": {"a": 1}}', "version 2; this release reads 1"),
        ('{"version": 1}', "ranks must map"),
        ('{"version": 1, "ranks": {"a": 1}, "scaling": 0}', "scaling=0"),
        ('{"version": 1, "ranks": {"a": 1}, "scaling": "x"}', "scaling='x'"),
        ('{"version": 1, "ranks": {"a": 1}, "shapes": {"b": [1, 2]}}', "shapes must give 2"),
        ('{"version": 1, "ranks": {"a": 1}, "shapes": {"a": [1]}}', "shapes must give 2"),
        (
            '{"version": 1, "ranks": {"a": 1}, "candidates": [1], "probabilities": {"a": [1, 0]}}',
            "probabilities must give 1",
        ),
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


@pytest.mark.parametrize("branches", ["independent", "nested"])
def test_inherited_weights_give_the_supernets_output(tmp_path, branches):
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), branches=branches))
    randomise(supernet)
    with torch.no_grad():  # one layer of each rank
        for i, layer in enumerate(supernet.layers.values()):
            layer.alpha[i] = 9.0
    genotype = discretize(supernet)
    assert list(genotype.ranks.values()) == [0, 1, 2, 4]
    x, candidates = torch.randn(3, 16), list(supernet.config.ranks)
    with torch.no_grad():
        for name, layer in supernet.layers.items():  # alpha at the choice, for certain
            layer.alpha.fill_(-1e9)[candidates.index(genotype.ranks[name])] = 0
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
