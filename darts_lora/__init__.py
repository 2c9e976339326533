"""darts_lora: the LoRA rank of every layer, found by one differentiable search.
Public names only; data sets and TensorBoard are imported by the rooms that use them."""

from darts_lora.base.quiet import hush

hush()  # before what says these lines is imported

from darts_lora.architect import Architect  # noqa: E402
from darts_lora.base.errors import DivergedError, InputError  # noqa: E402
from darts_lora.config import SearchConfig, TrainingConfig  # noqa: E402
from darts_lora.discretize import discretize  # noqa: E402
from darts_lora.genotype import Genotype  # noqa: E402
from darts_lora.lora.mixed_linear import MixedRankLinear  # noqa: E402
from darts_lora.search import RankSearch, find_ranks  # noqa: E402
from darts_lora.supernet import Supernet  # noqa: E402
from darts_lora.views.console import show  # noqa: E402

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
    "find_ranks",
    "show",
]
