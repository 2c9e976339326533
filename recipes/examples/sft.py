"""Ranks found within a training by TRL: python recipes/examples/sft.py MODEL TRAIN VALIDATION
Not here: the search; MODEL is a text model, TRAIN and VALIDATION are jsonl files of chats."""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from darts_lora.trainer import RankSearchCallback, SearchConfig

model, train, validation = sys.argv[1:4]  # alpha is trained on validation
rows = load_dataset("json", data_files={"train": train, "validation": validation})
args = SFTConfig("runs/sft", max_steps=40, learning_rate=1e-3, bf16=False)
trainer = SFTTrainer(model, args, train_dataset=rows["train"], eval_dataset=rows["validation"])
RankSearchCallback(trainer, SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1))
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
