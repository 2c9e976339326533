"""What alpha's gradients say: the prior, their mean, the share of a budget, whether it is chance.
Not here: the step of alpha (architect.py), how ranks are chosen from it (discretize.py)."""
