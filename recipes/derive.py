"""The derive recipe: python recipes/derive.py, the same as darts-lora derive.
Not here: what it does (darts_lora/cli/derive.py)."""

from darts_lora.cli.derive import start

if __name__ == "__main__":
    start()
