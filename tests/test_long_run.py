"""A long search: 1,000 steps hold no more memory or open files than 600.
Not here: what a search finds (test_search.py)."""

import gc
import json
import os
import sys

import forked
import psutil
import torch

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.architect import LAST
from darts_lora.config import TrainingConfig
from small_models import residual


def held():
    gc.collect()
    tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    process = psutil.Process()
    return tensors, process.num_fds(), process.memory_info().rss


def search(folder):
    """What is held after 600 and after 1,000 steps, of which 100 and 500 have an architecture step
    behind them."""
    found, batches = {}, []

    def loss_fn(model, batch):
        batches.append(1)
        if len(batches) in (700, 1500):  # weight steps 600 and 1,000 of both kinds
            found[len(batches)] = held()
        return (model(batch) - 1).pow(2).mean()

    whole = {"search_fraction": 1.0, "arch_every": 1}
    rows = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=16)
    RankSearch(
        Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), budget_rank=1, **whole)),
        rows,
        rows,
        training=TrainingConfig(max_steps=1000, logging_steps=10, save_steps=100),
        output_dir=folder,
        loss_fn=loss_fn,
    ).run()
    assert len(batches) == 1500 + 3 * LAST
    return list(found.values())


def test_a_thousand_steps_hold_no_more_than_six_hundred(tmp_path):
    """In a process of its own: what other tests left would be freed, and counted, in this one."""
    done = forked.run(__file__, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (tensors, files, memory), (tensors_later, files_later, memory_later) = json.loads(done.stdout)
    assert os.listdir(tmp_path / "checkpoints")
    assert tensors_later <= tensors and files_later <= files
    assert memory_later - memory < 4 * 2**20


if __name__ == "__main__":
    print(json.dumps(search(sys.argv[1])))
