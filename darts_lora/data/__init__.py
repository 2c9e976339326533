"""From rows to batches: where rows come from, their layouts and splits, chat templates, collators.
Not here: what a model does with a batch."""
