"""The search recipe: accelerate launch recipes/search.py, the same as darts-lora search.
Not here: what it does (darts_lora/cli/search.py)."""

from darts_lora.cli.search import start

if __name__ == "__main__":
    start()
