"""A frozen base does not follow the batches; what is trained in full does.
Not here: which parameters learn (test_supernet.py, test_finetune.py)."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from darts_lora import RankSearch, SearchConfig, Supernet, TrainingConfig
from darts_lora.finetune import train

NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "not affine": lambda: nn.BatchNorm1d(8, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
}


class Net(nn.Module):
    """A head of its own statistics behind the norm at hand; a Trainer's loss."""

    dtype = torch.float32

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), norm, nn.Linear(8, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

    def forward(self, x, labels=None):
        y = self.head(self.last(self.norm(self.first(x))))
        return {"loss": (y - labels).pow(2).mean(), "logits": y}


def rows():
    return TensorDataset(torch.randn(64, 8) * 3 + 1, torch.randn(64, 4))


def collate(batch):
    return dict(zip(("x", "labels"), map(torch.stack, zip(*batch, strict=True)), strict=True))


def same(state, before):
    return {name: torch.equal(value, before[name]) for name, value in state.items()}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_search_gives_the_base_back_bit_for_bit(norm):
    model = Net(norm())
    before = copy.deepcopy(model.state_dict())
    config = SearchConfig(
        ranks=(0, 1, 2), budget_rank=1, target_modules=["first", "last"], modules_to_save=["head"]
    )
    supernet = Supernet(model, config)
    loader = DataLoader(rows(), 8, collate_fn=collate)
    RankSearch(supernet, loader, loader, training=TrainingConfig(max_steps=4)).run()
    assert model.training
    head = supernet.saved_modules["head"]
    assert head[0].running_mean.any() and head[0].num_batches_tracked > 0
    assert all(same(supernet.remove().state_dict(), before).values())
    model.norm.train()(torch.randn(8, 8))
    moved = not all(same(model.state_dict(), before).values())
    assert moved, "what was removed follows batches again"


def test_a_finetune_leaves_what_the_adapter_does_not_hold(tmp_path):
    model = Net(nn.BatchNorm1d(8))
    before = copy.deepcopy(model.state_dict())
    lora = LoraConfig(target_modules=["first", "last"], modules_to_save=["head"])
    adapted = get_peft_model(model, lora)
    training = TrainingConfig(max_steps=4, batch_size=8)
    train(adapted, rows(), collate, training, str(tmp_path), seed=0)
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
    trained = model.head.modules_to_save["default"][0]
    assert trained.num_batches_tracked > 0
