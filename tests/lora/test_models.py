"""Loading models and processors by the Auto classes, from GGUF too, and what cannot be loaded.
Not here: bases in 4 and 8 bits (test_quantized.py), processors at work (test_collator.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from families import IMAGE_FAMILIES, TEXT_FAMILIES, TORCHVISION_FAMILIES, bert, deberta, make_family
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    XLNetConfig,
)

from darts_lora.base.errors import InputError
from darts_lora.config import ModelConfig
from darts_lora.lora.models import (
    auto_class,
    context_length,
    is_classifier,
    load_model,
    load_model_config,
    load_processor,
    sample_of,
    weight_samples,
)
from darts_lora.lora.parts import heads
from small_models import make_tokenizer, vision_model, vision_processor


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Folder of a tiny Llama with a tokenizer that has no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_the_embedded_default_is_an_image_text_to_text_model():
    model, processor = load_model(ModelConfig()), load_processor(ModelConfig())
    assert isinstance(model, MllamaForConditionalGeneration)
    assert not model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert processor.image_processor is not None and processor.tokenizer.pad_token is not None


def test_a_vision_language_model_from_a_folder(vision_folder):
    model, processor = (
        load_model(ModelConfig(vision_folder)),
        load_processor(ModelConfig(vision_folder)),
    )
    assert isinstance(model, MllamaForConditionalGeneration) and not model.training
    assert processor.image_processor is not None and processor.tokenizer.pad_token == "<pad>"
    reference = vision_model(vision_processor()).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_options_reach_the_model(vision_folder, recompute):
    config = ModelConfig(vision_folder, dtype="bfloat16", gradient_checkpointing=recompute)
    model = load_model(config)
    assert model.dtype == torch.bfloat16
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers and all(m.gradient_checkpointing == recompute for m in layers)
    assert model.config.text_config.use_cache != recompute


def test_a_text_model_from_a_folder(text_model):
    config = ModelConfig(text_model)
    assert load_model(config).config.model_type == "llama"
    tokenizer = load_processor(config)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


BERT_CLASSIFIER = BertConfig(architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize(
    ("config", "task", "expected"),
    [
        (MllamaConfig(), "auto", AutoModelForImageTextToText),
        (LlavaConfig(), "auto", AutoModelForImageTextToText),
        (LlavaConfig(), "generation", AutoModelForImageTextToText),
        (LlamaConfig(), "auto", AutoModelForCausalLM),
        (LlamaConfig(), "classification", AutoModelForSequenceClassification),
        (BERT_CLASSIFIER, "auto", AutoModelForSequenceClassification),
        (BERT_CLASSIFIER, "generation", AutoModelForCausalLM),
        (BertConfig(architectures=["BertForMaskedLM"]), "auto", AutoModelForCausalLM),
    ],
)
def test_the_configuration_and_the_task_decide_the_auto_class(config, task, expected):
    assert auto_class(config, task) is expected
    assert is_classifier(config, task) == (expected is AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=78), 78),
        (MllamaConfig(text_config={"max_position_embeddings": 79}), 79),
        (T5Config(), None),
        (XLNetConfig(), None),  # -1 there
    ],
)
def test_the_longest_sequence_is_that_of_the_text(config, length):
    assert context_length(config) == length


def test_a_classifier_from_a_folder(tmp_path):
    folder = make_family(bert, str(tmp_path))
    model = load_model(ModelConfig(folder))
    assert model.config.num_labels == 3 and model.fresh_modules == []
    reference = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.randint(0, 64, (2, 5))
    assert torch.equal(model(ids).logits, reference.eval()(ids).logits)


def test_another_number_of_labels_makes_a_new_head_and_nothing_else_new(tmp_path):
    folder = make_family(bert, str(tmp_path))
    config = ModelConfig(folder, num_labels=5)
    model, reference = load_model(config), load_model(ModelConfig(folder))
    assert load_model_config(config).num_labels == 5
    assert model.classifier.weight.shape == (5, 16) and model.fresh_modules == []
    assert (reference.classifier.weight.shape, model.config.num_labels) == ((3, 16), 5)
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, reference.bert.state_dict()[name]), name
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 12}))
    with pytest.raises(InputError, match=r"the shape of bert\.\S+ is not that .* new head alone"):
        load_model(config)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Bart", {"d_model": 16}), ("XLNet", {"d_model": 16}), ("XLM", {"emb_dim": 16})],
)
def test_another_number_of_labels_of_a_head_with_a_name_of_its_own(tmp_path, name, options):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "n_layer": 1, "n_layers": 1}
    sizes = {"vocab_size": 64, "n_head": 2, "n_heads": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "num_labels": 3, **layers, **options}
    config = getattr(transformers, f"{name}Config")(**sizes)
    make = getattr(transformers, f"{name}ForSequenceClassification")
    make(config).save_pretrained(tmp_path)
    make_tokenizer(None).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), num_labels=5))
    assert model.config.num_labels == 5 and model.fresh_modules == []
    assert any(
        p.shape == (5,) for n, p in model.named_parameters() if n.startswith(heads(model)[-1])
    )


def test_a_generation_checkpoint_without_all_weights_is_refused(text_model, tmp_path):
    folder = str(tmp_path / "model")
    model = load_model(ModelConfig(text_model))
    model.save_pretrained(folder)
    make_tokenizer(None).save_pretrained(folder)
    state = model.state_dict()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        del state[name]
    save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"no weights for 2 of 12 tensors of LlamaForCausalLM, fir"
    ):
        load_model(ModelConfig(folder))


def test_checkpointing_of_a_model_that_has_none_is_refused(text_model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="gradient_checkpointing=true: LlamaForCausalLM has none"):
        load_model(ModelConfig(text_model, gradient_checkpointing=True))


def test_an_encoder_decoder_generates_no_text_here_but_classifies(tmp_path):
    BartConfig(d_model=16).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="bart has an encoder and a decoder"):
        load_model_config(ModelConfig(str(tmp_path)))
    load_model_config(ModelConfig(str(tmp_path), task="classification"))


def test_what_a_classifiers_checkpoint_lacks_is_named(tmp_path):
    config = ModelConfig(make_family(deberta, str(tmp_path)), task="classification")
    first, second = load_model(config), load_model(config)
    assert first.fresh_modules == ["pooler.dense", "classifier"]
    drawn = {
        name for name, p in first.named_parameters() if not p.equal(second.get_parameter(name))
    }
    assert drawn == {"pooler.dense.weight", "classifier.weight"}, "biases are 0"


@pytest.mark.parametrize("task", ["auto", "generation"])
def test_a_number_of_labels_is_for_classifiers(text_model, task):
    with pytest.raises(InputError, match=r"num_labels=3: .* task='.*' .* use task=classification"):
        load_model_config(ModelConfig(text_model, task=task, num_labels=3))
    load_model_config(ModelConfig(text_model, task="classification", num_labels=3))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_left_out_or_tied_is_not_new(text_model, tmp_path, tied):
    source = load_model(ModelConfig(text_model))
    source.config.tie_word_embeddings = tied
    source.tie_weights()
    source.save_pretrained(tmp_path)
    load_processor(ModelConfig(text_model)).save_pretrained(tmp_path)
    assert not hasattr(load_model(ModelConfig(str(tmp_path))), "fresh_modules")
    model = load_model(ModelConfig(str(tmp_path), task="classification"))
    assert model.fresh_modules == ["score"]


@pytest.mark.parametrize("pad_token_id", [None, 1])
def test_a_language_model_as_a_classifier_finds_the_last_token(text_model, tmp_path, pad_token_id):
    """Rows are padded by the tokenizer's token, whatever the checkpoint's configuration says."""
    source = load_model(ModelConfig(text_model))
    source.config.pad_token_id = pad_token_id
    source.save_pretrained(tmp_path)
    tokenizer = load_processor(ModelConfig(text_model))
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), task="classification", num_labels=4)
    model = load_model(config)
    assert isinstance(model, LlamaForSequenceClassification)
    batch = tokenizer(["a", "a b b a"], padding=True, padding_side="right", return_tensors="pt")
    assert (batch["attention_mask"] == 0).sum() == 3
    together = model(**batch).logits
    assert together.shape == (2, 4)
    alone = model(**tokenizer(["a"], return_tensors="pt")).logits
    assert torch.allclose(together[:1], alone, atol=1e-6)


# transformers' name of a Llama's weight -> that of a GGUF file.
GGUF_NAMES = {
    "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF_TOKENS = ["<pad>", "<s>", "</s>", "a", "b", "ab", "ba"]


def gguf_tensor(name, value, config):
    """Name and values as llama.cpp writes them: the halves of a head's rotation interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            value = value.reshape(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, value.contiguous().numpy()


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    """A small Llama, and the folder that holds it as tiny.gguf."""
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, folder = LlamaForCausalLM(config).eval(), tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b a"])  # of one, transformers 5.17 makes a text
    for add, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{add}_token_id")(token)
    for name, value in model.state_dict().items():
        writer.add_tensor(*gguf_tensor(name, value, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, folder


def test_a_model_and_its_tokenizer_from_gguf(gguf_model):
    original, folder = gguf_model
    config = ModelConfig(str(folder), gguf_file="tiny.gguf")
    model, ids = load_model(config), torch.randint(0, 6, (2, 9))
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert (model(ids).logits - original(ids).logits).abs().max() < 1e-5
    assert context_length(load_model_config(config)) == 64
    tokenizer = load_processor(config)
    assert tokenizer("abba")["input_ids"] == [5, 6] and tokenizer.pad_token is not None
    half = load_model(ModelConfig(str(folder), gguf_file="tiny.gguf", dtype="bfloat16"))
    assert half.dtype == torch.bfloat16


def test_a_merged_model_of_a_gguf_base_loads_as_any_other(gguf_model, tmp_path):
    config = ModelConfig(str(gguf_model[1]), gguf_file="tiny.gguf")
    adapted = get_peft_model(load_model(config), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged, ids = adapted.merge_and_unload(), torch.arange(6)[None]
    merged.save_pretrained(tmp_path)
    load_processor(config).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("abba")["input_ids"] == [5, 6]


def test_a_folder_of_gguf_files_is_told_to_name_one(gguf_model, tmp_path):
    for name in (str(gguf_model[1]), str(gguf_model[1] / "tiny.gguf")):
        for load in (load_model, load_processor):
            with pytest.raises(InputError, match=r"GGUF files: give --gguf_file tiny\.gguf$"):
                load(ModelConfig(name))


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_gguf_files_that_are_not_there_or_cut_off(gguf_model, tmp_path, load):
    content = (gguf_model[1] / "tiny.gguf").read_bytes()
    for size in (0, 10, 60, 500, len(content) // 2, len(content) - 50):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(InputError, match="cannot be loaded"):
            load(ModelConfig(str(tmp_path), gguf_file="cut.gguf"))
    with pytest.raises(InputError, match=r"named other\.gguf.*give a hub name, a folder") as error:
        load(ModelConfig(str(tmp_path), gguf_file="other.gguf"))
    assert "pip install" not in str(error.value), "gguf is installed"


# What `import` and importlib.util.find_spec say of None is what they say of a missing package, but
# for the package's metadata.
WITHOUT_EXTRAS = """
import importlib.metadata, json, sys
hidden = ("torchvision", "num2words", "bitsandbytes", "torchao", "gguf")
sys.modules.update(dict.fromkeys(hidden))
version = importlib.metadata.version
def visible(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = visible
from darts_lora.config import ModelConfig
from darts_lora.base.errors import InputError
from darts_lora.lora.models import load_model, load_processor
told = {}
for name, (load, options) in json.load(sys.stdin).items():
    try:
        globals()[load](ModelConfig(**options))
        told[name] = "loaded"
    except InputError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def test_a_missing_package_is_named_with_the_extra_that_brings_it(gguf_model, tmp_path):
    asked, extras = {}, {}
    for name, make in {**TORCHVISION_FAMILIES, **IMAGE_FAMILIES}.items():
        (tmp_path / name).mkdir()
        folder = {"model_name_or_path": make_family(make, str(tmp_path / name))}
        asked[name] = ("load_processor", folder)
        extras[name] = "vision" if name in TORCHVISION_FAMILIES else None
    (tmp_path / "llama").mkdir()
    llama = {"model_name_or_path": make_family(TEXT_FAMILIES["llama"], str(tmp_path / "llama"))}
    for kind in ("4bit", "8bit", "int8"):
        asked[kind] = ("load_model", {**llama, "quantization": kind})
        extras[kind] = "quantization"
    asked["llama"], extras["llama"] = ("load_model", llama), None
    folder = {"model_name_or_path": str(gguf_model[1]), "gguf_file": "tiny.gguf"}
    for load in ("load_model", "load_processor"):
        asked[f"gguf {load}"], extras[f"gguf {load}"] = (load, folder), "smollm2"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], input=json.dumps(asked), text=True,
        capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    for name, extra in extras.items():
        if extra is None:
            assert told[name] == "loaded", name
        else:
            assert told[name].endswith(f'; pip install "darts_lora[{extra}]"'), told[name]
            assert "cannot be loaded (" in told[name], told[name]


def test_a_name_that_is_no_model(tmp_path):
    for load in (load_model, load_processor):
        with pytest.raises(InputError, match=r"model_name_or_path='/no/such.*no local folder"):
            load(ModelConfig("/no/such/model"))
    with pytest.raises(InputError, match=r"cannot be loaded .*give a hub name, a folder"):
        load_model(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_is_not_told_as_a_name_that_is_no_model(monkeypatch, text_model, kind):
    def fail(*args, **options):
        raise kind("out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(kind):
        load_model(ModelConfig(text_model))


def test_a_damaged_weights_file(text_model, tmp_path):
    source = load_model(ModelConfig(text_model))
    source.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"\x00" * 20, weights[:-50], b""):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(ModelConfig(str(tmp_path)))


def test_weights_of_other_shapes(text_model, tmp_path):
    load_model(ModelConfig(text_model)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 12}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no such type"}'])
def test_a_damaged_configuration(text_model, tmp_path, content):
    load_model(ModelConfig(text_model)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(tmp_path)))


def test_a_folder_of_a_model_that_holds_an_adapter_too_is_refused(vision_folder, tmp_path):
    """transformers would load the adapter into the model, or follow it to another base model."""
    folder = shutil.copytree(vision_folder, tmp_path / "both")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    for load in (load_model_config, load_model):
        with pytest.raises(InputError, match=r"both': holds an adapter \(adapter_config\.json\)"):
            load(ModelConfig(str(folder)))


def test_a_few_elements_tell_another_checkpoint_and_stay_as_they_were():
    model = torch.nn.Linear(1000, 3)
    ((weight, sample), (_, bias)) = weight_samples(model)
    assert weight is model.weight and 256 <= len(sample) < 512 and len(bias) == 3
    with torch.no_grad():
        model.weight += 1
    assert not torch.equal(sample, sample_of(weight))
