"""Rate and budget by Optuna: python recipes/examples/tune.py MODEL TRAIN VALIDATION TRIALS
Not here: the search, which each trial runs once. TRAIN and VALIDATION are jsonl files of chats."""

import sys

import optuna
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from darts_lora.trainer import RankSearchCallback, SearchConfig

name, train, validation, trials = sys.argv[1:5]
rows = load_dataset("json", data_files={"train": train, "validation": validation})


class Prune(TrainerCallback):
    """Ends a trial whose validation loss is above the median of those before it, at its step."""

    def __init__(self, trial):
        self.trial = trial

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.trial.report(metrics["eval_loss"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(trial):
    """The validation loss at the end of one run: a search, and the training of what it found."""
    budget = trial.suggest_categorical("budget_rank", [1, 2])
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    options = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no"}
    args = SFTConfig(f"runs/tune/{trial.number}", learning_rate=rate, bf16=False, **options)
    both = {"train_dataset": rows["train"], "eval_dataset": rows["validation"]}
    trainer = SFTTrainer(name, args, **both, callbacks=[Prune(trial)])
    search = RankSearchCallback(trainer, SearchConfig(ranks=[0, 1, 2, 4], budget_rank=budget))
    trainer.train()
    trainer.save_model()
    trial.set_user_attr("parameters", search.genotype.num_parameters)
    return [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][-1]


pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
study.optimize(objective, n_trials=int(trials))
for trial in study.trials:
    print(trial.number, trial.state.name, trial.value, trial.params, trial.user_attrs)
print(f"best: runs/tune/{study.best_trial.number}")
