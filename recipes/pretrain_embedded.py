"""Makes the embedded default: pretrains a small Mllama on easy-vqa, writes model and data.
Not here: loading either of them (darts_lora/models.py, darts_lora/data.py), nor any search.

python recipes/pretrain_embedded.py                          # into darts_lora/embedded
python recipes/pretrain_embedded.py --output_dir runs/embedded --max_steps 20
"""

import importlib.metadata
import json
import math
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from darts_lora.cli import run
from darts_lora.config import DataConfig
