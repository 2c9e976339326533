"""The options of a search and of the runs around it: dataclasses, every bound checked on creation.
Not here: what needs a model or a data set to check (supernet.py, loaders.py), nor parsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from darts_lora.base.bounds import (
    check_bounds,
    check_modules,
    check_ranks,
    is_real,
    nearest,
    require,
)
from darts_lora.base.errors import InputError

ALL_EXPERTS = "all-experts"


@dataclass
class SearchConfig:
    """What is searched and how (bilevel search over LoRA ranks, DARTS, arXiv 1806.09055).

    Raises:
        InputError: an option is out of its bounds.
    """

    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    """Candidate ranks of each layer; 0 means no adapter. Narrow layers get those that fit."""
    target_modules: str | list[str] = "all-linear"
    """Layers to search, as in PEFT: all-linear, a list of name suffixes, or a regex. Or parts of
    the model: vision, audio, language, connector (with cross-attention), vision+language."""
    target_parameters: str | list[str] | None = None
    """Experts to search whose weights are 3-D parameters; all experts of a parameter get one rank.
    Ends of names as in PEFT, such as experts.down_proj; or all-experts. Default: none."""
    exclude_modules: str | list[str] | None = None
    """Layers to leave out, as in PEFT: a list of name suffixes or a regex. Default: none."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapters and saved with them, as in PEFT (name suffixes).
    A classifier's head is always one, and so is what its checkpoint has no weights for. The budget
    does not count them. Default: none."""
    scaling: float = 2.0
    """The factor lora_alpha / r on what an adapter adds, the same for all ranks."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input, in [0, 1)."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights; they are used in that of the activations."""
    budget_rank: float | None = None
    """Budget: as many trainable parameters as a uniform LoRA of this rank on the same layers.
    Default: the search recommends one, by the tolerance."""
    budget_parameters: int | None = None
    """Budget: trainable parameters (count), instead of budget_rank."""
    tolerance: float = 0.01
    """Without a budget: the share of what the largest candidate rank gains over the base model that
    the recommended size may lack, in [0, 1)."""
    search_fraction: float = 0.125
    """Part of a run's weight steps (max_steps) that the search takes, in (0, 1]. The finetune goes
    on from its weights with the rest; with 1 it is a run of its own."""
    arch_every: int = 2
    """Weight steps to one architecture step, in the second half of the search."""
    seed: int = 0
    """Seed of the first weights, of all samples and of the data order."""

    def __post_init__(self):
        self.ranks = check_ranks(self.ranks)
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if name == "target_parameters" and value == ALL_EXPERTS:
                continue
            if value is not None or name == "target_modules":
                check_modules(name, value, regex=name in ("target_modules", "exclude_modules"))
        check_bounds(
            self,
            at_least={"dropout": 0.0, "tolerance": 0.0, "arch_every": 1, "seed": 0},
            above={"scaling": 0.0, "budget_rank": 0.0, "budget_parameters": 0},
        )
        for name in ("dropout", "tolerance"):
            require(getattr(self, name) < 1, name, getattr(self, name), "must be below 1")
        part, rule = self.search_fraction, "must be above 0 and at most 1"
        require(is_real(part) and 0 < part <= 1, "search_fraction", part, rule)
        if self.budget_rank is not None and self.budget_parameters is not None:
            raise InputError(
                f"budget_rank={self.budget_rank} and budget_parameters={self.budget_parameters}: "
                "give one of the two"
            )

    def search_steps(self, max_steps: int) -> int:
        """Weight steps of the search in a run of so many."""
        return max(1, round(self.search_fraction * max_steps))


@dataclass
class ModelConfig:
    """Which base model is loaded, and how."""

    model_name_or_path: str = "embedded"
    """Hub name or local folder; embedded: the small vision-language model of this package."""
    gguf_file: str | None = None
    """GGUF file in that folder or hub repository to read the model from (its weights unpacked)."""
    task: Literal["auto", "generation", "classification"] = "auto"
    """What the model is for. auto: classification where the checkpoint has a head for it, else
    generation."""
    num_labels: int | None = None
    """Classes of a classification (count); default: as the checkpoint says."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights; auto: as stored."""
    quantization: Literal["4bit", "8bit", "int8"] | None = None
    """Quantize the base model: 4bit (NF4) and 8bit by bitsandbytes, int8 by torchao. Default: not.
    """
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory."""
    trust_remote_code: bool = False
    """Run code that comes with the model from the hub. Only for sources that you trust."""

    def __post_init__(self):
        check_bounds(
            self,
            above={"num_labels": 0},
        )


MAX_IMAGE_PIXELS = 50_000_000  # 7000 x 7000, more than most cameras have


@dataclass
class DataConfig:
    """Which data set is used and how it is split."""

    dataset: str = "embedded"
    """Hub name, local folder (of files, of images, or of save_to_disk), or a loader: json, csv,
    parquet, imagefolder (with data_files)."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files of the data set: one, several, or a mapping from split to files."""
    dataset_config: str | None = None
    """Configuration of a data set that has several, as ocrvqa of HuggingFaceM4/the_cauldron."""
    streaming: bool = False
    """Read rows as they are needed, and store nothing; each row's number decides its split."""
    train_split: str = "train"
    """Split that training and validation rows are taken from."""
    test_split: str | None = "test"
    """Split that evaluation uses; null: hold test_fraction of the training split back, from the
    search on."""
    validation_fraction: float = 0.3
    """Share of the training split that is kept for the architecture steps, in (0, 1)."""
    test_fraction: float = 0.1
    """Share held back for evaluation where there is no test split, in (0, 1)."""
    max_train_samples: int | None = None
    """Use at most this many rows of the training split; default: all."""
    max_test_samples: int | None = None
    """Use at most this many rows of the test split; default: all."""
    max_length: int = 2048
    """Longest sequence (tokens)."""
    on_long_row: Literal["error", "skip", "truncate"] | None = None
    """A row above max_length, or above what the model takes: an error that names it, left out
    (all rows are read once at the start), or cut at its end. Default: as on_bad_row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that no batch can be made of: an error that names it, or left out."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Largest image that is opened (pixels, width times height)."""
    pad_to_multiple_of: int = 1
    """Pad the sequences of a batch to a multiple of this many tokens: fewer shapes of batches."""
    split_by: Literal["image", "prompt", "row"] = "image"
    """What stays on one side of a split: all rows of an image (of a prompt, without one), all rows
    of a prompt with its images, or each row by itself. Alpha must not learn on images or prompts
    that the weights know."""
    split_seed: int = 0
    """Seed of the split into training and validation rows."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"split_seed": 0},
            above={"max_train_samples": 0, "max_test_samples": 0, "max_length": 0}
            | {"pad_to_multiple_of": 0, "max_image_pixels": 0},
        )
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            require(is_real(value) and 0 < value < 1, name, value, "must be between 0 and 1")
        rule = f"must be at most max_length={self.max_length}"
        most = 178_956_970
        known = f"must be at most {most}, above which Pillow opens none"
        require(self.max_image_pixels <= most, "max_image_pixels", self.max_image_pixels, known)
        multiple = self.pad_to_multiple_of
        require(multiple <= self.max_length, "pad_to_multiple_of", multiple, rule)


@dataclass
class TrainingConfig:
    """How weights are trained, in a search and in a finetune alike."""

    max_steps: int = 1000
    """Weight steps (optimizer steps) of the whole run. A search takes a part of them
    (search_fraction), the finetune of its genotype the rest; a finetune from scratch takes all."""
    batch_size: int = 16
    """Rows of a batch on each process."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up for one weight step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the LoRA weights (AdamW), in a search and in a finetune."""
    weight_decay: float = 0.0
    """Weight decay of the LoRA weights."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after its warm-up; linear and cosine end at 0."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    max_grad_norm: float = 1.0
    """Clip the norm of the weights' gradient to this; 0 switches clipping off."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass. fp16, with loss scaling, is for models in float16."""
    logging_steps: int = 10
    """Steps between two log entries."""
    save_steps: int = 500
    """Steps between two checkpoints; 0: none but the last."""
    num_workers: int = 0
    """Worker processes of each data loader."""
    max_runtime: float | None = None
    """Stop in good order after this time of training (minutes), with exit status 75 and a
    checkpoint; --resume then goes on. Leave room for loading and writing. Default: no limit."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"weight_decay": 0.0, "lr_warmup_steps": 0, "max_grad_norm": 0.0}
            | {"save_steps": 0, "num_workers": 0},
            above={"max_steps": 0, "batch_size": 0, "gradient_accumulation_steps": 0}
            | {"learning_rate": 0.0, "logging_steps": 0, "max_runtime": 0.0},
        )

    @property
    def validation_batch_size(self) -> int:
        """Rows of a batch of an architecture step: half as many say as much, and each is a pass."""
        return max(1, self.batch_size // 2)

    @property
    def scheduler_type(self) -> str:
        """transformers' name of lr_scheduler: the one that it calls constant has no warm-up."""
        return self.lr_scheduler + ("_with_warmup" if self.lr_scheduler == "constant" else "")


def split_options(options: Mapping[str, Any], *classes: type) -> list[Any]:
    """One object of each class from the options that are its own.

    Raises:
        InputError: an option that no class has, or a value out of its bounds.
    """
    names = {c: {f.name for f in fields(c)} for c in classes}
    for name in options:
        known = sorted(set().union(*names.values()))
        if name not in known:
            raise InputError(f"{name}: is no option{nearest(name, known)}")
    return [c(**{n: v for n, v in options.items() if n in names[c]}) for c in classes]
