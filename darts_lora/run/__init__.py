"""What runs are made of: the weight step, phases, batches, processes, records, checkpoints.
Not here: the loops themselves (search.py, trainer.py, finetune.py)."""
