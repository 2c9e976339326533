"""The report recipe: python recipes/report.py, the same as darts-lora report.
Not here: what it does (darts_lora/cli/report.py).

python recipes/report.py                                    # what recipes/search.py left
python recipes/report.py --finetune_dir '[runs/finetune, runs/uniform4]'
"""

from darts_lora.cli.report import start

if __name__ == "__main__":
    start()
