"""A Trainer with RankSearchCallback goes on from its checkpoints, before and behind the handover.
Not here: the search and the handover themselves (test_trainer.py), our own loop."""

import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import Regression, make_trainer, problem, text_model, text_rows
from transformers import Trainer, TrainingArguments

from darts_lora import InputError, SearchConfig
from darts_lora.trainer import RankSearchCallback


def make(folder, max_steps=10, dropout=0.3, **options):
    """A search in the first five steps, of four an epoch, and dropout in all."""
    chosen = {"search_fraction": 0.5, "arch_every": 1, "dropout": 0.1}
    config = SearchConfig(**{"ranks": (0, 1, 2), "budget_rank": 1, **chosen, **options})
    args = TrainingArguments(
        str(folder), max_steps=max_steps, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.05, weight_decay=0.1, save_steps=1,
        logging_steps=3, per_device_eval_batch_size=4,
    )  # fmt: skip
    rows = {"train_dataset": text_rows(16, 0), "eval_dataset": text_rows(12, 1)}
    trainer = Trainer(text_model(attention_dropout=dropout), args, **rows)
    return trainer, RankSearchCallback(trainer, config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training in one go with a checkpoint behind each step: its folder and its callback."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, search = make(folder)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder, search


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 9])
def test_it_ends_bit_for_bit_as_one_in_one_go(whole, step, tmp_path):
    folder, expected = whole
    trainer, search = make(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert isinstance(trainer.model, PeftModel)
    assert search.genotype == expected.genotype
    trainer.save_model(str(tmp_path / "adapter"))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    own, other = ([torch.load(f / "checkpoint-10" / "optimizer.pt")] for f in (tmp_path, folder))
    assert str(own) == str(other)


def test_a_search_that_is_all_of_the_training(tmp_path):
    options = {"search_fraction": 1.0}
    trainer, expected = make(tmp_path / "whole", **options)
    trainer.train()
    trainer, search = make(tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert search.genotype == expected.genotype
    assert torch.equal(search.supernet.alpha, expected.supernet.alpha)
    own, other = (s.supernet.weight_parameters() for s in (search, expected))
    assert all(map(torch.equal, own, other))


def test_a_model_that_transformers_does_not_know(tmp_path):
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model, train, validation = problem()
        folder = tmp_path / str(resumed)
        trainer = make_trainer(model, train, validation, folder, steps=6, save_steps=2)
        trainer.args.save_strategy = "steps"
        search = RankSearchCallback(trainer, SearchConfig(ranks=(0, 1, 2), search_fraction=1.0))
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "False/checkpoint-4") if resumed else None
        )
        found.append(search.supernet.state_dict())
    assert isinstance(model, Regression)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("step", [2, 7])
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"ranks": (0, 2)}, r"^ranks=\[0, 2\]: the search to resume has ranks=\[0, 1, 2\]; go on"),
        (
            {"max_steps": 20},
            r"^max_steps=20: the search to resume has max_steps=10; go on with that",
        ),
    ],
)
def test_another_search_is_refused(whole, tmp_path, step, changed, text):
    trainer, _ = make(tmp_path, **changed)
    with pytest.raises(InputError, match=text):
        trainer.train(resume_from_checkpoint=str(whole[0] / f"checkpoint-{step}"))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_what_is_no_whole_checkpoint_of_a_search(whole, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole[0] / "checkpoint-2", checkpoint)
    state = checkpoint / "rank_search.pt"
    damages = [
        state.unlink,
        lambda: state.write_bytes(b"half"),
        lambda: torch.save(Code(str(tmp_path / "trap")), state, pickle_module=pickle),
    ]
    for damage in damages:
        damage()
        trainer, _ = make(tmp_path)
        with pytest.raises(InputError, match=r"^resume_from_checkpoint='.*': is no whole checkpoi"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "trap").exists()


def test_a_checkpoint_holds_what_its_phase_needs(whole):
    folder, search = whole
    before, behind = ({p.name for p in (folder / f"checkpoint-{n}").iterdir()} for n in (4, 5))
    assert {"supernet.safetensors", "rank_search.pt"} < before and "genotype.json" not in before
    assert {"adapter_model.safetensors", "adapter_config.json", "genotype.json"} < behind
    state = load_file(folder / "checkpoint-5" / "adapter_model.safetensors")
    assert sum(map(torch.numel, state.values())) == search.genotype.num_parameters
