"""Evaluation: loss and exact match against reference values, base beside adapter, bad input.
Not here: the recipe around it (recipes/test_recipes.py)."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from families import TEXT, WORDS, deberta, make_family
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from darts_lora import InputError
from darts_lora.base.options import save_config
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import IGNORED, Collator
from darts_lora.data.loaders import load_splits
from darts_lora.evaluate import EvaluateConfig, evaluate, score
from darts_lora.lora.models import load_model, load_processor
from small_models import make_tokenizer


@pytest.fixture(scope="module")
def rows(data):
    return load_splits(data, ["test"])["test"]


@pytest.fixture(scope="module")
def collator(base_config):
    return Collator(load_processor(base_config))


@pytest.fixture(scope="module")
def adapter(base_config, tmp_path_factory):
    """Folder of a rank-2 adapter that changes the model, and its parameters."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(base_config), config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, model.get_nb_trainable_parameters()[0]


@pytest.fixture(scope="module")
def answered(base_config, rows, collator):
    """The rows, with the answers that the model gives to each alone, token by token, no cache."""
    model, answers = load_model(base_config), []
    end = collator.tokenizer.eos_token_id
    for row in rows:
        prompt, said = collator.evaluation([row])["prompt"], []
        while len(said) < 4 and end not in said:
            tokens = torch.cat([prompt["input_ids"], torch.tensor([said]).long()], dim=1)
            mask = prompt["cross_attention_mask"]
            mask = torch.cat([mask, mask[:, -1:].expand(-1, len(said), -1, -1)], dim=1)
            inputs = {**prompt, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            with torch.no_grad():
                logits = model(**inputs | {"cross_attention_mask": mask}, use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
        answers.append(collator.tokenizer.decode(said, skip_special_tokens=True))
    assert len(set(answers)) > 4, "the answers must depend on the rows"
    return with_answers(rows, answers)


def with_answers(rows, answers):
    questions = [messages[0] for messages in rows["messages"]]
    turns = [
        [question, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    return rows.remove_columns("messages").add_column("messages", turns)


@pytest.mark.parametrize("batch_size", [64, 5, 1])
def test_the_loss_is_the_mean_over_supervised_tokens(base_config, rows, collator, batch_size):
    model = load_model(base_config)
    batch = collator(list(rows))
    with torch.no_grad():
        expected = model(**batch).loss.item()
    result = score(model, rows, collator, batch_size=batch_size)
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    assert result["rows"] == 12
    assert result["supervised_tokens"] == int((batch["labels"] != IGNORED).sum()) == 27


@pytest.mark.parametrize("batch_size", [64, 5])
def test_answers_in_batches_are_those_of_each_row_alone(
    base_config, answered, collator, batch_size
):
    """Questions of two lengths, images of three shapes: padding and both image masks count."""
    result = score(
        load_model(base_config), answered, collator, batch_size=batch_size, max_new_tokens=4
    )
    assert result["exact_match"] == 1.0


def test_exact_match_counts_whole_answers(base_config, answered, collator):
    model = load_model(base_config)
    texts = [messages[1]["content"] for messages in answered["messages"]]
    longer = [f"{text} very".strip() if i % 3 == 0 else text for i, text in enumerate(texts)]
    result = score(model, with_answers(answered, longer), collator, max_new_tokens=4)
    assert result["exact_match"] == pytest.approx(8 / 12)
    long = [i for i, text in enumerate(texts) if len(text.split()) > 1]
    begun = with_answers(answered.select(long), [texts[i].split()[0] for i in long])
    assert len(begun) > 2
    assert score(model, begun, collator)["exact_match"] == 0.0, "the model's answer goes on"


def test_the_tokenizers_end_token_ends_answers_too(base_config, answered, collator):
    model = load_model(base_config)
    model.generation_config.eos_token_id = None
    assert score(model, answered, collator, max_new_tokens=4)["exact_match"] == 1.0


@pytest.mark.parametrize("adapted", [False, None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1e4},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": -9.0},
        {"suppress_tokens": list(range(6, 15))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_checkpoints_generation_config_does_not_steer_answers(
    base_config, answered, collator, options, adapted
):
    model = load_model(base_config)
    if adapted is not False:  # one that changes nothing
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=adapted))
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    given = model.generation_config.to_dict()
    assert score(model, answered, collator, max_new_tokens=4)["exact_match"] == 1.0
    assert model.generation_config.to_dict() == given


def test_what_the_template_writes_before_an_answer_belongs_to_it():
    """A model that learnt the rows by heart, of a template like Qwen3's with its empty <think>."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}[U]{% else %}[A]"
        "{% if loop.last %}e e {% endif %}{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    rows = [{"prompt": a, "completion": b} for a, b in ("ab", "bc", "cd")]
    collator, optimizer = Collator(tokenizer), torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(40):
        model(**collator(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score(model, Dataset.from_list(rows), collator)["exact_match"] == 1.0
    other = [{**row, "completion": "a"} for row in rows]
    assert score(model, Dataset.from_list(other), collator)["exact_match"] == 0.0


def test_base_and_adapter_side_by_side(adapter, base_config, data, rows, collator):
    folder, parameters = adapter
    results = evaluate(EvaluateConfig(str(folder)), base_config, data)
    base = score(load_model(base_config), rows, collator)
    assert results["base"] == {**base, "trainable_parameters": 0}
    assert results["adapter"]["trainable_parameters"] == parameters
    assert abs(results["adapter"]["loss"] - base["loss"]) > 1e-3
    assert json.loads((folder / "evaluation.json").read_text()) == results
    # what only training needs, and the comparison, change nothing
    recomputing = replace(base_config, gradient_checkpointing=True)
    alone = evaluate(EvaluateConfig(str(folder), compare_base=False), recomputing, data)
    assert alone == {"adapter": results["adapter"]}


def test_a_loss_that_is_not_finite_is_written_as_null(base_config, rows, collator):
    model = load_model(base_config)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert score(model, rows, collator)["loss"] is None


@pytest.mark.parametrize("saved", [["pooler.dense"], None])
def test_what_a_checkpoint_lacks_must_come_with_the_adapter(tmp_path, saved):
    base = ModelConfig(make_family(deberta, str(tmp_path / "base")), task="classification")
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"text": "{w} is it", "label": {i % 2}}}\n' for i, w in enumerate(WORDS))
    )
    data = DataConfig("json", {"train": str(path), "test": str(path)})
    config = LoraConfig(target_modules=["query_proj"], modules_to_save=saved, task_type="SEQ_CLS")
    get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    wanted = EvaluateConfig(str(tmp_path / "adapter"), compare_base=False)
    if saved is None:
        with pytest.raises(InputError, match=r"^adapter='.*no weights for pooler\.dense, and"):
            evaluate(wanted, base, data)
    else:
        assert evaluate(wanted, base, data) == evaluate(wanted, base, data)


@pytest.mark.parametrize(
    ("trained", "wanted", "told"),
    [
        ({}, {"test_split": None}, "test_split=None: .* trained with test_split='test', so rows"),
        ({"test_split": None}, {"test_split": None, "split_seed": 1}, "split_seed=1: .*seed=0"),
        ({"test_split": None}, {"test_split": None, "streaming": True}, "streaming=True: .*=False"),
        ({"test_split": None}, {"test_split": None}, None),
        ({"test_split": None}, {"split_seed": 1}, None),
    ],
)
def test_rows_that_the_adapter_may_have_seen_are_not_held_back(
    adapter, base_config, data, tmp_path, trained, wanted, told
):
    folder = str(shutil.copytree(adapter[0], tmp_path / "adapter"))
    data = replace(data, split_by="row")
    save_config(folder, replace(data, **trained))
    options = EvaluateConfig(folder, compare_base=False, exact_match=False)
    if told is None:
        result = evaluate(options, base_config, replace(data, **wanted))["adapter"]
        assert result["rows"] == (4 if "test_split" in wanted else 12)
        return
    with pytest.raises(InputError, match=told):
        evaluate(options, base_config, replace(data, **wanted))


def changed_adapter(adapter, folder, state=lambda state: state, **fields):
    """A copy of the adapter with other fields, or other weights."""
    shutil.copytree(adapter[0], folder, ignore=shutil.ignore_patterns("evaluation.json"))
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    save_file(state(load_file(weights)), weights)
    return EvaluateConfig(str(folder), exact_match=False)


def with_a_layer_more(state):
    name = next(name for name in state if ".layers.0." in name)
    return {**state, name.replace(".layers.0.", ".layers.9."): state[name].clone()}


@pytest.mark.parametrize("part", ["targets", "layers"])
def test_an_adapter_is_evaluated_as_a_whole_or_not_at_all(
    adapter, base_config, data, tmp_path, part
):
    """PEFT loads what fits, and drops the rest without a word."""
    if part == "targets":
        config = changed_adapter(adapter, tmp_path / "part", target_modules=["q_proj"])
    else:
        config = changed_adapter(adapter, tmp_path / "part", with_a_layer_more)
    with pytest.raises(InputError, match=r"\d+ of its weights belong to no layer, first"):
        evaluate(config, base_config, data)
    assert not (tmp_path / "part" / "evaluation.json").exists()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_has_no_base_beside_it(
    adapter, base_config, data, tmp_path, kind
):
    config = changed_adapter(adapter, tmp_path / kind, init_lora_weights=kind)
    with pytest.raises(InputError, match=r"changes the base model's weights .*compare_base false"):
        evaluate(config, base_config, data)
    assert evaluate(replace(config, compare_base=False), base_config, data).keys() == {"adapter"}


def test_figures_that_cannot_be_written_are_given_all_the_same(
    adapter, base_config, data, tmp_path, monkeypatch
):
    """As beside an adapter on a file system that is mounted read-only."""
    config = changed_adapter(adapter, tmp_path / "adapter")

    def refuse(path, _):
        raise InputError(f"{path}: cannot be written (Read-only file system)")

    monkeypatch.setattr("darts_lora.evaluate.write_json", refuse)
    with pytest.warns(UserWarning, match=r"evaluation\.json: cannot be written \(Read-only"):
        results = evaluate(config, base_config, data)
    assert results["adapter"]["rows"] == 12


@pytest.mark.parametrize("option", ["eval_batch_size", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_bad_options(option, value):
    with pytest.raises(InputError, match=rf"{option}={value}: must be an integer >= 1"):
        EvaluateConfig(**{option: value})


def test_an_adapter_that_is_not_there_or_of_another_model(adapter, base_config, data, tmp_path):
    with pytest.raises(InputError, match=r"run `accelerate launch recipes/finetune\.py` first"):
        evaluate(EvaluateConfig(str(tmp_path)), base_config, data)
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**config, "target_modules": ["no_such_layer"]}))
    with pytest.raises(InputError, match="cannot be loaded into the model"):
        evaluate(EvaluateConfig(str(tmp_path)), base_config, data)
    path.write_text(json.dumps({**config, "r": 3}))
    weights = (adapter[0] / "adapter_model.safetensors").read_bytes()
    for content in (weights, weights[:100]):  # of other ranks; truncated
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="cannot be loaded into the model"):
            evaluate(EvaluateConfig(str(tmp_path)), base_config, data)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be loaded into the model"):
        evaluate(EvaluateConfig(str(tmp_path)), base_config, data)
