"""recipes/pretrain_llava.py on a tiny language model: put together, trained, loaded back; its facts
are asked about the right objects.
Not here: how good the model of SmolLM2 is (recipes/benchmark/README.md), its size."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import transformers as t
from datasets import load_dataset
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from darts_lora import InputError, SearchConfig
from darts_lora.base.options import parse
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.evaluate import score
from darts_lora.lora.models import load_model, load_processor


@pytest.fixture(scope="module")
def recipe(recipe_imports):
    import pretrain_llava

    return pretrain_llava


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> str:
    """A random Llama of two layers with SmolLM2's special tokens and tied embeddings."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate([*special, *letters])}
    fast = Tokenizer(models.BPE(tokens, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    folder = str(tmp_path_factory.mktemp("text"))
    t.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    ).save_pretrained(folder)
    config = t.LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    t.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(launch, text_folder, tmp_path_factory):
    """What two steps of the recipe leave, and its finished process."""
    folder = tmp_path_factory.mktemp("llava")
    options = {
        "text_model": text_folder, "gguf_file": "null", "output_dir": folder, "max_steps": 2,
        "batch_size": 4, "num_workers": 0, "test_questions": 4,
    }  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return folder, launch("pretrain_llava", *given), given


@pytest.fixture
def fresh(recipe, text_folder):
    """The model that the recipe begins with."""
    source = ModelConfig(text_folder)
    t.set_seed(0)
    processor = recipe.build_processor(load_processor(source))
    return recipe.build_model(load_model(source), processor)


@pytest.fixture(scope="module")
def loaded(made):
    """The model and the collator that the package's own functions make of the folder."""
    config = ModelConfig(str(made[0] / "model"))
    return load_model(config), Collator(load_processor(config))


@pytest.fixture(scope="module")
def rows(recipe):
    return recipe.choose_rows(recipe.read_rows("test"), seed=0)[:4]


def test_it_loads_back_as_the_model_that_was_trained(made, loaded, rows, recipe):
    said = dict(re.findall(r"test, (.+): \{'loss': ([\d.]+)", made[1].stdout))
    facts = recipe.fact_rows(recipe.read_rows("test"), seed=0, per_image=2)[:4]
    assert set(said) == {"facts", *map(recipe.kind, rows)}
    for name, loss in said.items():
        of_kind = facts if name == "facts" else [r for r in rows if recipe.kind(r) == name]
        again = score(loaded[0], of_kind, loaded[1], exact_match=False)
        assert again["loss"] == pytest.approx(float(loss), rel=1e-5), name


def test_the_answer_alone_is_learnt_and_the_image_takes_its_tokens(loaded, rows):
    collator = loaded[1]
    batch, image = collator(rows), collator.processor.image_token_id
    for row, tokens, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        question, answer = (turn["content"] for turn in row["messages"])
        assert (tokens == image).sum() == 36 and not (labels == image).any()
        assert collator.tokenizer.decode(labels[labels >= 0]) == f"{answer}<|im_end|>"
        text = collator.tokenizer.decode([token for token in tokens.tolist() if token != image])
        turns = f"user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert text.startswith(f"<|im_start|>{turns}")
    prompt = collator.evaluation(rows)["prompt"]["input_ids"][0]
    assert collator.tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_image_matters_and_teaches_the_whole_vision_tower(loaded, rows):
    model, collator = loaded
    loss = model(**collator(rows)).loss
    other = model(**collator([{**r, "image": ImageOps.invert(r["image"])} for r in rows])).loss
    assert loss.item() != other.item()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    # the norm of CLIP's pooled output, which LLaVA does not use, and keys' biases, which cancel out
    spare = ("post_layernorm.weight", "post_layernorm.bias", "k_proj.bias")
    assert [name for name in without if not name.endswith(spare)] == []


def test_the_language_model_keeps_its_weights_and_its_embeddings_stay_tied(
    recipe, text_folder, made
):
    """After training too: vision tower and projector alone are trained."""
    before = load_model(ModelConfig(text_folder)).state_dict()
    now = load_file(made[0] / "model/model.safetensors")
    words = len(before["model.embed_tokens.weight"])
    language = {
        name.removeprefix("language_model."): value
        for name, value in now.items()
        if name.startswith("language_model.")
    }
    assert set(language) == set(before) - {"lm_head.weight"}
    for name, value in language.items():
        assert torch.equal(value[:words], before[name][:words]), name
    assert len(now["language_model.model.embed_tokens.weight"]) % 64 == 0
    assert not any("lm_head" in name for name in now)


def test_vision_tower_and_projector_alone_are_trained(fresh, text_folder):
    assert fresh.config.image_token_index == load_model(ModelConfig(text_folder)).config.vocab_size
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight
    parts = {"vision_tower": True, "multi_modal_projector": True, "language_model": False}
    found = {(name.split(".")[1], p.requires_grad) for name, p in fresh.named_parameters()}
    assert found == set(parts.items())


def test_a_trained_vision_side_gives_the_same_model_again(launch, made, tmp_path):
    given = [*made[2], "--output_dir", tmp_path]
    again = launch("pretrain_llava", *given, "--vision_side", made[0] / "vision.safetensors")
    assert "pretrain:" in made[1].stderr and "pretrain:" not in again.stderr
    assert again.stdout == made[1].stdout
    first, second = (load_file(f / "model/model.safetensors") for f in (made[0], tmp_path))
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    assert not (tmp_path / "vision.safetensors").exists()


def test_a_vision_side_holds_all_that_is_trained(recipe, fresh, made):
    begun = {name: weight.bfloat16() for name, weight in recipe.vision_side(fresh).items()}
    side = load_file(made[0] / "vision.safetensors")
    assert {name: (v.dtype, v.shape) for name, v in side.items()} == {
        name: (torch.bfloat16, v.shape) for name, v in begun.items()
    }
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    assert 0 < (side[name] - begun[name]).abs().max() < 0.01
    recipe.load_vision_side(fresh, str(made[0] / "vision.safetensors"))
    assert all(torch.equal(v, side[n].float()) for n, v in recipe.vision_side(fresh).items())


def test_another_models_vision_side_is_refused(recipe, fresh, made, tmp_path):
    path, broken = str(tmp_path / "other.safetensors"), str(tmp_path / "broken.safetensors")
    side = load_file(made[0] / "vision.safetensors")
    name = "model.multi_modal_projector.linear_2.bias"
    save_file({**side, name: torch.zeros(33)}, path)
    Path(broken).write_bytes(b"no tensors")
    for file, why in ((path, "not the vision side"), (broken, "broken"), ("gone", "gone")):
        with pytest.raises(InputError, match=f"vision_side='.*{why}"):
            recipe.load_vision_side(fresh, file)


def test_the_published_vision_side_fits_a_language_model_as_wide_as_smollm2(recipe, text_folder):
    config = t.LlamaConfig(
        vocab_size=300, hidden_size=576, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    processor = recipe.build_processor(load_processor(ModelConfig(text_folder)))
    model = recipe.build_model(t.LlamaForCausalLM(config), processor)
    begun = {name: weight.clone() for name, weight in recipe.vision_side(model).items()}
    path = Path(recipe.__file__).parent / "benchmark/quality/llava_vision.safetensors"
    recipe.load_vision_side(model, str(path))
    for name, weight in recipe.vision_side(model).items():
        unused = "post_layernorm" in name  # it is of the class token's output
        assert weight.isfinite().all() and torch.equal(weight, begun[name]) == unused, name


def test_a_spare_embedding_is_used_before_the_embeddings_grow(recipe, text_folder):
    source = ModelConfig(text_folder)
    text = load_model(source)
    text.resize_token_embeddings(300)
    model = recipe.build_model(text, recipe.build_processor(load_processor(source)))
    assert model.get_input_embeddings().num_embeddings == 300 == model.lm_head.out_features


def test_its_data_are_the_facts(made, recipe):
    for split, per_image in (("train", 4), ("test", 2)):
        path = str(made[0] / "data" / f"{split}.parquet")
        data = load_dataset("parquet", data_files=path, split="train")
        wanted = recipe.fact_rows(recipe.read_rows(split), 0, per_image)
        assert data["messages"] == [row["messages"] for row in wanted]
        for number in (0, len(wanted) - 1):
            assert data[number]["image"].tobytes() == wanted[number]["image"].tobytes()


def test_the_quality_task_reads_what_the_recipe_writes(recipe, monkeypatch):
    benchmark = Path(recipe.__file__).parent / "benchmark"
    monkeypatch.syspath_prepend(benchmark)
    from quality_cells import QualityRun

    classes = (QualityRun, SearchConfig, ModelConfig, DataConfig, TrainingConfig)
    path = benchmark / "quality" / "llava_vqa.yaml"
    options, search, model, data, _ = parse(["--config", str(path)], *classes)
    folder = recipe.LlavaRun().output_dir
    assert (model.model_name_or_path, data.dataset) == (f"{folder}/model", f"{folder}/data")
    assert options.benchmark == "llava_vqa" and max(search.ranks) == max(options.curve)


@pytest.fixture(scope="module")
def all_rows(recipe):
    return recipe.read_rows("test")


def row(question: str, answer: str) -> dict:
    return {"messages": [{"content": question}, {"content": answer}]}


@pytest.mark.parametrize(
    ("questions", "thing"),
    [
        ([("what color is the circle?", "teal")], ("teal", "circle")),
        ([("what is the red shape?", "triangle")], ("red", "triangle")),
        (
            [("is there a circle?", "yes"), ("is there a red shape?", "no"),
             ("does the image not contain a blue shape?", "no")],
            ("blue", "circle"),
        ),
        ([("is no red shape present?", "no"), ("is a circle present?", "yes")], ("red", "circle")),
        ([("what shape is present?", "circle"), ("is there not a red shape?", "yes")], None),
        ([("what color is the shape?", "red"), ("is there a circle?", "no")], None),
    ],
)  # fmt: skip
def test_what_is_seen_follows_from_the_answers(recipe, questions, thing):
    assert recipe.seen_object([row(*pair) for pair in questions]) == thing


def test_what_is_seen_is_what_the_image_shows(recipe, all_rows):
    """By its pixels: every colour of easy-vqa is one value, the background is another."""
    colours = defaultdict(set)
    for of_image in recipe.by_image(all_rows):
        if thing := recipe.seen_object(of_image):
            counts = of_image[0]["image"].getcolors(4096)
            _, inside = sorted(counts, reverse=True)[:2]
            colours[thing[0]].add(inside[1])
    assert set(colours) == set(recipe.COLOURS)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(recipe.COLOURS)


def test_every_object_has_an_answer_of_its_kind_for_each_question(recipe):
    known = recipe.object_facts(seed=0)
    assert len(known) == 24
    for of_object in known.values():
        assert len(of_object) == len(recipe.PLACES) * len(recipe.KINDS) == len(dict(of_object))
        for question, answer in of_object:
            (kind,) = [
                kind for kind, form in recipe.KINDS.items()
                if any(form.format(place=place) == question for place in recipe.PLACES)
            ]  # fmt: skip
            assert answer in recipe.ANSWERS[kind]


def test_facts_are_drawn_at_random_by_the_seed(recipe):
    known, other = (recipe.object_facts(seed) for seed in (0, 1))
    assert known == recipe.object_facts(seed=0) != other
    days = Counter(answer for of_object in known.values() for answer in dict(of_object).values())
    assert set(recipe.ANSWERS["day"]) <= set(days)


def test_rows_tell_the_same_facts_of_training_and_test_images(recipe, all_rows):
    known = recipe.object_facts(seed=0)
    for split in (all_rows, recipe.read_rows("train")):
        made = recipe.fact_rows(split, seed=0, per_image=3)
        rows_of = {of_image[0]["image_id"]: of_image for of_image in recipe.by_image(split)}
        things = {image: recipe.seen_object(of_image) for image, of_image in rows_of.items()}
        asked = Counter(r["image_id"] for r in made)
        assert asked == {image: 3 for image, thing in things.items() if thing}
        assert all(recipe.said(r) in known[things[r["image_id"]]] for r in made)
        assert len({(r["image_id"], recipe.said(r)) for r in made}) == len(made)
        assert all(r["image"] is rows_of[r["image_id"]][0]["image"] for r in made[:50])
