"""The command darts-lora: its first argument names one of the recipes.
Not here: what each does (the modules beside), how options are parsed (base/options.py)."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "search": "find the LoRA rank of every layer of a model",
    "derive": "choose other ranks from a finished search",
    "finetune": "train the found ranks as a plain PEFT adapter",
    "evaluate": "score an adapter on the test rows",
    "report": "write an HTML report of a search",
}


def main() -> None:
    """Run what the first argument names; in several processes by
    `accelerate launch -m darts_lora.cli <command>`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"darts-lora {name}", *rest]
        import_module(f"darts_lora.cli.{name}").start()
        return
    lines = [f"  {command:<10}{about}" for command, about in COMMANDS.items()]
    usage = "\n".join(["usage: darts-lora COMMAND [--help] [--option value ...]", "", *lines])
    if name in ("--help", "-h"):
        print(usage)
        return
    print(f"error: {name!r:.100} is no command\n{usage}", file=sys.stderr)
    sys.exit(2)
