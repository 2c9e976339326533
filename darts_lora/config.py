"""The options of a search and of the runs around it: dataclasses, every bound checked on creation.
Not here: what needs a model or a data set to check (supernet.py, loaders.py), nor parsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from darts_lora.base.bounds import check_bounds, check_modules, check_ranks, is_real, require
from darts_lora.base.errors import InputError

ALL_EXPERTS = "all-experts"


@dataclass
class SearchConfig:
    """What is searched and how (bilevel search over LoRA ranks, DARTS, arXiv 1806.09055).

    Raises:
        InputError: an option is out of its bounds.
    """

    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    """Candidate ranks of each layer; 0 means no adapter."""
    target_modules: str | list[str] = "all-linear"
    """Layers to search, as in PEFT: all-linear, a list of name suffixes, or a regex; or parts of
    the model, one or several: vision, language, connector (with cross-attention), vision+language.
    """
    target_parameters: str | list[str] | None = None
    """Experts to search whose weights are 3-D parameters, one rank for all experts of a parameter:
    as in PEFT ends of names, such as experts.down_proj; or all-experts. Default: none."""
    exclude_modules: str | list[str] | None = None
    """Layers to leave out, as in PEFT: a list of name suffixes or a regex."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapters and saved with them, as in PEFT (name suffixes);
    a classification model's head is always one, and so is what its checkpoint has no weights for
    (mostly a pooler). The budget does not count them."""
    scaling: float = 2.0
    """The factor s = lora_alpha / r before every branch, the same for all ranks."""
    # nested: 1.001 of the oracle's loss on the hard planted problems, independent: 1.008 (5 seeds);
    # 0.0807 at rank 2 and 0.0744 at rank 8 on the embedded task, 0.0826 and 0.0764 (6 seeds)
    branches: Literal["independent", "nested"] = "nested"
    """independent: each rank has its own A and B; nested: a rank is a prefix of the next larger."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input, in [0, 1)."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights; they are used in that of the activations."""
    # gumbel_hard finds all easy planted ranks where softmax finds 60 %: in a plain mixture B
    # grows to undo a small gate, so alpha learns which branch grows fastest, not what it is worth
    relaxation: Literal["gumbel_hard", "gumbel", "softmax"] = "gumbel_hard"
    """How alpha becomes gates: straight-through samples, soft samples, or a plain mixture."""
    # example: costs nothing and averages over as many architectures as there are rows (on noisy
    # planted problems the loss over the oracle's falls from 2.2 to 1.4 and below)
    sampling: Literal["example", "batch"] = "example"
    """One architecture for each row of the batch, or one for the whole batch (a forward)."""
    # a hard sample has the same distribution at any temperature; 1 is the middle of its bias and
    # its variance as a gradient
    temperature: tuple[float, float] = (1.0, 1.0)
    """Temperature of the relaxation at the start and the end of a search, geometric in between."""
    budget_rank: float | None = None
    """Budget: as many trainable parameters as a uniform LoRA of this rank on the same layers."""
    budget_parameters: int | None = None
    """Budget: trainable parameters (count). Give this or budget_rank, or neither for no budget."""
    search_fraction: float | None = None
    """Part of a run's weight steps (max_steps) that the search takes, in (0, 1]; the finetune goes
    on from its weights with the rest. Default: 0.125 under a budget; 1 where alpha descends, and
    the finetune is then a run of its own."""
    # alpha held still, at the mean of the weights, over descent at the weights, ranks 2 and 8: E2E
    # -0.0016 +- 0.0040 and -0.0018 +- 0.0013, GSM8K -0.0002 and -0.0010, LLaVA -0.09 +- 0.10 and
    # -0.09 +- 0.09, embedded -0.0046 +- 0.0035 and -0.0036 +- 0.0045 (test loss, shares.json);
    # planted ranks, where a gain ends at a rank, are found by descent alone
    arch_update: Literal["proportional", "gradient"] | None = None
    """How alpha moves. proportional: shares the budget among the layers in proportion to what the
    validation loss gains where a layer's parameters grow by a share; ranks are drawn from one even
    distribution meanwhile. gradient: by descent on the validation loss (DARTS), projected onto the
    budget, and ranks are drawn from alpha. Default: proportional with a budget, gradient
    without."""
    # embedded default, budget of rank 2 (800 steps, 3 seeds): test loss 0.080 at 0.03, 0.079 at
    # 0.1, 0.092 for the uniform rank; expected ranks of two seeds correlate by 0.92 and 0.82
    arch_learning_rate: float = 0.03
    """Learning rate of alpha where it moves by the gradient (SharedAdam: all layers share one
    second moment)."""
    arch_betas: tuple[float, float] = (0.5, 0.999)
    """Betas of that optimizer, as in DARTS."""
    arch_weight_decay: float = 0.0
    """Weight decay of that optimizer."""
    # halves share the path of the weights, where two searches differ, and so show too little noise.
    # With 4 and 16, in proportion, ranks 2 and 8: expected ranks of two seeds correlate by 0.59,
    # 0.76 and 0.73, 0.88 (E2E), 0.51, 0.65 and 0.66, 0.82 (LLaVA), at test losses that are level
    arch_noise: float = 16.0
    """How many times the noise that two halves of the architecture steps show alpha's gradients
    are taken to have: the more, the nearer each layer is drawn to those of its type and of near
    blocks, while that is not outweighed by what is seen; 0: not drawn."""
    # SmolLM2 on E2E, alpha held still: at the weights a parameter seems to be worth an eighth of
    # what it is at the end, o and v less than nothing; at their mean, in the same steps, as much as
    # at the end (e2e_credit.json). It costs 1 to 2 % of a step's time
    arch_average: float | None = None
    """Share of the weight steps so far that the weights are averaged over where alpha's gradients
    are taken, at the price of a copy of them; 0: at the weights themselves. Default: 0.125 (the
    last eighth, about)."""
    arch_lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of alpha's learning rate over the architecture steps of a RankSearch."""
    arch_every: int = 2
    """One architecture step every this many weight steps."""
    warmup_steps: int | None = None
    """Weight steps of the search before its first architecture step. Default: 0 under a budget,
    where the first steps say most; a quarter of the search where alpha descends."""
    seed: int = 0
    """Seed of the weights' initialisation, of the samples and of the data order."""

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
            at_least={"dropout": 0.0, "arch_weight_decay": 0.0, "arch_noise": 0.0}
            | {"arch_average": 0.0}
            | {"arch_every": 1, "warmup_steps": 0, "seed": 0},
            above={"scaling": 0.0, "budget_rank": 0.0, "budget_parameters": 0}
            | {"arch_learning_rate": 0.0},
        )
        require(self.dropout < 1, "dropout", self.dropout, "must be below 1")
        if (part := self.search_fraction) is not None:
            rule = "must be above 0 and at most 1"
            require(is_real(part) and 0 < part <= 1, "search_fraction", part, rule)
        share = self.arch_average or 0.0
        require(share <= 1, "arch_average", share, "must be at most 1")
        self._check_budget()
        for name, rule in (
            ("temperature", lambda t: t > 0),
            ("arch_betas", lambda b: 0 <= b < 1),
        ):
            pair = getattr(self, name)
            ok = isinstance(pair, list | tuple) and len(pair) == 2
            ok = ok and all(is_real(v) and rule(v) for v in pair)
            bound = "above 0" if name == "temperature" else "in [0, 1)"
            require(ok, name, pair, f"must be two numbers {bound}")
            setattr(self, name, tuple(float(v) for v in pair))

    def _check_budget(self) -> None:
        if self.budget_rank is not None and self.budget_parameters is not None:
            raise InputError(
                f"budget_rank={self.budget_rank} and budget_parameters={self.budget_parameters}: "
                "give one of the two"
            )
        none = self.budget_rank is None and self.budget_parameters is None
        if self.arch_update == "proportional" and none:
            raise InputError(
                "arch_update=proportional: shares a budget; give budget_rank or "
                "budget_parameters, or use arch_update=gradient"
            )


@dataclass
class ModelConfig:
    """Which base model is loaded, and how."""

    model_name_or_path: str = "embedded"
    """Hub name or local folder; embedded: the small vision-language model of this package."""
    gguf_file: str | None = None
    """GGUF file in that folder or hub repository to read the model from (its weights unpacked)."""
    task: Literal["auto", "generation", "classification"] = "auto"
    """What the model is for; auto: classification where the checkpoint has a head for it."""
    num_labels: int | None = None
    """Classes of a classification (count); default: as the checkpoint says."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights; auto: as stored."""
    quantization: Literal["4bit", "8bit", "int8"] | None = None
    """Weights of the base model: 4bit (NF4) and 8bit by bitsandbytes, int8 by torchao."""
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
    """A row above max_length, or above what the model takes: an error that names it, left out, or
    cut at its end; default: as on_bad_row. To leave rows out, all are read once at the start."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that no batch can be made of: an error that names it, or left out."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Largest image (width times height); decoding and resizing takes some 70 bytes a pixel."""
    pad_to_multiple_of: int = 1
    """Pad the sequences of a batch to a multiple of this many tokens: fewer shapes of batches."""
    split_by: Literal["image", "prompt", "row"] = "image"
    """What stays on one side of a split, unless all rows have the same: all rows of an image, and
    where there is none of a prompt; all rows of a prompt with its images; or each row by itself.
    Alpha must not learn on images or prompts that the weights know."""
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
    """Weight steps (optimizer steps) of the whole run: a search takes a part of them
    (search_fraction), the finetune of its genotype the rest. A finetune from scratch takes all."""
    batch_size: int = 16
    """Rows of a batch on each process."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up for one weight step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the LoRA weights (AdamW), in a search and in a finetune."""
    weight_decay: float = 0.0
    """Weight decay of the LoRA weights."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after its warm-up; the last two end at 0."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    max_grad_norm: float = 1.0
    """Clip the norm of the weights' gradient to this; 0 switches clipping off."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass; fp16, with loss scaling, where the model is in float16."""
    logging_steps: int = 10
    """Steps between two log entries."""
    save_steps: int = 500
    """Steps between two checkpoints; 0: none but the last."""
    num_workers: int = 0
    """Worker processes of each data loader."""
    max_runtime: float | None = None
    """Stop in good order after this time of training (minutes), with exit status 75; a search then
    goes on with --resume. Leave room for loading the model and for writing."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"weight_decay": 0.0, "lr_warmup_steps": 0, "max_grad_norm": 0.0}
            | {"save_steps": 0, "num_workers": 0},
            above={"max_steps": 0, "batch_size": 0, "gradient_accumulation_steps": 0}
            | {"learning_rate": 0.0, "logging_steps": 0, "max_runtime": 0.0},
        )

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
            near = get_close_matches(name, known, 1)
            hint = f"; nearest name: {near[0]}" if near else ""
            raise InputError(f"{name}: is no option{hint}")
    return [c(**{n: v for n, v in options.items() if n in names[c]}) for c in classes]
