"""Ranks found within a training by TRL: python recipes/examples/sft.py MODEL TRAIN VALIDATION
Not here: the search; MODEL is a text model, TRAIN and VALIDATION are jsonl files of chats."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from darts_lora import SearchConfig, Supernet
from darts_lora.trainer import RankSearchCallback

name, train, validation = sys.argv[1:4]
rows = load_dataset("json", data_files={"train": train, "validation": validation})

supernet = Supernet(
    AutoModelForCausalLM.from_pretrained(name), SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1)
)
trainer = SFTTrainer(
    model=supernet.model,
    args=SFTConfig("runs/sft", max_steps=40, learning_rate=1e-3, save_strategy="no", bf16=False),
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],  # alpha is trained on these
)
search = RankSearchCallback(trainer, supernet)
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
print(search.genotype.ranks)
