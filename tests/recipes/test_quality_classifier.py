"""recipes/benchmark/quality.py on a classifier: its head is trained in full, as in PEFT.
Not here: models that generate text (test_quality.py)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from families import TEXT, deberta, make_family, tokenizer
from peft import get_peft_model
from torch import nn

from darts_lora import Genotype, InputError, SearchConfig
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.loaders import load_splits, make_collator
from darts_lora.evaluate import score
from darts_lora.lora.models import load_model
from darts_lora.lora.targets import match_modules

CPU = torch.device("cpu")


def bert(folder: str, **dropout) -> None:
    config = t.BertConfig(
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}, num_labels=3, **dropout
    )
    t.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def everything(benchmark_imports, tmp_path_factory):
    """Options of a run on a tiny BERT with dropout, and 48 rows with a class."""
    from quality_cells import QualityRun

    root = tmp_path_factory.mktemp("classifier")
    colours = ["red", "green", "blue"]
    for split, count in (("train", 48), ("test", 12)):
        starts = ("which colour is it please", "is it")
        rows = [{"text": f"{starts[i % 2]} {colours[i % 3]}", "label": i % 3} for i in range(count)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = QualityRun(
        benchmark="tiny", output_dir=str(root / "runs"), methods=["uniform", "one_run"],
        curve=[1, 2], budgets=[2], seeds=[0], learning_rates=[0.01], eval_batch_size=5,
    )  # fmt: skip
    files = {split: str(root / f"{split}.jsonl") for split in ("train", "test")}
    model = make_family(bert, str(root / "model"))
    return (
        options,
        SearchConfig(ranks=(0, 1, 2, 4)),
        ModelConfig(model),
        DataConfig("json", files, split_by="row"),
        TrainingConfig(max_steps=12, batch_size=8),
    )


def test_retraining_a_classifier_is_that_of_peft_with_its_head(everything, tmp_path):
    from quality_rows import EncodedRows, mean_loss, model_inputs, supervised_loss
    from quality_training import Retrainer, Retraining

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ModelConfig(make_family(lambda f: bert(f, **no_dropout), str(tmp_path)))
    data, training = everything[3], TrainingConfig(max_steps=6, batch_size=8, max_grad_norm=0.5)
    collator = make_collator(config, data)
    rows = EncodedRows(load_splits(data)["train"], collator, CPU)
    model, indices = load_model(config), list(range(len(rows)))
    names = match_modules(model, "all-linear")
    assert "classifier" not in names
    retrainer = Retrainer(
        model, names, largest=4, scaling=2.0, training=training, stack=2, whole=["classifier"]
    )
    plan = {name: (0, 1, 2, 4)[i % 4] for i, name in enumerate(names)}
    job, other = (Retraining(plan, indices, seed, 0.05) for seed in (3, 5))
    head = model.classifier.weight.detach().clone()
    _, result = retrainer.retrain([other, job], rows)
    with retrainer.adapters(1):
        loss = mean_loss(model, rows, indices, 7)
    weight, bias = (value.clone() for value in retrainer.trained(1)["classifier"])
    assert torch.equal(model.classifier.weight, head) and not torch.allclose(weight, head)
    retrainer._reset(0, job)
    first = {n: a[: plan[n]].clone() for n, (a, _) in retrainer.trained().items() if n in plan}

    batch = rows.batch(indices[:5])
    torch.testing.assert_close(supervised_loss(model, batch), model(**model_inputs(batch)).loss)
    genotype = Genotype(plan, modules_to_save=["classifier"])
    peft_model = get_peft_model(model, genotype.to_lora_config(model))
    for name, rank in plan.items():
        if rank:
            layer = peft_model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = first[name]
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.0)
    scheduler = t.get_scheduler("cosine", optimizer, 0, 6)
    order = rows.batches(indices, 8, 3).endless()
    for _ in range(6):
        step_loss = peft_model(**model_inputs(rows.batch(next(order)))).loss
        step_loss.backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert result["train_loss"] == pytest.approx(step_loss.item(), rel=1e-4)
    trained = peft_model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(weight, trained.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(bias, trained.bias, rtol=1e-3, atol=1e-5)
    judged = score(peft_model, load_splits(data)["train"], collator, exact_match=False)
    assert loss == pytest.approx(judged["loss"], rel=1e-4)


def test_a_run_goes_on_with_the_head_of_its_search(everything):
    """And a cell is the same however many were computed before: dropout is the seed's."""
    import quality
    from quality_cells import Cell, Store

    quality.main(*everything)
    folder = Path(everything[0].output_dir) / "tiny"
    finals = {p.name.split("-")[0]: json.loads(p.read_text()) for p in folder.glob("*-final-*")}
    assert set(finals) == {"uniform", "one_run"}
    store, task = Store(folder), quality.Task(*everything)
    for cell, loss in (
        (Cell("final", "uniform", 2, 0, None, 0.01), None),
        (Cell("final", "one_run", 2, 0, 0.01, 0.01), finals["one_run"]["loss"]),
    ):
        (again,) = task.compute([cell], store)
        assert again["loss"] == pytest.approx(loss or store.get(cell)["loss"], rel=1e-5)
    setting = task.setting(cell.plan)
    quality.METHODS["one_run"].plans([setting])
    weight, bias = setting.kept["classifier"]
    assert weight.shape == (3, TEXT["hidden_size"]) and bias.shape == (3,)
    assert not torch.allclose(weight, task.retrainer.whole["classifier"].weight)
    job = task._job(cell, store)
    assert torch.equal(job.first["classifier"], weight) and "classifier" not in job.plan


def test_other_methods_and_heads_are_refused(everything):
    import quality
    from quality_stacked import linear_modules

    options = replace(everything[0], methods=["uniform", "gora"])
    with pytest.raises(InputError, match=r"methods=\['gora'\]: cannot train classifier in full"):
        quality.Task(options, *everything[1:])
    model = load_model(everything[2])
    with pytest.raises(InputError, match="bert: only linear modules can be trained in full"):
        linear_modules(model, ["bert"])


def test_a_head_that_is_drawn_at_random_is_the_same_at_each_load(everything, tmp_path):
    from quality_rows import task_digest

    model = ModelConfig(make_family(deberta, str(tmp_path)), task="classification", num_labels=3)
    torch.manual_seed(1)
    digest = task_digest(model, everything[3])
    torch.manual_seed(2)
    assert task_digest(model, everything[3]) == digest
