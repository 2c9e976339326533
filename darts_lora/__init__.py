"""darts_lora: the LoRA rank of every layer, found by one differentiable search.
Public names only; data sets and TensorBoard are imported by the rooms that use them."""

from darts_lora.architect import Architect
from darts_lora.base.errors import DivergedError, InputError
from darts_lora.config import SearchConfig, TrainingConfig
from darts_lora.discretize import discretize
from darts_lora.genotype import Genotype
from darts_lora.lora.mixed_linear import MixedRankLinear
from darts_lora.search import RankSearch
from darts_lora.supernet import Supernet
from darts_lora.views.console import show

__version__ = "0.1.0"
__all__ = [
    "Architect",
    "DivergedError",
    "Genotype",
    "InputError",
    "MixedRankLinear",
    "RankSearch",
    "SearchConfig",
    "Supernet",
    "TrainingConfig",
    "discretize",
    "show",
]
