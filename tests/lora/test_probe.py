"""What is found before a search: which layers it searches, models that are none to search, layers
that no adapter changes. Not here: the matching (test_targets.py), PEFT itself (test_adapter.py)."""

import pytest
import torch
import transformers as t
from families import TEXT
from peft import LoraConfig, get_peft_model
from test_supernet import bert, config, llama
from torch import nn

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.lora.probe import left_out_lines, not_plain_layers
from darts_lora.lora.targets import match_modules
from small_models import residual


def compiled(model):
    return torch.compile(model)


def with_a_compiled_layer(model):
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


def with_an_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["blocks.0"]))


def inside_an_adapter(model):
    return with_an_adapter(model).base_model.model


def searched(model):
    return Supernet(model, SearchConfig(ranks=(0, 1))).model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (compiled, "OptimizedModule is compiled"),
        (with_a_compiled_layer, r"blocks\.1 is compiled"),
        (with_an_adapter, "PeftModel has PEFT's adapter"),
        (inside_an_adapter, r"blocks\.0 has PEFT's adapter"),
        (searched, r"blocks\.0 is a layer of another Supernet"),
    ],
)
def test_a_model_that_is_wrapped_already_is_refused(wrap, message):
    with pytest.raises(InputError, match=message):
        Supernet(wrap(residual()), SearchConfig(ranks=(0, 1)))


def test_a_supernet_that_was_removed_can_be_made_anew():
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1)))
    assert list(Supernet(supernet.remove(), SearchConfig(ranks=(0, 1))).layers) == [
        f"blocks.{i}" for i in range(4)
    ]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x):
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


def test_layers_of_torchs_attention_are_left_out_in_one_line():
    model = nn.Sequential(Attention(), Attention())
    with pytest.warns(
        UserWarning, match=r"left out: 0\.attention\.out_proj and 1 more: its weight"
    ):
        supernet = Supernet(model, SearchConfig(ranks=(0, 1, 2)))
    assert list(supernet.layers) == ["0.mlp", "1.mlp"]
    assert list(supernet.left_out) == ["0.attention.out_proj", "1.attention.out_proj"]


def mamba():
    config = t.MambaConfig(
        vocab_size=8, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    return t.MambaForCausalLM(config)


def test_a_forward_tells_what_is_read_past_the_forward():
    model = mamba().train()
    names, random_state = match_modules(model, "all-linear"), torch.get_rng_state()
    structure = str(model)
    found = not_plain_layers(model, names)
    assert list(found) == ["backbone.layers.0.mixer.dt_proj"]
    assert str(model) == structure and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    # it is what a LoRA there says: any B, the same output
    tokens = torch.tensor([[1, 2, 3]])
    before = model.eval()(tokens).logits
    for name in names:
        if name.endswith("out_proj"):
            continue  # which PEFT refuses
        config = LoraConfig(target_modules=[name], init_lora_weights=False)
        with_lora = get_peft_model(model, config)
        same = torch.equal(with_lora(tokens).logits, before)
        model = with_lora.unload()
        assert same == (name in found), name


def test_a_model_that_calls_its_layers_has_none(monkeypatch):
    ids = {"vocab_size": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, **ids}))  # fewer than dummy_inputs'
    called = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: called.append(1))
    assert not_plain_layers(model, match_modules(model, "all-linear")) == {} and called


def test_a_layer_whose_forward_gives_more_than_a_tensor():
    """Phi-MoE's routers are Linears by class, but give logits and scores."""
    config = t.PhimoeConfig(**{**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2})
    model = t.PhimoeForCausalLM(config)
    routers = [n for n in match_modules(model, "all-linear") if n.endswith(".router")]
    with pytest.warns(UserWarning, match="left out: .*router and 1 more: .* other than one tensor"):
        supernet = Supernet(model, SearchConfig(ranks=(0, 1)))
    assert len(routers) == 2 and not set(routers) & set(supernet.layers)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_lines_name_the_first_layer_of_each_reason():
    assert left_out_lines({"a": "x", "b": "y", "c": "x"}) == [
        "left out: a and 1 more: x",
        "left out: b: y",
    ]


class Indexed(t.LlamaForCausalLM):
    """A layer that the model itself runs without gradients, as sparse attention's indexers are."""

    def __init__(self, config):
        super().__init__(config)
        self.indexer = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids=None, **kwargs):
        with torch.no_grad():
            chosen = self.indexer(self.model.embed_tokens(input_ids)).argmax() > 0
        embeds = self.model.embed_tokens(input_ids) * (1 + 1e-3 * chosen)
        return super().forward(inputs_embeds=embeds, **kwargs)


def test_a_layer_that_runs_without_gradients_is_left_out():
    model = Indexed(t.LlamaConfig(**TEXT))
    with pytest.warns(UserWarning, match="left out: indexer: the model runs it without gradients"):
        supernet = Supernet(model, SearchConfig(ranks=(1, 2)))
    assert "indexer" not in supernet.layers and len(supernet.layers) == 14
    ids = torch.randint(0, 64, (2, 5))
    supernet.model(ids, labels=ids).loss.backward()
    assert all(layer.lora_B.grad.any() for layer in supernet.layers.values())


class Frozen(t.LlamaForCausalLM):
    """Runs all of its layers without gradients."""

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return super().forward(*args, **kwargs)


def test_a_model_that_runs_without_gradients_has_nothing_to_search():
    with pytest.raises(InputError, match=r"nothing is left to search, first .*without gradients"):
        Supernet(Frozen(t.LlamaConfig(**TEXT)), SearchConfig(ranks=(0, 1)))


def test_all_linear_leaves_out_what_shares_its_weight():
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
    model.extra = nn.Linear(*model.model.layers[0].self_attn.q_proj.weight.shape[::-1], bias=False)
    model.extra.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.warns(UserWarning, match=r"left out: .*shares a weight with"):
        supernet = Supernet(model, SearchConfig(ranks=(0, 1)))
    assert not {"extra", "model.layers.0.self_attn.q_proj"} & supernet.layers.keys()
    supernet.remove()
    with pytest.raises(InputError, match="q_proj shares a weight with extra"):
        Supernet(model, SearchConfig(ranks=(0, 1), target_modules=["q_proj"]))


def test_the_searched_layers_are_those_that_match():
    options = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]}
    supernet = Supernet(llama(), config(**options))
    assert list(supernet.layers) == match_modules(llama(), *options.values())
    assert len(supernet.layers) == 3


def test_target_that_is_no_linear_layer():
    with pytest.raises(InputError, match=r"model\.norm is a LlamaRMSNorm, not a linear layer"):
        Supernet(llama(), config(target_modules=["q_proj", "model.norm"]))


def test_rank_above_a_layers_smaller_side_names_the_layer():
    with pytest.raises(InputError, match=r"rank 20 is above 16, .* of model\.layers\.0\."):
        Supernet(llama(), config(ranks=(1, 20)))


@pytest.mark.parametrize(
    "options", [{"target_modules": ["classifier"]}, {"modules_to_save": ["bert"]}]
)
def test_nothing_left_to_search(options):
    with pytest.raises(InputError, match=r"nothing is left to search, every match is"):
        Supernet(bert(), config(**options))
