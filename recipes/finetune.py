"""The finetune recipe: accelerate launch recipes/finetune.py, the same as darts-lora finetune.
Not here: what it does (darts_lora/cli/finetune.py).

accelerate launch recipes/finetune.py                       # what recipes/search.py left
accelerate launch recipes/finetune.py --init inherit        # from the searched weights
accelerate launch recipes/finetune.py --rank 4 --output_dir runs/uniform4    # a baseline
"""

from darts_lora.cli.finetune import start

if __name__ == "__main__":
    start()
