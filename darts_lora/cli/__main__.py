"""python -m darts_lora.cli, as accelerate launch -m calls it. Not here: the commands."""

from darts_lora.cli import main

if __name__ == "__main__":
    main()
