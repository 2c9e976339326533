"""Which modules are searched and which are trained in full: PEFT's matching, parts, heads.
Not here: what is put in their place (test_supernet.py)."""

import re

import pytest
import torch
import transformers as t
from families import IMAGE_FAMILIES, TEXT, TEXT_FAMILIES, TORCHVISION_FAMILIES, bert, make_family
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from darts_lora import Genotype, InputError, SearchConfig, Supernet
from darts_lora.config import ModelConfig
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.models import load_model
from darts_lora.lora.parts import heads, model_parts, task_type
from darts_lora.lora.targets import check_fresh, check_matches, match_modules, match_saved_modules
from small_models import residual, vision_model, vision_processor

PARTS = ("vision", "connector", "language")


def tiny(name, **sizes):
    left_out = ("num_key_value_heads", "max_position_embeddings")  # XLNet refuses the latter
    text = {k: v for k, v in TEXT.items() if k not in left_out}
    return getattr(t, f"{name}ForSequenceClassification")(
        getattr(t, f"{name}Config")(**text, num_labels=3, **sizes)
    )


@pytest.mark.parametrize(
    ("name", "sizes", "head"),
    [
        ("Bert", {}, ["classifier"]),
        ("Llama", {}, ["score"]),
        (
            "Bart",
            {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
            ["classification_head"],
        ),
        ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2}, ["sequence_summary", "logits_proj"]),
        ("XLM", {"emb_dim": 16, "n_layers": 1, "n_heads": 2}, ["sequence_summary"]),
        (
            "Perceiver",
            {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_cross_attention_heads": 2}
            | {"num_self_attends_per_block": 1, "num_self_attention_heads": 2},
            ["perceiver.decoder.decoder.final_layer"],
        ),
    ],
)
def test_a_head_is_trained_in_full_whatever_its_name_is(name, sizes, head):
    model = tiny(name, **sizes)
    assert heads(model) == head
    saved = match_saved_modules(model, None)
    assert saved == head
    supernet = Supernet(model, SearchConfig(ranks=(0, 1)))
    assert list(supernet.saved_modules) == saved
    inside = tuple(f"{name}." for name in saved)
    assert supernet.layers and not any(f"{n}.".startswith(inside) for n in supernet.layers)
    # and by the finetune without a search
    adapted = add_adapter(supernet.remove(), FinetuneConfig(None, rank=1), None)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
    assert trained and all(".modules_to_save." in name for name in trained)


def llama():
    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Name of a family -> its small model."""

    def load(name):
        if name == "mllama":
            return vision_model(vision_processor())
        make = {**TEXT_FAMILIES, **IMAGE_FAMILIES, **TORCHVISION_FAMILIES, "bert": bert}[name]
        return load_model(ModelConfig(make_family(make, str(tmp_path_factory.mktemp(name)))))

    return load


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        ("all-linear", None),
        (["q_proj", "v_proj"], None),
        (["q_proj", "layers.1.mlp.up_proj"], ["layers.0.self_attn.q_proj"]),
        (r".*\.mlp\..*_proj", r".*down.*"),
        ("all-linear", ["o_proj"]),
    ],
)
def test_targets_are_those_of_peft(targets, excluded):
    names = match_modules(llama(), targets, excluded)
    peft = get_peft_model(llama(), LoraConfig(target_modules=targets, exclude_modules=excluded))
    assert names == [n for n, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")]


# Family -> the searched layers of its image encoder, and of what joins images and text.
WANTED = {
    "mllama": (r"model\.vision_model\..*", r"model\.multi_modal_projector|.*\.cross_attn\..*"),
    "llava": (r"model\.vision_tower\..*", r"model\.multi_modal_projector\.linear_[12]"),
    "idefics3": (r"model\.vision_model\..*", r"model\.connector\..*"),
    "smolvlm": (r"model\.vision_model\..*", r"model\.connector\..*"),
    "qwen2_vl": (r"model\.visual\.blocks\..*", r"model\.visual\.merger\.mlp\.[02]"),
    "qwen2_5_vl": (r"model\.visual\.blocks\..*", r"model\.visual\.merger\.mlp\.[02]"),
}


@pytest.mark.parametrize("name", WANTED)
def test_parts_of_vision_language_models(family, name):
    model = family(name)
    check_parts(model, *WANTED[name])
    text = "text_model" if name in ("idefics3", "smolvlm") else "language_model"
    assert all(n.startswith(f"model.{text}.layers.") for n in match_modules(model, "language"))
    assert model_parts(model)["lm_head"] == "language"


def check_parts(model, vision, connector):
    linear = match_modules(model, "all-linear")
    found = {part: match_modules(model, part) for part in PARTS}
    assert found["vision"] == [n for n in linear if re.fullmatch(vision, n)]
    assert found["connector"] == [n for n in linear if re.fullmatch(connector, n)]
    assert found["language"] == [n for n in linear if not re.fullmatch(f"{vision}|{connector}", n)]
    assert all(found.values())


def test_parts_of_models_whose_connectors_have_blocks_of_their_own():
    """Resamplers and mergers in lists of blocks; embeddings of patches as a linear layer."""
    small = {"num_hidden_layers": 1}
    with torch.device("meta"):
        idefics2 = t.Idefics2ForConditionalGeneration(
            t.Idefics2Config(vision_config=small, text_config={"model_type": "mistral", **small})
        )
        qwen3 = t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(vision_config={"depth": 1}, text_config=small)
        )
        blip2 = t.Blip2ForConditionalGeneration(
            t.Blip2Config(
                vision_config=small, qformer_config=small, text_config={"model_type": "opt"} | small
            )
        )
        instructblip = t.InstructBlipForConditionalGeneration(
            t.InstructBlipConfig(
                vision_config=small, qformer_config=small, text_config={"model_type": "t5"}
            )
        )
        lfm2 = t.Lfm2VlForConditionalGeneration(
            t.Lfm2VlConfig(vision_config={"model_type": "siglip2_vision_model"} | small)
        )
    assert any("perceiver_resampler.layers.0" in n for n in match_modules(idefics2, "connector"))
    check_parts(idefics2, r"model\.vision_model\..*", r"model\.connector\..*")
    assert any("deepstack_merger_list.0" in n for n in match_modules(qwen3, "connector"))
    check_parts(qwen3, r"model\.visual\.blocks\..*", r"model\.visual\..*merger.*")
    check_parts(blip2, r"vision_model\..*", r"qformer\..*|language_projection")
    # a language model that is an encoder and a decoder
    assert any("language_model.encoder." in n for n in match_modules(instructblip, "language"))
    check_parts(instructblip, r"vision_model\..*", r"qformer\..*|language_projection")
    assert model_parts(lfm2)["model.vision_tower.embeddings.patch_embedding"] == "vision"


def test_several_parts_and_excluded_layers(family):
    model = family("mllama")
    linear = match_modules(model, "all-linear")
    vision, connector = (match_modules(model, part) for part in ("vision", "connector"))
    both = [n for n in linear if n in {*vision, *connector}]
    assert match_modules(model, "connector+vision") == match_modules(model, "vision+connector")
    assert match_modules(model, "connector+vision") == both
    assert match_modules(model, "vision+language+connector") == linear
    assert match_modules(model, "vision", ["fc1"]) == [n for n in vision if "fc1" not in n]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_text_model_is_language_alone(family, name):
    model = family(name)
    assert match_modules(model, "language") == match_modules(model, "all-linear")
    for target in ("vision", "connector", "connector+vision", "visoin"):
        with pytest.raises(
            InputError, match=r"matches no module; .*parts of this model: language$"
        ):
            match_modules(model, target)


@pytest.mark.parametrize("target", ["visoin", "vision+video", "Vision", "vision language"])
def test_a_part_that_no_model_has(family, target):
    message = rf"target_modules='{re.escape(target)}': matches no .*: connector, language, vision$"
    with pytest.raises(InputError, match=message):
        match_modules(family("llava"), target)


def test_a_model_that_is_not_of_transformers():
    assert match_modules(residual(), "language") == [f"blocks.{i}" for i in range(4)]
    assert task_type(residual()) is None and match_saved_modules(residual(), None) == []


def test_nothing_matches_names_the_nearest():
    with pytest.raises(InputError, match=r"target_modules=\['q_prj'\].*nearest names: q_proj"):
        match_modules(llama(), ["q_prj"])
    with pytest.raises(InputError, match=r"exclude_modules=\['q_proj'\]: matches no module"):
        match_modules(llama(), ["q_proj"], ["q_proj"])


class Renamed(t.BertForSequenceClassification):
    """As models with code of their own: a class that transformers does not list."""


BERT = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
CLASSIFIERS = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)),
    "renamed": lambda: Renamed(t.BertConfig(**BERT)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**BERT)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=64, dim=16, n_heads=2, hidden_dim=24, n_layers=1)
    ),
    "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT)),
}
ATTENTION = ["q_proj", "query", "q_lin"]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("modules_to_save", [None, ["norm", "LayerNorm", "layer_norm"]])
def test_modules_trained_in_full_are_those_of_peft(name, modules_to_save):
    model = CLASSIFIERS[name]()
    assert task_type(model) == TaskType.SEQ_CLS
    keys = None
    if modules_to_save:
        names = [n for n, _ in model.named_modules()]
        keys = [key for key in modules_to_save if any(n.endswith(key) for n in names)]
    found = match_saved_modules(model, keys)
    peft = LoraConfig(
        target_modules=ATTENTION, modules_to_save=keys and list(keys), task_type="SEQ_CLS"
    )
    wrapped = get_peft_model(CLASSIFIERS[name](), peft).base_model.model.named_modules()
    assert found == [n for n, m in wrapped if isinstance(m, ModulesToSaveWrapper)]
    heads = {"llama": ["score"], "distilbert": ["pre_classifier", "classifier"]}
    assert found[-len(heads.get(name, [0])) :] == heads.get(name, ["classifier"])


def test_heads_are_found_in_classification_models_alone():
    model = llama()
    model.score = nn.Linear(16, 2)
    assert task_type(model) is None and match_saved_modules(model, None) == []


def test_modules_inside_others_are_not_saved_twice():
    found = match_saved_modules(llama(), ["layers.0.mlp", "proj"])
    assert "model.layers.0.mlp" in found and "model.layers.1.mlp.up_proj" in found
    assert not [n for n in found if n.startswith("model.layers.0.mlp.")]


def test_what_a_checkpoint_lacks_is_trained_in_full_and_not_searched():
    model = CLASSIFIERS["bert"]()
    assert "bert.pooler.dense" in match_modules(model, "all-linear")
    assert match_saved_modules(model, None) == ["classifier"]
    model.fresh_modules = ["bert.pooler.dense", "classifier"]
    assert match_saved_modules(model, None) == ["bert.pooler.dense", "classifier"]
    assert match_saved_modules(model, ["pooler"]) == ["bert.pooler", "classifier"]
    for targets in ("all-linear", ["query", "dense"]):
        found = match_modules(model, targets)
        assert "bert.pooler.dense" not in found and len(found) > 2


@pytest.mark.parametrize(
    ("saved", "lacking"),
    [(["pooler.dense"], None), (["pooler"], None), (["LayerNorm"], "pooler.dense")],
)
def test_an_adapter_must_have_what_the_checkpoint_lacks(saved, lacking):
    model = CLASSIFIERS["bert"]()
    model.fresh_modules = ["bert.pooler.dense", "classifier"]
    peft = LoraConfig(target_modules=["query"], modules_to_save=saved, task_type="SEQ_CLS")
    adapted = get_peft_model(model, peft)
    if lacking is None:
        return check_fresh(adapted, "adapter='x'")
    with pytest.raises(InputError, match=rf"^adapter='x': .*no weights for bert\.{lacking}, and"):
        check_fresh(adapted, "adapter='x'")


def test_a_module_to_save_that_is_not_there():
    message = r"modules_to_save=\['lm_hed'\]: 'lm_hed' matches no module; nearest names: lm_head"
    with pytest.raises(InputError, match=message):
        match_saved_modules(llama(), ["lm_hed"])
    with pytest.raises(InputError, match=r"'xyz' matches no module; nearest names: model, lm_head"):
        match_saved_modules(llama(), ["xyz"])


@pytest.mark.parametrize(
    ("pattern", "targets", "message"),
    [
        (r"layers\.0\.mlp\.up_proj", r".*layers\.0\.mlp\.up_proj", None),
        (
            "up_proj",
            r".*layers\.0\.mlp\.up_proj",
            "the pattern 'up_proj' matches 2 modules, not one",
        ),
        (r"layers\.9", r".*layers\.0\.mlp\.up_proj", "matches 0 modules, not one"),
        (r"layers\.0\.mlp\.up_proj", ".*up_proj", "target_modules matches 2 modules, not 1"),
        (r"layers\.0\.mlp\.up_proj", r".*layers\.1\.mlp\.up_proj", "target_modules matches 1 mod"),
    ],
)
def test_patterns_are_of_one_module_each_and_of_those_that_are_wanted(pattern, targets, message):
    """`wanted` has one module, and PEFT, the oracle, adapts it alone where nothing is raised."""
    model, wanted = llama(), ["model.layers.0.mlp.up_proj"]
    config = LoraConfig(r=1, target_modules=targets, rank_pattern={pattern: 2})
    if message:
        with pytest.raises(InputError, match=re.escape(message)):
            check_matches(model, config, wanted, [])
        return
    check_matches(model, config, wanted, [])
    adapted = get_peft_model(model, config).base_model.model
    ranks = {n: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {wanted[0]: 2}


class Shared(nn.Module):
    """Two linear layers of one weight, one of one bias with another; a block that comes twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.second.weight, self.third.bias = self.first.weight, self.second.bias
        self.block = self.again = nn.Linear(8, 8)

    def forward(self, x):
        return self.again(self.block(self.third(self.second(self.first(x)))))


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_layers_that_share_a_weight_are_refused(name):
    with pytest.raises(InputError, match=f"target_modules: {name} shares a weight with (sec|fir)"):
        Supernet(Shared(), SearchConfig(ranks=(0, 1), target_modules=[name]))
    config = FinetuneConfig(genotype=None, rank=1)
    with pytest.raises(InputError, match=f"target_modules: {name} shares a weight with"):
        add_adapter(Shared(), config, Genotype({name: 1}, scaling=1.0))
    assert list(Supernet(Shared(), SearchConfig(ranks=(0, 1), target_modules=["block"])).layers)


def test_a_head_tied_to_the_embedding_is_refused_and_one_of_its_own_is_not():
    def tied(value):
        sizes = {k: v for k, v in TEXT.items() if k != "tie_word_embeddings"}
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, tie_word_embeddings=value))

    config = SearchConfig(ranks=(0, 1), target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match=r"lm_head shares a weight with model\.embed_tokens"):
        Supernet(tied(True), config)
    assert "lm_head" in Supernet(tied(False), config).layers


@pytest.mark.parametrize("name", ["zh\u00a0tw", "a\u200bb", "x" * 1001])
def test_a_name_that_no_genotype_can_hold_is_refused_at_the_start(name):
    model = nn.ModuleDict({name: nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(InputError, match=r"target_modules='.*must match dotted module names"):
        match_modules(model, "all-linear")
    assert match_modules(model, ["b"]) == ["b"]
    with pytest.raises(InputError, match=r"modules_to_save='"):
        match_saved_modules(model, [name])
