"""The evaluate recipe: accelerate launch recipes/evaluate.py, the same as darts-lora evaluate.
Not here: what it does (darts_lora/cli/evaluate.py).

accelerate launch recipes/evaluate.py                            # what recipes/finetune.py left
accelerate launch recipes/evaluate.py --adapter runs/uniform4 --max_test_samples 200
"""

from darts_lora.cli.evaluate import start

if __name__ == "__main__":
    start()
