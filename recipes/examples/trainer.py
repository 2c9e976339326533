"""Ranks found in a Trainer: trainer.py MODEL TRAIN VALIDATION (`text` jsonl). Not here: search."""

import sys

import transformers as t
from datasets import load_dataset

from darts_lora.trainer import RankSearchCallback, SearchConfig

name, train, validation = sys.argv[1:4]  # alpha is trained on validation
model = t.AutoModelForCausalLM.from_pretrained(name)
tokenizer = t.AutoTokenizer.from_pretrained(name)
rows = load_dataset("json", data_files={"train": train, "validation": validation})
rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns="text")
args = t.TrainingArguments("runs/trainer", max_steps=40, learning_rate=1e-3)
collator = t.DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = t.Trainer(model, args, collator, rows["train"], rows["validation"])
RankSearchCallback(trainer, SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1))
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
