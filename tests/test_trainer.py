"""A search inside transformers' Trainer: it finds what is planted, and who trains what.
Not here: the examples for users (recipes/test_examples.py), TRL among them."""

import pytest
import torch
import transformers as t
import trl
from datasets import Dataset
from families import TEXT
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.alpha.verdict import verdict_text
from darts_lora.trainer import RankSearchCallback, exchange_parameters
from small_models import make_tokenizer, randomise


class Regression(nn.Module):
    """Three linear layers, bent between, and a squared loss, as a Trainer wants a model."""

    def __init__(self, width=24):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])

    def forward(self, x, labels=None):
        y = self.layers[2](torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))
        return {"loss": (y - labels).pow(2).mean(), "logits": y}


def collate(rows):
    x, y = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"x": x, "labels": y}


def model_loss(model, batch):
    return model(**batch)["loss"]


# a search that is all of the training
WHOLE = {"search_fraction": 1.0, "arch_every": 1}


def problem():
    """The model, and 512 + 256 rows whose targets differ by a change of rank 2 in layers.1."""
    model, width = Regression(), 24
    x, change = torch.randn(768, width), torch.randn(width, 2) @ torch.randn(2, width) / 6
    with torch.no_grad():
        hidden = torch.tanh(model.layers[0](x))
        y = model.layers[2](torch.tanh(model.layers[1](hidden) + hidden @ change))
    return model, TensorDataset(x[:512], y[:512]), TensorDataset(x[512:], y[512:])


def make_trainer(model, train, validation, folder, steps=400, **options):
    args = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=0.01, per_device_train_batch_size=64,
        per_device_eval_batch_size=64, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, logging_steps=50, **options,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=train, eval_dataset=validation, data_collator=collate)


def test_a_search_in_a_trainer_finds_the_planted_rank(tmp_path):
    model, train, validation = problem()
    config = SearchConfig(ranks=(0, 1, 2, 4), budget_rank=2 / 3, search_fraction=1.0)
    supernet = Supernet(model, config)
    trainer = make_trainer(model, train, validation, tmp_path)
    search = RankSearchCallback(trainer, supernet, model_loss)
    trainer.train()
    assert search.genotype.ranks == {"layers.0": 0, "layers.1": 2, "layers.2": 0}
    assert search.genotype.found_by["verdict"]["learnt"]
    logged = [log for log in trainer.state.log_history if "expected_parameters" in log]
    assert [log["step"] for log in logged] == [250, 300, 350, 400]
    assert 0 <= logged[-1]["alpha_entropy"] < logged[0]["alpha_entropy"] <= 1
    assert all(log["gain"] > 0 for log in logged)
    sizes = [log["expected_parameters"] for log in logged]
    assert sizes == pytest.approx(4 * [supernet.budget], rel=1e-4)


class Watch(TrainerCallback):
    """alpha and the LoRA weights after each optimizer step, before any other callback."""

    def __init__(self, supernet):
        self.supernet, self.alphas, self.weights = supernet, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.alphas.append(self.supernet.alpha.detach().clone())
        self.weights.append([p.detach().clone() for p in self.supernet.weight_parameters()])


def test_who_trains_what_and_when(tmp_path):
    model, train, validation = problem()
    supernet = Supernet(model, SearchConfig(ranks=(0, 1, 2), budget_rank=1, **WHOLE))
    trainer = make_trainer(model, train, validation, tmp_path, steps=8, weight_decay=0.1)
    before, after = Watch(supernet), Watch(supernet)
    trainer.add_callback(before)
    search = RankSearchCallback(trainer, supernet, model_loss)
    trainer.add_callback(after)
    trainer.train()
    assert search.architect.mean.steps == 8, "all steps are in the mean"
    for step in range(8):
        same = all(map(torch.equal, before.weights[step], after.weights[step]))
        assert same, "the architecture step leaves the weights alone"
        moved = not torch.equal(before.alphas[step], after.alphas[step])
        assert moved == (step >= 4)
        if step:
            assert torch.equal(before.alphas[step], after.alphas[step - 1]), "the weight step alpha"
            assert not torch.equal(before.weights[step][1], before.weights[step - 1][1])


def text_model(cls=t.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return cls(t.LlamaConfig(**TEXT, **options))


def text_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(15, 64, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def text_trainer(folder, train=16, validation=16, **options):
    supernet = Supernet(text_model(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, **WHOLE))
    args = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, logging_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    rows = {"train_dataset": text_rows(train, 0), "eval_dataset": text_rows(validation, 1)}
    trainer = Trainer(supernet.model, args, **rows)
    return trainer, RankSearchCallback(trainer, supernet)


def test_the_trainers_own_log_stays_and_the_end_is_told(tmp_path, capsys):
    trainer, search = text_trainer(tmp_path)
    trainer.train()
    history = trainer.state.log_history
    own = [log["step"] for log in history if {"loss", "grad_norm", "learning_rate"} <= log.keys()]
    assert own == [2, 4, 6, 8]
    assert [log["step"] for log in history if "gain" in log] == [6, 8]
    shown = capsys.readouterr().out
    assert verdict_text(search.genotype.found_by["verdict"]) in shown


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    "own", [None, lambda outputs, labels, num_items_in_batch: outputs.logits.mean()]
)
def test_alpha_learns_by_the_trainers_own_loss(smoothing, own, tmp_path):
    trainer, search = text_trainer(tmp_path, label_smoothing_factor=smoothing, validation=4)
    trainer.compute_loss_func = own
    search.on_train_begin(trainer.args, TrainerState(max_steps=8), None)
    randomise(search.supernet)
    with torch.no_grad():
        found = search._loss(next(search._batches()))
        ids = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
        logits = trainer.model(ids).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=smoothing
    )
    wanted = logits.mean() if own else wanted
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_evaluation_rows_are_shuffled_anew_in_each_epoch(tmp_path):
    trainer, search = text_trainer(tmp_path)
    numbers = {tuple(row["labels"].tolist()): i for i, row in enumerate(trainer.eval_dataset)}
    search.on_train_begin(trainer.args, TrainerState(max_steps=8), None)
    batches = [next(search.stream)["labels"].tolist() for _ in range(4)]
    order = [numbers[tuple(row)] for batch in batches for row in batch]
    first, second = order[:16], order[16:]
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second and list(range(16)) not in (first, second)


def test_what_a_trainer_saves_of_a_supernet_is_its_state(tmp_path):
    trainer, search = text_trainer(tmp_path)
    supernet = search.supernet
    randomise(supernet)
    trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "supernet.safetensors")
    other = Supernet(text_model(), supernet.config)
    other.load_state_dict(state)
    assert torch.equal(other.alpha, supernet.alpha)
    supernet.remove().save_pretrained(tmp_path / "base")
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.lm_head.weight, supernet.model.lm_head.weight)


PAIRS = [{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 8
KINDS = {  # trainer, configuration, model, rows, further options of the trainer
    "SFT": (t.LlamaForCausalLM, [{"text": "a b c"}] * 8, {}, {}),
    "DPO": (t.LlamaForCausalLM, PAIRS, {}, {"ref_model": text_model}),
    "Reward": (t.LlamaForSequenceClassification, PAIRS, {}, {}),
    "GRPO": (
        t.LlamaForCausalLM,
        [{"prompt": "a b"}] * 8,
        {"num_generations": 4, "max_completion_length": 3},
        {"reward_funcs": lambda: lambda completions, **_: [*map(float, range(len(completions)))]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_of_trl(kind, tmp_path):
    """Their losses are their own, before and behind the handover; validation rows are no part of
    what they log of training."""
    cls, rows, options, more = KINDS[kind]
    course = {"search_fraction": 0.5, "arch_every": 1}
    config = SearchConfig(ranks=(0, 1, 2), budget_rank=1, **course)
    supernet = Supernet(text_model(cls, num_labels=1), config)
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path), **{"max_steps": 6, "logging_steps": 2, "save_strategy": "no"}, bf16=False,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    chat = "{% for m in messages %}[U]{{ m.content }}{% endfor %}"
    trainer = getattr(trl, f"{kind}Trainer")(
        model=supernet.model, args=args, processing_class=make_tokenizer(chat),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        **{name: make() for name, make in more.items()},
    )  # fmt: skip
    search = RankSearchCallback(trainer, supernet)
    counts = []
    if hasattr(trainer, "_metrics"):
        trainer.add_callback(Count(trainer, counts))
    trainer.train()
    assert len(search.architect.measured.gains) == 2 and search.architect.measured.energies.any()
    assert max(counts, default=0) <= 2, "an entry for each training step since the last log"
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in losses] == [2, 4, 6]
    assert search.genotype.num_parameters <= supernet.budget
    assert isinstance(trainer.model, PeftModel)
    assert all(log["grad_norm"] > 0 for log in losses), "what was handed over is trained"


class Count(TrainerCallback):
    """Entries of what TRL's trainers gather, at the end of each step."""

    def __init__(self, trainer, counts):
        self.trainer, self.counts = trainer, counts

    def on_step_end(self, *args, **kwargs):
        self.counts += map(len, self.trainer._metrics["train"].values())


class Spy(TrainerCallback):
    """The model's output at the end of each step, behind the search."""

    def __init__(self, ids):
        self.ids, self.outputs = ids, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            self.outputs.append(model.eval()(self.ids).logits)
        model.train()


def test_found_ranks_are_handed_over_within_the_training(tmp_path):
    supernet = Supernet(
        text_model(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=0.5)
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=0.1, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(
        supernet.model, args, train_dataset=text_rows(16, 0), eval_dataset=text_rows(16, 1)
    )
    search = RankSearchCallback(trainer, supernet)
    ids = torch.randint(15, 64, (3, 7))
    spy = Spy(ids)
    trainer.add_callback(spy)
    trainer.train()
    genotype = search.genotype
    assert (genotype.found_by["steps"], genotype.found_by["run_steps"]) == (4, 8)
    assert isinstance(trainer.model, PeftModel)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.1 * (8 - step) / 8 for step in range(8)]), "one course"
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, trained))
    assert {group["weight_decay"] for group in groups if group["params"]} == {0.1}
    state = genotype.inherited_state(supernet)  # as it was at the handover
    fresh = get_peft_model(text_model(), genotype.to_lora_config(text_model()))
    assert not set_peft_model_state_dict(fresh, state).unexpected_keys
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(ids).logits, spy.outputs[3], atol=1e-5)
        assert not torch.allclose(spy.outputs[7], spy.outputs[3], atol=1e-2), "it goes on"
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(text_model(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, spy.outputs[7], atol=1e-5)
    ranks = {
        n: m.r["default"] for n, m in loaded.base_model.model.named_modules() if hasattr(m, "r")
    }
    assert ranks == {name: rank for name, rank in genotype.ranks.items() if rank}


def test_parameters_are_exchanged_in_groups_of_weight_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    old = nn.Linear(2, 2)
    decayed = {"params": [old.weight], "weight_decay": 0.1}
    for groups in ([{"params": list(old.parameters())}], [decayed, {"params": [old.bias]}]):
        optimizer = torch.optim.AdamW(groups)
        old(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        exchange_parameters(optimizer, model, ["0.weight", "1.weight"])
        names = [[n for n, p in model.named_parameters() if any(p is q for q in group["params"])]
                 for group in optimizer.param_groups]  # fmt: skip
        split = [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
        together = [["0.weight", "0.bias", "1.weight", "1.bias"]]
        assert names == (split if len(groups) == 2 else together) and not optimizer.state


def test_what_cannot_be_searched(tmp_path):
    model, train, validation = problem()
    supernet = Supernet(model, SearchConfig(ranks=(0, 1)))
    with pytest.raises(InputError, match="its model is not the supernet's"):
        RankSearchCallback(make_trainer(Regression(), train, validation, tmp_path), supernet)
    with pytest.raises(InputError, match="eval_dataset=None"):
        RankSearchCallback(make_trainer(model, train, None, tmp_path), supernet)
    several = {"one": validation, "two": validation}
    with pytest.raises(InputError, match=r"eval_dataset: has 2 sets \(one, two\); give the one"):
        RankSearchCallback(make_trainer(model, train, several, tmp_path), supernet)
    trainer = make_trainer(model, train, validation, tmp_path, steps=8)
    trainer.args._n_gpu = 2  # what one process on a machine of two GPUs has
    with pytest.raises(InputError, match=r"n_gpu=2: .*`accelerate launch`.*CUDA_VISIBLE_DEVICES=0"):
        RankSearchCallback(trainer, supernet)
    trainer.args._n_gpu, trainer.args.use_vllm = 1, True  # as GRPO's arguments may have
    with pytest.raises(InputError, match=r"use_vllm=True: .* \(use_vllm=False\)"):
        RankSearchCallback(trainer, supernet)
    trainer.args.use_vllm = False
    RankSearchCallback(trainer, supernet, model_loss)
    callback = trainer.callback_handler.callbacks[-1]
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # what fp16 has on a GPU
    callback.on_train_begin(trainer.args, TrainerState(max_steps=9), None)
    assert callback.architect.scaler is trainer.accelerator.scaler
