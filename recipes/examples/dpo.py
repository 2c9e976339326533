"""Ranks found within preference training: python recipes/examples/dpo.py MODEL TRAIN VALIDATION
Not here: the search; TRAIN and VALIDATION are jsonl files of prompt, chosen and rejected."""

import sys

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from darts_lora.trainer import RankSearchCallback, SearchConfig

model, train, validation = sys.argv[1:4]  # alpha is trained on validation, by DPO's loss
rows = load_dataset("json", data_files={"train": train, "validation": validation})
options = {"max_steps": 40, "learning_rate": 1e-3, "bf16": False}
# the reference is the model before its first step: no second one is kept in memory
args = DPOConfig("runs/dpo", precompute_ref_log_probs=True, **options)
both = {"train_dataset": rows["train"], "eval_dataset": rows["validation"]}
trainer = DPOTrainer(model, None, args, **both)
RankSearchCallback(trainer, SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1))
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
