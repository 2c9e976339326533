"""Ranks found within preference training: python recipes/examples/dpo.py MODEL TRAIN VALIDATION
Not here: the search; TRAIN and VALIDATION are jsonl files of prompt, chosen and rejected."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from darts_lora import SearchConfig, Supernet
from darts_lora.trainer import RankSearchCallback

name, train, validation = sys.argv[1:4]
rows = load_dataset("json", data_files={"train": train, "validation": validation})
base = AutoModelForCausalLM.from_pretrained(name)
supernet = Supernet(base, SearchConfig(ranks=[0, 1, 2, 4], budget_rank=1))
options = {"max_steps": 40, "learning_rate": 1e-3, "save_strategy": "no", "bf16": False}
# the reference is the model before its first step: no second one is kept in memory
args = DPOConfig("runs/dpo", precompute_ref_log_probs=True, **options)
trainer = DPOTrainer(base, None, args, train_dataset=rows["train"], eval_dataset=rows["validation"])
search = RankSearchCallback(trainer, supernet)  # alpha learns by DPO's loss on eval_dataset
trainer.train()
trainer.save_model()  # a PEFT adapter of the ranks that the first steps found
print(search.genotype.ranks)
