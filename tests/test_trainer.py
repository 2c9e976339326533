"""A search inside transformers' Trainer: it finds what is planted, and who trains what.
Not here: the examples for users (recipes/test_examples.py), TRL among them."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.trainer import RankSearchCallback


class Regression(nn.Module):
    """Three linear layers and a squared loss, as a Trainer wants a model."""

    def __init__(self, width=24):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])

    def forward(self, x, labels=None):
        y = self.layers(x)
        return {"loss": (y - labels).pow(2).mean(), "logits": y}


def collate(rows):
    x, y = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"x": x, "labels": y}


def model_loss(model, batch):
    return model(**batch)["loss"]


def problem():
    """The model, and 512 + 256 rows whose targets differ by a change of rank 2 in layers.1."""
    model, width = Regression(), 24
    x, change = torch.randn(768, width), torch.randn(width, 2) @ torch.randn(2, width) / 6
    with torch.no_grad():
        hidden = model.layers[0](x)
        y = model.layers[2](model.layers[1](hidden) + hidden @ change)
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
    options = {"budget_rank": 2 / 3, "arch_update": "gradient"}  # above 2, ranks are worth nothing
    supernet = Supernet(model, SearchConfig(ranks=(0, 1, 2, 4), **options))
    trainer = make_trainer(model, train, validation, tmp_path)
    search = RankSearchCallback(trainer, supernet, model_loss)
    trainer.train()
    assert search.genotype.ranks == {"layers.0": 0, "layers.1": 2, "layers.2": 0}
    assert search.genotype.found_by["warmup_steps"] == 100
    assert "entropy" in search.genotype.found_by["verdict"]
    logged = [log for log in trainer.state.log_history if "expected_parameters" in log]
    assert [log["step"] for log in logged] == [100 + 50 * i for i in range(1, 7)]
    assert 0 <= logged[-1]["alpha_entropy"] < logged[0]["alpha_entropy"] <= 1
    assert logged[-1]["validation_loss"] < logged[0]["validation_loss"]


class Watch(TrainerCallback):
    """alpha and the LoRA weights after each optimizer step, before any other callback."""

    def __init__(self, supernet):
        self.supernet, self.alphas, self.weights, self.kinds = supernet, [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.kinds.append(self.supernet.relaxation)

    def on_step_end(self, args, state, control, **kwargs):
        self.alphas.append(self.supernet.alpha.detach().clone())
        self.weights.append([p.detach().clone() for p in self.supernet.weight_parameters()])


def test_who_trains_what_and_when(tmp_path):
    model, train, validation = problem()
    config = SearchConfig(
        ranks=(0, 1, 2), budget_rank=1, warmup_steps=4, relaxation="gumbel", arch_average=0.5
    )
    supernet = Supernet(model, config)
    trainer = make_trainer(model, train, validation, tmp_path, steps=8, weight_decay=0.1)
    before, after = Watch(supernet), Watch(supernet)
    trainer.add_callback(before)
    search = RankSearchCallback(trainer, supernet, model_loss)
    trainer.add_callback(after)
    trainer.train()
    assert search.architect.mean.steps == 8, "the warm-up is in the mean"
    assert after.kinds == ["gumbel_hard"] * 4 + ["gumbel"] * 4
    for step in range(8):
        same = all(map(torch.equal, before.weights[step], after.weights[step]))
        assert same, "the architecture step leaves the weights alone"
        moved = not torch.equal(before.alphas[step], after.alphas[step])
        assert moved == (step >= 4)
        if step:
            assert torch.equal(before.alphas[step], after.alphas[step - 1]), "the weight step alpha"
            assert not torch.equal(before.weights[step][1], before.weights[step - 1][1])


def test_what_cannot_be_searched(tmp_path):
    model, train, validation = problem()
    supernet = Supernet(model, SearchConfig(ranks=(0, 1), warmup_steps=8))
    with pytest.raises(InputError, match="its model is not the supernet's"):
        RankSearchCallback(make_trainer(Regression(), train, validation, tmp_path), supernet)
    with pytest.raises(InputError, match="eval_dataset=None"):
        RankSearchCallback(make_trainer(model, train, None, tmp_path), supernet)
    trainer = make_trainer(model, train, validation, tmp_path, steps=8)
    trainer.args._n_gpu = 2  # what one process on a machine of two GPUs has
    with pytest.raises(InputError, match=r"n_gpu=2: .*`accelerate launch`.*CUDA_VISIBLE_DEVICES=0"):
        RankSearchCallback(trainer, supernet)
    trainer.args._n_gpu = 1
    RankSearchCallback(trainer, supernet, model_loss)
    with pytest.raises(InputError, match="warmup_steps=8: must be below max_steps=8"):
        trainer.train()
    callback = trainer.callback_handler.callbacks[-1]
    with pytest.raises(InputError, match=r"resume_from_checkpoint: begins at step 3, .* no alpha"):
        callback.on_train_begin(trainer.args, TrainerState(global_step=3, max_steps=9), None)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # what fp16 has on a GPU
    callback.on_train_begin(trainer.args, TrainerState(max_steps=9), None)
    assert callback.architect.scaler is trainer.accelerator.scaler
    second = Supernet(Regression(), SearchConfig(ranks=(0, 1), order=2))
    with pytest.raises(InputError, match="order=2: needs training batches"):
        RankSearchCallback(make_trainer(second.model, train, validation, tmp_path), second)
