"""A search in transformers.Trainer: python recipes/examples/trainer.py MODEL TRAIN VALIDATION
Not here: the search; MODEL is a text model, TRAIN and VALIDATION are jsonl files of `text`."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from darts_lora import SearchConfig, Supernet
from darts_lora.trainer import RankSearchCallback

name, train, validation = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
rows = load_dataset("json", data_files={"train": train, "validation": validation})
rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns="text")

supernet = Supernet(
    AutoModelForCausalLM.from_pretrained(name), SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1)
)
trainer = Trainer(
    model=supernet.model,
    args=TrainingArguments("runs/trainer", max_steps=40, learning_rate=1e-3, save_strategy="no"),
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],  # alpha is trained on these
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
search = RankSearchCallback(trainer, supernet)
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
print(search.genotype.ranks)
