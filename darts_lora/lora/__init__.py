"""Layers and models: which layers are searched, their branches and costs, adapters for PEFT.
Not here: a search of them (supernet.py and what stands on it)."""
