"""Retraining as a plain PEFT adapter: what is trained, what is saved, when it stops."""

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from darts_lora.collator import Collator
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data import load_splits
from darts_lora.errors import InputError
from darts_lora.finetune import FinetuneConfig, add_adapter, finetune
from darts_lora.genotype import Genotype
from darts_lora.models import load_model, load_processor

DATA = DataConfig(max_train_samples=40)
TRAINING = TrainingConfig(max_steps=3, batch_size=4, logging_steps=1, save_steps=2)


@pytest.fixture(scope="module")
def genotype(tmp_path_factory):
    """A genotype file with ranks 0, 2 and 4 in turn over the embedded model's linear layers."""
    modules = load_model(ModelConfig()).named_modules()
    names = [name for name, m in modules if isinstance(m, nn.Linear) and name != "lm_head"]
    path = tmp_path_factory.mktemp("search") / "genotype.json"
    Genotype({name: (0, 2, 4)[i % 3] for i, name in enumerate(names)}).save(path)
    return str(path)


@pytest.fixture(scope="module")
def run(genotype, tmp_path_factory):
    """A finetune of three steps: its folder, its model and its record."""
    folder = str(tmp_path_factory.mktemp("finetune"))
    model, record = finetune(
        FinetuneConfig(genotype, output_dir=folder), ModelConfig(), DATA, TRAINING
    )
    return folder, model, record


def batch():
    rows = load_splits(DATA)["validation"]
    return Collator(load_processor(ModelConfig()))([rows[i] for i in range(4)])


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def test_the_saved_adapter_alone_gives_the_same_logits(run):
    folder, model, _ = run
    expected = logits(model)
    base = load_model(ModelConfig())
    assert (logits(base) - expected).abs().max() > 1e-4, "training must have changed something"
    loaded = PeftModel.from_pretrained(base, folder)
    assert (logits(loaded) - expected).abs().max() <= 1e-5
    assert (logits(loaded.merge_and_unload()) - expected).abs().max() <= 1e-5


def test_the_record_and_the_ranks(run, genotype):
    folder, model, record = run
    with open(os.path.join(folder, "finetune.json")) as file:
        assert json.load(file) == json.loads(json.dumps(record))
    ranks = Genotype.load(genotype).with_shapes(load_model(ModelConfig()))
    assert record["trainable_parameters"] == ranks.num_parameters
    assert record["rows"] == 40 and record["steps"] == 3
    assert [step for step, _ in record["losses"]] == [1, 2, 3]
    assert 0 < record["supervised_share"] < 1
    state = load_file(os.path.join(folder, "adapter_model.safetensors"))
    for name, rank in ranks.ranks.items():
        a = state.get(f"base_model.model.{name}.lora_A.weight")
        assert (0 if a is None else len(a)) == rank
    assert sorted(os.listdir(os.path.join(folder, "checkpoint")))[:2] == [
        "README.md",
        "adapter_config.json",
    ]


def test_the_same_seed_gives_the_same_adapter(run, genotype, tmp_path):
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    finetune(config, ModelConfig(), DATA, TRAINING)
    name = "adapter_model.safetensors"
    first, second = load_file(os.path.join(run[0], name)), load_file(tmp_path / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_uniform_rank_uses_the_layers_of_the_genotype(genotype):
    found = Genotype.load(genotype)
    model = add_adapter(load_model(ModelConfig()), FinetuneConfig(genotype, rank=3), found)
    ranks = {n: len(p) for n, p in model.named_parameters() if "lora_A" in n}
    assert set(ranks.values()) == {3} and len(ranks) == len(found.ranks)


def test_a_uniform_rank_without_a_genotype():
    config = FinetuneConfig(None, rank=2, target_modules=["q_proj"], scaling=4.0)
    model = add_adapter(load_model(ModelConfig()), config, None)
    adapted = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert adapted and all("q_proj" in name for name in adapted)
    assert model.peft_config["default"].lora_alpha == 8
    with pytest.raises(InputError, match="target_modules='nothing': "):
        add_adapter(
            load_model(ModelConfig()), FinetuneConfig(None, rank=2, target_modules="nothing"), None
        )


def test_inherited_weights_are_those_of_the_chosen_branches(genotype, tmp_path):
    base = load_model(ModelConfig())
    found = Genotype.load(genotype)
    names = list(found.ranks)[:3]
    shapes = {n: (m.in_features, m.out_features) for n, m in base.named_modules() if n in names}
    path = str(tmp_path / "genotype.json")
    small = Genotype({n: found.ranks[n] for n in names}, candidates=[0, 2, 4], branches="nested")
    small.save(path)
    with pytest.raises(InputError, match="searched weights"):
        add_adapter(base, FinetuneConfig(path, init="inherit"), small)

    searched = {}
    for name, (inputs, outputs) in shapes.items():
        searched[f"{name}.lora_A"] = torch.randn(4, inputs)
        searched[f"{name}.lora_B"] = torch.randn(outputs, 4)
    save_file(searched, tmp_path / "supernet.safetensors")
    model = add_adapter(load_model(ModelConfig()), FinetuneConfig(path, init="inherit"), small)
    state = model.state_dict()
    for name, rank in small.ranks.items():
        if rank:
            a = state[f"base_model.model.{name}.lora_A.default.weight"]
            b = state[f"base_model.model.{name}.lora_B.default.weight"]
            assert torch.equal(a, searched[f"{name}.lora_A"][:rank])
            assert torch.equal(b, searched[f"{name}.lora_B"][:, :rank])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(genotype, tmp_path):
    training = TrainingConfig(
        max_steps=9, batch_size=4, learning_rate=1e30, max_grad_norm=0, save_steps=1
    )
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"the loss is \S+ at step [2-9]: stopped; lower"):
        finetune(config, ModelConfig(), DATA, training)
    assert (tmp_path / "checkpoint" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": "warm"}, "init='warm': must be one of scratch, inherit"),
        ({"genotype": None}, "give a genotype, or a rank"),
        ({"rank": 0}, "rank=0: must be an integer >= 1"),
        ({"rank": 2, "init": "inherit"}, "leaves weights for its genotype alone"),
        ({"scaling": 0.0}, "scaling=0.0: must be a number > 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(InputError) as error:
        FinetuneConfig(**options)
    assert text in str(error.value)


def test_what_is_missing_is_named_with_what_to_do(tmp_path):
    config = FinetuneConfig(str(tmp_path / "genotype.json"), output_dir=str(tmp_path))
    with pytest.raises(InputError, match="no such file; run `accelerate launch recipes/search.py`"):
        finetune(config, ModelConfig(), DATA, TRAINING)
    path = str(tmp_path / "foreign.json")
    Genotype({"model.no.such.layer": 2}).save(path)
    with pytest.raises(InputError, match="model.no.such.layer"):
        finetune(FinetuneConfig(path, output_dir=str(tmp_path)), ModelConfig(), DATA, TRAINING)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir=.*cannot be written"):
        finetune(FinetuneConfig(path, output_dir=str(tmp_path / "file")), *[None] * 3)
