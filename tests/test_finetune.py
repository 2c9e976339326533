"""Retraining as a plain PEFT adapter: what is trained, what is saved, when it stops.
Not here: the recipe around it (recipes/test_recipes.py)."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import transformers as t
from families import bert, deberta, make_family
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from darts_lora import (
    DivergedError,
    Genotype,
    InputError,
    SearchConfig,
    Supernet,
    discretize,
)
from darts_lora import finetune as finetune_module
from darts_lora.base.interruption import Stopped
from darts_lora.base.options import load_config
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.data.loaders import load_splits, split_record
from darts_lora.data.places import ROW
from darts_lora.finetune import FinetuneConfig, add_adapter, finetune
from darts_lora.lora.models import load_model, load_processor
from darts_lora.lora.parts import layer_type
from small_models import cut_to, randomise

TRAINING = TrainingConfig(max_steps=3, batch_size=4, logging_steps=1, save_steps=2)


@pytest.fixture(scope="module")
def run(genotype, base_config, data, tmp_path_factory):
    """A finetune of three steps: its folder, its model and its record."""
    folder = tmp_path_factory.mktemp("finetune")
    config = FinetuneConfig(genotype, output_dir=str(folder))
    model, record = finetune(config, base_config, data, TRAINING)
    return folder, model, record


@pytest.fixture(scope="module")
def batch(base_config, data):
    rows = load_splits(data)["validation"]
    return Collator(load_processor(base_config))([rows[i] for i in range(8)])


def last_checkpoint(folder):
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def test_the_saved_adapter_alone_gives_the_same_logits(run, base_config, batch):
    folder, model, _ = run
    expected = logits(model, batch)
    base = load_model(base_config)
    assert (logits(base, batch) - expected).abs().max() > 1e-3, "training must change something"
    loaded = PeftModel.from_pretrained(base, folder)
    assert (logits(loaded, batch) - expected).abs().max() <= 1e-5
    assert (logits(loaded.merge_and_unload(), batch) - expected).abs().max() <= 1e-5


def test_the_padded_folder_gives_the_same_logits_by_one_rank(
    genotype, base_config, data, batch, tmp_path
):
    config = FinetuneConfig(genotype, pad_to_max=True, output_dir=str(tmp_path))
    model, _ = finetune(config, base_config, data, replace(TRAINING, learning_rate=0.1))
    expected, base = logits(model, batch), load_model(base_config)
    assert (logits(base, batch) - expected).abs().max() > 1e-1
    padded = PeftModel.from_pretrained(base, tmp_path / "padded")
    assert (logits(padded, batch) - expected).abs().max() <= 1e-5
    read = padded.peft_config["default"]
    assert (read.r, read.lora_alpha) == (4, 8) and not read.rank_pattern and not read.alpha_pattern
    adapted = {n for n, rank in Genotype.load(genotype).ranks.items() if rank > 0}
    modules = {n: m for n, m in padded.base_model.model.named_modules() if hasattr(m, "lora_A")}
    used = {layer_type(name) for name in adapted}
    assert {layer_type(name) for name in modules} == used and adapted < modules.keys()
    assert {(m.r["default"], m.scaling["default"]) for m in modules.values()} == {(4, 2.0)}
    own, wide = weights(tmp_path), weights(tmp_path / "padded")
    assert {key for key in wide if "lora_B" in key and wide[key].any()} == {
        key for key in own if "lora_B" in key
    }
    assert {min(value.shape) for value in own.values()} == {2, 4}
    assert {min(value.shape) for value in wide.values()} == {4}


def label_data(folder):
    rows = [{"text": f"it is {c}", "label": i} for i, c in enumerate(("red", "green", "blue"))]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in 4 * rows)
        (folder / f"{split}.jsonl").write_text(text)
    return DataConfig(
        "json", {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    )


def test_a_classifiers_head_is_trained_and_saved_with_the_adapter(tmp_path):
    data, model = label_data(tmp_path), ModelConfig(make_family(bert, str(tmp_path / "bert")))
    config = FinetuneConfig(None, rank=2, output_dir=str(tmp_path / "out"))
    trained, record = finetune(config, model, data, TRAINING)
    head = load_model(model).classifier
    state = weights(tmp_path / "out")
    for part in ("weight", "bias"):
        saved = state[f"base_model.model.classifier.{part}"]
        assert not torch.equal(saved, getattr(head, part))
    size = sum(p.numel() for p in head.parameters())
    lora = sum(value.numel() for key, value in state.items() if "lora_" in key)
    assert record["trainable_parameters"] == lora + size
    ids = torch.randint(0, 11, (4, 7))
    loaded = PeftModel.from_pretrained(load_model(model), tmp_path / "out").eval()
    assert torch.allclose(loaded(ids).logits, trained.eval()(ids).logits, atol=1e-6)


@pytest.mark.parametrize("searched", [False, True])
def test_what_a_checkpoint_lacks_is_trained_and_saved_with_the_adapter(tmp_path, searched):
    """Each load draws DeBERTa's pooler anew: the adapter must bring the one that was trained."""
    folder, path = make_family(deberta, str(tmp_path / "deberta")), None
    model = ModelConfig(folder, task="classification", num_labels=3)
    if searched:
        path = str(tmp_path / "genotype.json")
        supernet = Supernet(load_model(model), SearchConfig(ranks=(1, 2)))
        assert list(supernet.saved_modules) == ["pooler.dense", "classifier"]
        found = Genotype.from_supernet(supernet)
        found.save(path)
    config = FinetuneConfig(path, rank=2, output_dir=str(tmp_path / "out"))
    trained, _ = finetune(config, model, label_data(tmp_path), TRAINING)
    pooler = trained.base_model.model.pooler.dense
    assert not torch.equal(pooler.weight, pooler.original_module.weight)
    saved = weights(tmp_path / "out")["base_model.model.pooler.dense.weight"]
    assert torch.equal(saved, pooler.weight)
    ids = torch.randint(0, 11, (4, 7))
    loaded = PeftModel.from_pretrained(load_model(model), tmp_path / "out").eval()
    assert torch.allclose(loaded(ids).logits, trained.eval()(ids).logits, atol=1e-6)
    if searched:
        old = replace(found, modules_to_save=["classifier"])
        with pytest.raises(
            InputError, match=r"^genotype='old\.json': .* no weights for pooler\.dense"
        ):
            add_adapter(load_model(model), FinetuneConfig("old.json"), old)


def test_a_head_of_two_layers_is_trained_in_full_without_a_genotype():
    """PEFT saves DistilBERT's pre_classifier as well, by the end of its name."""
    config = t.DistilBertConfig(vocab_size=64, dim=16, n_heads=2, hidden_dim=24, n_layers=1)
    model = t.DistilBertForSequenceClassification(config)
    adapted = add_adapter(model, FinetuneConfig(None, rank=2), None).base_model.model
    for name in ("pre_classifier", "classifier"):
        copied = adapted.get_submodule(name).modules_to_save["default"]
        assert type(copied) is nn.Linear and copied.weight.requires_grad
    assert hasattr(adapted.distilbert.transformer.layer[0].ffn.lin1, "lora_A")


def test_the_record_and_the_ranks(run, genotype, base_config):
    folder, _, record = run
    assert json.loads((folder / "finetune.json").read_text()) == json.loads(json.dumps(record))
    ranks = Genotype.load(genotype).with_shapes(load_model(base_config))
    assert record["trainable_parameters"] == ranks.num_parameters
    assert record["rows"] == 40 and record["steps"] == 3
    assert [step for step, _ in record["losses"]] == [1, 2, 3]
    assert record["loss"] == record["losses"][-1][1] > 0
    assert 0 < record["supervised_share"] < 1
    state = weights(folder)
    for name, rank in ranks.ranks.items():
        a = state.get(f"base_model.model.{name}.lora_A.weight")
        assert (0 if a is None else len(a)) == rank


def test_each_pattern_hits_one_module_and_rank_0_none(run, genotype):
    _, model, _ = run
    config, ranks = model.peft_config["default"], Genotype.load(genotype).ranks
    names = [name for name, _ in model.base_model.model.named_modules()]
    for key, rank in config.rank_pattern.items():
        (hit,) = [n for n in names if re.match(rf"(.*\.)?({key})$", n)]  # PEFT's own rule
        assert ranks[hit] == rank
    for name, rank in ranks.items():
        adapted = model.base_model.model.get_submodule(name)
        assert hasattr(adapted, "lora_A") == (rank > 0)
        assert rank == 0 or adapted.scaling["default"] == 2.0


@pytest.mark.parametrize(("batch_size", "accumulation"), [(40, 1), (8, 5)])
def test_the_first_loss_is_the_base_models_over_all_tokens(
    genotype, base_config, data, tmp_path, batch_size, accumulation
):
    """Fresh LoRA weights change nothing; answers have unlike lengths: tokens count, not batches."""
    rows = [row for split in load_splits(data).values() for row in split]
    with torch.no_grad():
        expected = load_model(base_config)(**Collator(load_processor(base_config))(rows)).loss
    training = TrainingConfig(1, batch_size, accumulation)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    _, record = finetune(config, base_config, data, training)
    assert record["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_the_same_seed_gives_the_same_adapter(run, genotype, base_config, data, tmp_path):
    first, states = weights(run[0]), []
    for seed in (0, 1):
        config = FinetuneConfig(genotype, output_dir=str(tmp_path), seed=seed)
        finetune(config, base_config, data, TRAINING)
        states.append(weights(tmp_path))
    assert all(torch.equal(first[key], states[0][key]) for key in first)
    # three steps of 1e-3 move no weight by more: what is apart by 0.01 began apart
    begun = [key for key in first if "lora_A" in key]
    assert not any(torch.allclose(first[key], states[1][key], atol=1e-2) for key in begun)


def test_recomputing_activations_changes_nothing(run, genotype, base_config, data, tmp_path):
    recomputing = replace(base_config, gradient_checkpointing=True)
    finetune(FinetuneConfig(genotype, output_dir=str(tmp_path)), recomputing, data, TRAINING)
    first, second = weights(run[0]), weights(tmp_path)
    for key in first:
        assert torch.allclose(first[key], second[key], atol=1e-6), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_a_base_in_bfloat16(genotype, base_config, data, tmp_path, dtype, monkeypatch):
    """Weights of either dtype; both products read the activation itself, and no copy of it."""
    read = {"base_layer": [], "lora_A": []}

    def record(module, args):
        if name := kinds.get(id(module)):
            read[name].append((args[0].data_ptr(), args[0].dtype))

    config = FinetuneConfig(genotype, output_dir=str(tmp_path), adapter_dtype=dtype)
    base = replace(base_config, dtype="bfloat16")
    adapted = add_adapter(load_model(base), config, Genotype.load(genotype))
    kinds = {
        id(module): part
        for name, module in adapted.named_modules()
        for part in read
        if part in name.split(".")[-2:]
    }
    monkeypatch.setattr(finetune_module, "add_adapter", lambda *args: adapted)
    with nn.modules.module.register_module_forward_pre_hook(record):
        model, _ = finetune(config, base, data, TRAINING)
    assert read["lora_A"] and read["lora_A"] == read["base_layer"]
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in weights(tmp_path).values()} == {wanted}


def test_a_run_shorter_than_the_log_interval_has_a_loss_all_the_same(
    genotype, base_config, data, tmp_path, capsys
):
    training = replace(TRAINING, logging_steps=50, save_steps=0)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    _, record = finetune(config, base_config, data, training)
    assert [step for step, _ in record["losses"]] == [3] and record["loss"] > 0
    assert not (tmp_path / "checkpoints").exists()
    out, err = capsys.readouterr()
    assert "{'" not in out + err, "no dictionaries on the screen"
    assert "3/3" in err and f"loss={record['loss']:.4f}" in err


@pytest.mark.parametrize("test_split", ["test", None])
def test_training_and_validation_rows_are_all_used_and_test_rows_never(
    monkeypatch, genotype, base_config, data, tmp_path, test_split
):
    data, seen = replace(data, test_split=test_split, split_by="row"), []

    def spy(model, dataset, *args, **options):
        seen.extend(dataset[ROW])
        return {}

    monkeypatch.setattr(finetune_module, "train", spy)
    finetune(FinetuneConfig(genotype, output_dir=str(tmp_path)), base_config, data, TRAINING)
    held = split_record(load_splits(data, ["test"]), data)["test"] if test_split is None else []
    assert len(held) == (4 if test_split is None else 0)
    assert sorted(seen + held) == list(range(40))


def test_one_process_uses_one_of_several_gpus(monkeypatch, genotype, base_config, data, tmp_path):
    """The machine is pretended; what runs is on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    batches, call = [], Collator.__call__

    def count(collator, rows):
        batches.append(len(rows))
        return call(collator, rows)

    monkeypatch.setattr(Collator, "__call__", count)
    finetune(FinetuneConfig(genotype, output_dir=str(tmp_path)), base_config, data, TRAINING)
    assert len(batches) >= 3 and set(batches) == {1, TRAINING.batch_size}, "1: of the check"


def test_a_uniform_rank_uses_the_layers_of_the_genotype(genotype, base_config):
    found = Genotype.load(genotype)
    model = add_adapter(load_model(base_config), FinetuneConfig(genotype, rank=3), found)
    ranks = {n: len(p) for n, p in model.named_parameters() if "lora_A" in n}
    assert set(ranks.values()) == {3} and len(ranks) == len(found.ranks)


def test_a_uniform_rank_without_a_genotype(base_config):
    config = FinetuneConfig(None, rank=2, target_modules=["q_proj"], scaling=4.0)
    model = add_adapter(load_model(base_config), config, None)
    adapted = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert adapted and all("q_proj" in name for name in adapted)
    assert model.peft_config["default"].lora_alpha == 8
    config = FinetuneConfig(None, rank=2, target_modules="nothing")
    with pytest.raises(InputError, match="target_modules='nothing': "):
        add_adapter(load_model(base_config), config, None)


@pytest.fixture(scope="module")
def searched(base_config, batch, tmp_path_factory):
    """A search's folder, and the logits of its supernet where each layer takes its choice."""
    supernet = Supernet(load_model(base_config), SearchConfig(ranks=(0, 2, 4)))
    randomise(supernet)
    genotype = discretize(supernet)
    assert set(genotype.ranks.values()) == {0, 2, 4}
    folder = tmp_path_factory.mktemp("searched")
    genotype.save(folder / "genotype.json")
    save_file(supernet.state_dict(), folder / "supernet.safetensors")
    with cut_to(supernet, genotype.ranks):
        return folder, logits(supernet.model, batch)


def test_an_inherited_adapter_begins_where_the_supernet_ended(searched, base_config, data, batch):
    folder, expected = searched
    config = FinetuneConfig(
        str(folder / "genotype.json"), init="inherit", output_dir=str(folder / "finetune")
    )
    still = replace(TRAINING, max_steps=1, learning_rate=1e-12)
    model, _ = finetune(config, base_config, data, still)
    base = logits(load_model(base_config), batch)
    assert (base - expected).abs().max() > 1e-1
    assert (logits(model, batch) - expected).abs().max() <= 1e-4


@pytest.fixture
def half_run(searched, tmp_path):
    """The same, found by the first two of a run's five steps."""
    folder, _ = searched
    genotype = Genotype.load(folder / "genotype.json")
    replace(genotype, found_by={"steps": 2, "run_steps": 5}).save(tmp_path / "genotype.json")
    shutil.copy(folder / "supernet.safetensors", tmp_path)
    return tmp_path


def test_a_finetune_takes_what_the_search_left_of_the_run(half_run, base_config, data, monkeypatch):
    rates = []
    monkeypatch.setattr(
        "darts_lora.run.callbacks.Checkpoints.on_step_begin",
        lambda self, *args, **kwargs: rates.append(kwargs["lr_scheduler"].get_last_lr()[0]),
    )
    training = replace(TRAINING, max_steps=5, learning_rate=0.1, lr_warmup_steps=3)
    path, out = str(half_run / "genotype.json"), str(half_run / "out")
    _, record = finetune(FinetuneConfig(path, output_dir=out), base_config, data, training)
    assert (record["first_step"], record["steps"], record["init"]) == (2, 3, "inherit")
    assert rates == pytest.approx([0.1 * 2 / 3, 0.1, 0.1 * (1 + math.cos(math.pi / 2)) / 2])
    rates.clear()
    config = FinetuneConfig(path, init="scratch", output_dir=out)
    _, record = finetune(config, base_config, data, training)
    assert (record["first_step"], record["steps"], record["init"]) == (0, 5, "scratch")
    assert rates[:3] == pytest.approx([0, 0.1 / 3, 0.2 / 3]) and len(rates) == 5


def test_a_run_that_cannot_go_on_is_told_before_it_starts(half_run, base_config, data):
    path = str(half_run / "genotype.json")
    config = FinetuneConfig(path, output_dir=str(half_run / "out"))
    with pytest.raises(InputError, match="max_steps=2: the run's steps, of which the search too"):
        finetune(config, base_config, data, replace(TRAINING, max_steps=2))
    (half_run / "supernet.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no .*supernet\.safetensors to go on from"):
        finetune(config, base_config, data, TRAINING)


def test_searched_weights_that_do_not_fit(searched, base_config, tmp_path):
    folder, _ = searched
    genotype = Genotype.load(folder / "genotype.json")
    path = tmp_path / "genotype.json"
    genotype.save(path)
    config = FinetuneConfig(str(path), init="inherit")
    of_another = replace(genotype, found_by={"supernet_digest": "00"})
    with pytest.raises(InputError, match=r"is of another search than the weights in '.*derive it"):
        of_another.inherited_state(folder / "supernet.safetensors")
    with pytest.raises(InputError, match=r"searched weights .*supernet\.safetensors"):
        add_adapter(load_model(base_config), config, genotype)
    foreign = {}
    for name in genotype.ranks:
        parts = {"lora_A": torch.randn(8, 5), "lora_B": torch.randn(5, 8), "gates": torch.ones(8)}
        foreign |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(foreign, tmp_path / "supernet.safetensors")
    with pytest.raises(InputError, match=r"init='inherit': .* is of another model"):
        add_adapter(load_model(base_config), config, genotype)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(
    genotype, base_config, data, tmp_path
):
    training = replace(TRAINING, max_steps=9, learning_rate=1e30, max_grad_norm=0, save_steps=1)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step [2-9]: stopped; lower"):
        finetune(config, base_config, data, training)
    assert weights(last_checkpoint(tmp_path))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def faulty(monkeypatch, act, step):
    """Make a training that acts in step `step` (from 1)."""
    calls, compute = itertools.count(1), finetune_module.FinetuneTrainer.training_step

    def training_step(self, *args, **kwargs):
        if next(calls) == step:
            act()
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(finetune_module.FinetuneTrainer, "training_step", training_step)


def test_a_finetune_that_is_asked_to_stop_saves_its_adapter(
    monkeypatch, genotype, base_config, data, tmp_path, capsys
):
    held = []

    def ask():
        held.append((tmp_path / "run.lock").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    faulty(monkeypatch, ask, step=2)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    with pytest.raises(Stopped) as stopped:
        finetune(config, base_config, data, replace(TRAINING, save_steps=0))
    assert stopped.value.code == 143
    kept = tmp_path / "checkpoints" / "checkpoint-2"
    told = f"SIGTERM: stopped after step 2 of 3; the last checkpoint is {kept}, --resume goes on"
    assert told in capsys.readouterr().err
    assert weights(kept)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert held == [True] and not (tmp_path / "run.lock").exists()


def test_what_is_asked_for_behind_the_last_step_waits_until_all_is_written(
    monkeypatch, genotype, base_config, data, tmp_path
):
    write = finetune_module.write_into

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args, **options)

    monkeypatch.setattr(finetune_module, "write_into", signalled)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path), pad_to_max=True)
    finetune(config, base_config, data, replace(TRAINING, save_steps=0))
    whole = {*finetune_module.RESULTS} - {"evaluation.json"}
    assert whole <= {*os.listdir(tmp_path)}


@pytest.mark.parametrize("renamed", [0, 1, 3])
def test_a_finetune_killed_while_it_is_written_leaves_nothing_of_the_one_before(
    monkeypatch, genotype, base_config, data, tmp_path, renamed
):
    """Its files come one after the other; without the weights, the last, no recipe takes them."""
    config = FinetuneConfig(genotype, output_dir=str(tmp_path), pad_to_max=True)
    finetune(config, base_config, data, TRAINING)
    adapter = "adapter_model.safetensors"
    before = weights(tmp_path)
    replace_file, calls = os.replace, itertools.count()

    def killed(source, target):
        last = os.path.dirname(target) == str(tmp_path)
        if last and next(calls) == renamed:
            raise KeyboardInterrupt
        return replace_file(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(replace(config, seed=1), base_config, data, TRAINING)
    left = {*os.listdir(tmp_path)} & {*finetune_module.RESULTS}
    assert adapter not in left
    if "config.yaml" in left:
        assert load_config(str(tmp_path / "config.yaml"))["seed"] == 1
    if "padded" in left:
        padded = weights(tmp_path / "padded")
        assert any(not torch.equal(before[n][:2], padded[n][:2]) for n in before if "lora_B" in n)


def test_a_tensorboard_that_cannot_write_is_left_out_with_one_warning(
    monkeypatch, genotype, base_config, data, tmp_path
):
    def full(*_):
        raise OSError(28, "No space left on device")

    config = FinetuneConfig(genotype, output_dir=str(tmp_path / "full"))
    with monkeypatch.context() as patch, pytest.warns(UserWarning) as told:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        finetune(config, base_config, data, TRAINING)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tensorboard").write_text("a file where the folder would be")
    with pytest.warns(UserWarning) as also:
        finetune(replace(config, output_dir=str(tmp_path / "file")), base_config, data, TRAINING)
    for warned in (told, also):
        about = [str(w.message) for w in warned if "TensorBoard is left out" in str(w.message)]
        assert len(about) == 1
    assert weights(tmp_path / "full") and weights(tmp_path / "file")


def test_a_finetune_without_memory_says_what_to_reduce(
    monkeypatch, genotype, base_config, data, tmp_path
):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    faulty(monkeypatch, run_out, step=3)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    with pytest.raises(
        InputError, match=r"^out of memory .*the last checkpoint is .*checkpoint-2, --"
    ):
        finetune(config, base_config, data, TRAINING)


def test_a_folder_of_the_users_own_is_not_replaced(genotype, base_config, data, tmp_path):
    (tmp_path / "padded").mkdir()
    (tmp_path / "padded" / "notes.txt").write_text("mine")
    config = FinetuneConfig(genotype, output_dir=str(tmp_path), pad_to_max=True)
    with pytest.raises(InputError, match=r"output_dir=.*has a folder 'padded' that holds no"):
        finetune(config, base_config, data, TRAINING)
    assert (tmp_path / "padded" / "notes.txt").read_text() == "mine"


def test_what_an_earlier_finetune_left_is_gone_when_another_trains(
    monkeypatch, genotype, base_config, data, tmp_path
):
    config = FinetuneConfig(genotype, pad_to_max=True, output_dir=str(tmp_path))
    finetune(config, base_config, data, TRAINING)
    (tmp_path / "evaluation.json").write_text("{}")
    before = {*os.listdir(tmp_path)}
    with pytest.raises(InputError, match="target_modules"):
        wrong = replace(config, genotype=None, rank=3, target_modules="nothing")
        finetune(wrong, base_config, data, TRAINING)
    assert {*os.listdir(tmp_path)} == before, "bad input removes nothing"

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    faulty(monkeypatch, run_out, step=1)
    with pytest.raises(InputError, match=r"^out of memory .*; no checkpoint was written$"):
        finetune(replace(config, rank=3), base_config, data, TRAINING)
    gone = {*finetune_module.RESULTS, "README.md", "ranks.png"}
    assert before - {*os.listdir(tmp_path)} == gone


def test_a_full_disk_at_the_end_is_told_and_leaves_no_half_adapter(
    monkeypatch, genotype, base_config, data, tmp_path
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    train = finetune_module.FinetuneTrainer.train

    def fill(self, **options):
        train(self, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))

    monkeypatch.setattr(finetune_module.FinetuneTrainer, "train", fill)
    config = FinetuneConfig(genotype, output_dir=str(tmp_path))
    try:
        with pytest.raises(InputError, match=r"adapter_model\.safetensors: cannot be written"):
            finetune(config, base_config, data, TRAINING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {*os.listdir(tmp_path)} - {"tensorboard"} == {"checkpoints", "config.yaml"}


class Signalled:
    """Rows whose data worker asks the whole job to stop: itself, and the process that trains."""

    def __init__(self, rows):
        self.rows, self.asked = list(rows), False

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if not self.asked:
            for process in (os.getpid(), os.getppid()):
                os.kill(process, signal.SIGTERM)
        self.asked = True
        return self.rows[row]


def test_a_signal_to_the_whole_job_leaves_the_data_worker_alive(
    base_config, data, tmp_path, capsys
):
    model = add_adapter(load_model(base_config), FinetuneConfig(None, rank=2), None)
    rows, collator = Signalled(load_splits(data)["train"]), Collator(load_processor(base_config))
    training = replace(TRAINING, save_steps=0, num_workers=1)
    with pytest.raises(Stopped) as stopped:
        finetune_module.train(model, rows, collator, training, str(tmp_path))
    assert stopped.value.code == 143 and "SIGTERM: stopped after step" in capsys.readouterr().err
    assert weights(last_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": "warm"}, "init='warm': must be one of scratch, inherit"),
        ({"genotype": None}, "give a genotype, or a rank"),
        ({"rank": 0}, "rank=0: must be an integer >= 1"),
        ({"rank": 2, "init": "inherit"}, "leaves weights for its genotype alone"),
        ({"scaling": 0.0}, "scaling=0.0: must be a number > 0"),
        ({"seed": -1}, "seed=-1: must be an integer >= 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(InputError) as error:
        FinetuneConfig(**options)
    assert text in str(error.value)


def test_sharded_weights_are_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"^distributed_type=FSDP: .*launch it with .*ddp\.yaml"):
        finetune(FinetuneConfig(output_dir=str(tmp_path)), *[None] * 3)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir=.*cannot be written"):
        finetune(FinetuneConfig(output_dir=str(tmp_path / "file")), *[None] * 3)


FOREIGN = '{"version": 1, "ranks": {"model.no.such.layer": 2}}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file; run `accelerate launch recipes/search.py`"),
        (FOREIGN, "first 'model.no.such.layer'; is it the model that was searched"),
        (FOREIGN[:-9], "cannot be read"),
        ('{"loss": 0.5}', ": must map module names to integers"),
    ],
)
def test_a_genotype_that_cannot_be_used_stops_before_training(
    monkeypatch, tmp_path, base_config, data, content, text
):
    monkeypatch.setattr(finetune_module, "train", lambda *a, **k: pytest.fail("trained"))
    path = tmp_path / "genotype.json"
    if content is not None:
        path.write_text(content)
    config = FinetuneConfig(str(path), output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError) as error:
        finetune(config, base_config, data, TRAINING)
    assert text in str(error.value)


def test_rows_without_an_answer_stop_before_the_model_is_loaded(
    monkeypatch, genotype, base_config, tmp_path
):
    monkeypatch.setattr(finetune_module, "load_model", lambda *a: pytest.fail("loaded"))
    turns = [{"role": "user", "content": "colour"}]
    (tmp_path / "train.jsonl").write_text(3 * (json.dumps({"messages": turns}) + "\n"))
    data = DataConfig("json", str(tmp_path / "train.jsonl"))
    config = FinetuneConfig(genotype, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"row \d, column 'messages': the last message is"):
        finetune(config, base_config, data, TRAINING)
