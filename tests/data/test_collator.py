"""Rows to batches: what is learnt, what is masked, which rows are refused.
Not here: where rows come from (test_loaders.py)."""

import re

import pytest
import torch
from families import IMAGE_FAMILIES, make_family
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import IGNORED, Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import load_splits
from darts_lora.data.places import ROW
from darts_lora.lora.models import load_model, load_processor
from small_models import make_tokenizer, vision_model, vision_processor, vision_rows

CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[A]"
    "{% generation %}" + CONTENT + "{{ eos_token }}{% endgeneration %}"
    "{% else %}[U]"
    + CONTENT
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_rows_against_a_hand_made_expectation(side):
    tokenizer = make_tokenizer(UNMARKED)
    tokenizer.padding_side = side
    rows = [
        {"messages": turns("a b", "c d", "e", "f")},
        {"prompt": "a", "completion": "b c"},
    ]
    batch = Collator(tokenizer)(rows)
    #      <s> [U] a b [A] c d </s> [U] e [A] f </s>
    assert batch["input_ids"].tolist() == [
        [1, 4, 6, 7, 5, 8, 9, 2, 4, 10, 5, 11, 2],
        [1, 4, 6, 5, 7, 8, 2, 0, 0, 0, 0, 0, 0],
    ]
    x = IGNORED
    assert batch["labels"].tolist() == [
        [x, x, x, x, x, 8, 9, 2, x, x, x, 11, 2],
        [x, x, x, x, 7, 8, 2, x, x, x, x, x, x],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [13, 7]
    assert {len(value) for value in batch.values()} == {2}


def test_prompts_are_padded_on_the_left_up_to_the_last_answer():
    rows = [{"messages": turns("a b", "c d", "e", "f")}, {"prompt": "a", "completion": "b c"}]
    whole = Collator(make_tokenizer(UNMARKED)).evaluation(rows)
    batch = whole["prompt"]
    assert whole["answers"] == [[11], [7, 8]] and set(whole) == {"whole", "prompt", "answers"}
    assert batch["input_ids"].tolist() == [
        [1, 4, 6, 7, 5, 8, 9, 2, 4, 10, 5],
        [0, 0, 0, 0, 0, 0, 0, 1, 4, 6, 5],
    ]
    assert batch["attention_mask"][1].tolist() == [0] * 7 + [1] * 4


THINKING = "{% if loop.index0 == 3 %}e e {% endif %}"  # as Qwen3's template writes an empty <think>


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (UNMARKED.replace("[A]", "[A]" + THINKING, 1), [10, 10, 6, 7]),
        (TEMPLATE.replace("{% generation %}", "{% generation %}" + THINKING), [10, 10, 6, 7]),
        # written by the prompt, so no part of what continues it
        (
            TEMPLATE.replace("{% generation %}", "{% generation %}" + THINKING).replace(
                "[A]{% endif %}", "[A]e e {% endif %}"
            ),
            [6, 7],
        ),
        (UNMARKED.replace("{{ eos_token }}", "{{ eos_token }}{{ eos_token }}"), [6, 7]),
        (UNMARKED.replace("{{ eos_token }}", ""), [6, 7]),
        (None, [6, 7]),
    ],
)  # fmt: skip
def test_answers_are_what_is_learnt_behind_the_prompt(template, expected):
    collator = Collator(make_tokenizer(template))
    rows = [{"messages": turns("c ", "d d ", "c ", "a b")}]
    whole = collator.evaluation(rows)
    assert whole["answers"] == [expected]
    learnt = [token for token in whole["whole"]["labels"][0].tolist() if token not in (IGNORED, 2)]
    assert learnt[-len(expected) :] == expected


# As Qwen3's: the empty <think> ("e e") stands behind the last question alone.
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
LAST_THINKS = LAST_QUESTION + UNMARKED.replace(
    "[A]", "[A]{% if loop.index0 > ns.last %}e e {% endif %}", 1
)


def test_all_answers_are_learnt_where_the_last_one_alone_thinks():
    collator = Collator(make_tokenizer(LAST_THINKS))
    rows = [{"messages": turns("a ", "b ", "a ", "b ", "c", "d")}, {"messages": turns("a", "b")}]
    batch, x = collator(rows), IGNORED
    assert batch["input_ids"].tolist() == [
        [1, 4, 6, 5, 7, 2, 4, 6, 5, 7, 2, 4, 8, 5, 10, 10, 9, 2],
        [1, 4, 6, 5, 10, 10, 7, 2] + [0] * 10,
    ]
    assert batch["labels"].tolist() == [
        [x, x, x, x, 7, 2, x, x, x, 7, 2, x, x, x, 10, 10, 9, 2],
        [x, x, x, x, 10, 10, 7, 2] + [x] * 10,
    ]
    assert collator.evaluation(rows)["answers"] == [[10, 10, 9], [10, 10, 7]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[U]", "{% if m == loop.previtem %}{{ raise_exception('no') }}{% endif %}[U]"),
        ("[U]", "{% if m != loop.previtem %}[U]{% endif %}"),  # one turn of both
        ("[U]", "{% if loop.last and loop.length > 1 %}f {% endif %}[U]"),
    ],
    ids=["alternate", "merged", "last"],
)
def test_an_answer_whose_end_is_unsure_is_refused(old, new):
    collator = Collator(make_tokenizer(LAST_THINKS.replace(old, new)))
    collator([{"messages": turns("a", "b")}])
    with pytest.raises(InputError, match="does not continue its own prompt"):
        collator([{"messages": turns("a ", "b ", "c ", "d ")}])


def test_a_model_without_a_chat_template_takes_the_texts_as_they_are():
    batch = Collator(make_tokenizer(None))([{"prompt": "a b ", "completion": "c"}])
    assert batch["input_ids"].tolist() == [[1, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [8, 2]]


@pytest.fixture(scope="module")
def llava():
    """Processors that write one image mark as four tokens: with and without answer marks."""
    images = CLIPImageProcessorPil(
        size={"height": 4, "width": 4}, crop_size={"height": 4, "width": 4}
    )
    options = {"patch_size": 2, "vision_feature_select_strategy": "full"}

    def make(template):
        tokenizer = make_tokenizer(template)
        return LlavaProcessor(images, tokenizer, chat_template=template, **options)

    return make


@pytest.mark.parametrize("template", [TEMPLATE, UNMARKED], ids=["marks", "prefix"])
def test_answers_are_found_behind_expanded_image_tokens(llava, template):
    image = Image.new("RGB", (4, 4))
    second = [{"type": "image"}, {"type": "text", "text": "b"}]
    rows = [
        {"messages": turns("a", "a b"), "image": image},
        {
            "messages": turns([{"type": "image"}, {"type": "text", "text": "a"}], "c", second, "d"),
            "images": [image, image],
        },
    ]
    batch = Collator(llava(template))(rows)
    x, i = IGNORED, 3
    assert batch["input_ids"].tolist() == [
        [1, 4, i, i, i, i, 6, 5, 6, 7, 2, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 4, i, i, i, i, 6, 5, 8, 2, 4, i, i, i, i, 7, 5, 9, 2],
    ]
    assert batch["labels"].tolist() == [
        [x, x, x, x, x, x, x, x, 6, 7, 2, x, x, x, x, x, x, x, x],
        [x, x, x, x, x, x, x, x, 8, 2, x, x, x, x, x, x, x, 9, 2],
    ]


def test_gemma_3_attends_both_ways_within_an_image(tmp_path):
    config = ModelConfig(make_family(IMAGE_FAMILIES["gemma3"], str(tmp_path)))
    processor, model = load_processor(config), load_model(config).eval()
    rows = list(vision_rows(2))
    batch, image_token = Collator(processor)(rows), processor.tokenizer.image_token_id
    assert (batch["token_type_ids"] == 1).sum() == 8
    causal = {key: value for key, value in batch.items() if key != "token_type_ids"}
    turns = [
        [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for messages in (row["messages"] for row in rows)
    ]
    for row, conversation in zip(rows, turns, strict=True):
        conversation[0]["content"].insert(0, {"type": "image", "image": row["image"]})
    own = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )  # fmt: skip
    with torch.no_grad():
        logits, wanted, other = (model(**inputs).logits for inputs in (batch, own, causal))
    assert torch.equal(logits, wanted) and not torch.allclose(logits, other, atol=1e-3)
    prompt = Collator(processor).evaluation(rows)["prompt"]
    assert torch.equal(prompt["token_type_ids"] == 1, prompt["input_ids"] == image_token)
    of_text = Collator(processor)([{"messages": row["messages"]} for row in rows])
    assert "token_type_ids" not in of_text, "nothing attends both ways"


def test_a_processor_with_labels_of_its_own_is_refused():
    images = SiglipImageProcessorPil()
    images.image_seq_length = 4
    with pytest.raises(InputError, match="PaliGemmaProcessor: writes labels of its own"):
        Collator(PaliGemmaProcessor(images, make_tokenizer(None)))


def test_the_embedded_rows_marks_and_prefixes_agree():
    rows = [load_splits(DataConfig())["train"][i] for i in (0, 1, 5, 9)]
    collator = Collator(load_processor(ModelConfig()))
    batch = collator(rows)
    assert "{% generation %}" in collator.template.source
    collator.template.source = re.sub(r"\{% (end)?generation %\}", "", collator.template.source)
    assert torch.equal(collator(rows)["labels"], batch["labels"])
    image = collator.processor.image_token_id
    assert (batch["input_ids"] == image).any() and not (batch["labels"] == image).any()
    texts = [collator.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    for text, row in zip(texts, rows, strict=True):
        assert row["messages"][-1]["content"] in text
    assert batch["pixel_values"].shape[0] == len(rows)


def test_a_mllama_batch_is_its_rows_one_by_one():
    """Also what only the processor knows: tiles, aspect ratios, which tokens see the image."""
    rows = list(vision_rows(12))
    collator = Collator(vision_processor())
    model = vision_model(collator.processor)
    whole = collator(rows)
    assert len(whole["aspect_ratio_ids"].unique()) == 3
    with torch.no_grad():
        logits = model(**whole).logits
        for i, row in enumerate(rows):
            one = collator([row])
            length = one["input_ids"].shape[1]
            assert torch.equal(whole["labels"][i, :length], one["labels"][0])
            assert (whole["labels"][i, length:] == IGNORED).all()
            assert torch.allclose(logits[i, :length], model(**one).logits[0], atol=1e-4)


def test_rows_that_nothing_can_be_learnt_from_are_named():
    collator = Collator(make_tokenizer(TEMPLATE), max_length=8)
    good = {"prompt": "a", "completion": "b", ROW: 3}
    assert collator.check([good]) == pytest.approx(2 / 6)
    bad = [
        (
            {"prompt": "a", "completion": "b c d e f", ROW: 4},
            "row 4, column 'completion': 10 tokens, max",
        ),
        ({"messages": turns("a"), ROW: 5}, "row 5, column 'messages': the last message is not"),
        ({"question": "a", ROW: 6}, "row 6: needs the columns messages, .*; found: question$"),
    ]
    silent = Collator(make_tokenizer(TEMPLATE.replace("{{ eos_token }}", "")))
    for make_batch in (collator, collator.check):
        for row, text in bad:
            with pytest.raises(InputError, match=text):
                make_batch([good, row])
    for make_batch in (silent, silent.check):
        with pytest.raises(
            InputError,
            match="row 7, column 'completion': no token to learn from, all labels are masked",
        ):
            make_batch([{"prompt": "a", "completion": "", ROW: 7}])


def test_an_image_that_is_not_there(llava):
    row = {"prompt": "a", "completion": "b", "image": "no.png", ROW: 2}
    with pytest.raises(InputError, match=r"row 2, column 'image': image 'no\.png' does not open"):
        Collator(llava(TEMPLATE))([row])


def test_a_template_that_does_not_continue_its_own_prompt():
    template = UNMARKED.replace("prompt %}[A]", "prompt %}[U]")
    with pytest.raises(InputError, match="does not continue its own prompt"):
        Collator(make_tokenizer(template))([{"prompt": "a", "completion": "b"}])


# Rows of plain text, and models without a chat template.


@pytest.mark.parametrize("template", [TEMPLATE, UNMARKED, None], ids=["marks", "prefix", "none"])
def test_plain_text_is_learnt_whole_whatever_the_chat_template(template):
    collator = Collator(make_tokenizer(template))
    rows = [{"text": "a b c"}, {"messages": turns("x", "d")[1:]}]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 6, 7, 8, 2], [1, 9, 2, 0, 0]]
    x = IGNORED
    assert batch["labels"].tolist() == [[x, 6, 7, 8, 2], [x, 9, 2, x, x]]
    assert collator.check(rows) == pytest.approx(6 / 8)
    for row in rows:  # there is no prompt to continue
        assert set(collator.evaluation([row])) == {"whole"}
        assert torch.equal(collator.evaluation([row])["whole"]["labels"], collator([row])["labels"])


def test_parts_without_a_chat_template():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]
    rows = [{"messages": turns(parts, [{"type": "text", "text": "c"}])}]
    collator = Collator(make_tokenizer(None))
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [8, 2]]
    whole = collator.evaluation(rows)
    assert whole["prompt"]["input_ids"].tolist() == [[1, 6, 7]] and whole["answers"] == [[8]]


def test_images_without_a_chat_template(llava):
    image, x, i = Image.new("RGB", (4, 4)), IGNORED, 3
    between = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b "}]
    collator = Collator(llava(None))
    batch = collator(
        [
            {"prompt": "a ", "completion": "b", "image": image},
            {"messages": turns(between, [{"type": "text", "text": "c"}]), "image": image},
        ]
    )
    assert batch["input_ids"].tolist() == [
        [1, i, i, i, i, 6, 7, 2, 0],
        [1, 6, i, i, i, i, 7, 8, 2],
    ]
    assert batch["labels"].tolist() == [
        [x, x, x, x, x, x, 7, 2, x],
        [x, x, x, x, x, x, x, 8, 2],
    ]


@pytest.mark.parametrize("template", [TEMPLATE, UNMARKED, None], ids=["marks", "prefix", "none"])
@pytest.mark.parametrize("text", ["a b", "<image> a b", "a <image> b"])
def test_image_tokens_within_plain_text_are_not_learnt(llava, template, text):
    collator = Collator(llava(template))
    batch = collator([{"text": text, "image": Image.new("RGB", (4, 4))}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (ids == 3).sum() == 4, "the image is placed once"
    assert ids[labels != IGNORED].tolist() == [6, 7, 2]


@pytest.mark.parametrize("template", [TEMPLATE, UNMARKED], ids=["marks", "prefix"])
def test_an_image_mark_in_a_question_is_the_place_of_its_image(llava, template):
    row = {"prompt": "a <image> b", "completion": "c", "image": Image.new("RGB", (4, 4))}
    batch = Collator(llava(template))([row])
    assert batch["input_ids"].tolist() == [[1, 4, 6, 3, 3, 3, 3, 7, 5, 8, 2]]
    with pytest.raises(InputError, match="2 places for images, 1 images"):
        Collator(llava(template))([row | {"prompt": "<image> <image>"}])


# What counts for the loss, and how long a row may be.


def test_padding_is_masked_where_it_is_the_end_token_too():
    tokenizer = make_tokenizer(UNMARKED)
    tokenizer.pad_token = tokenizer.eos_token
    batch = Collator(tokenizer)([{"prompt": "a", "completion": c} for c in ("b", "b c d")])
    assert batch["input_ids"].tolist()[0] == [1, 4, 6, 5, 7, 2, 2, 2]
    assert batch["labels"].tolist()[0] == [IGNORED] * 4 + [7, 2] + [IGNORED] * 2


@pytest.mark.parametrize(
    ("longest", "context", "text"),
    [(8, None, "max_length=8; .*, or raise max_length$"), (8, 20, "max_length=8; .* max_length$"),
     (20, 8, r"the model takes 8; shorten or leave out .* \(on_long_row: .* skip\)$")],
)  # fmt: skip
def test_what_limits_a_row_is_named(longest, context, text):
    label = {"text": "a " * 9, "label": 0, ROW: 2}
    row = {"prompt": "a", "completion": "b c d e", ROW: 2}  # nine tokens
    collators = [
        (Collator(make_tokenizer(TEMPLATE), longest, context=context), row, "completion"),
        (LabelCollator(make_tokenizer(None), longest, {"a": 0}, context), label, "text"),
    ]
    for collator, long, column in collators:
        for read in (collator, collator.check):
            with pytest.raises(InputError, match=rf"^row 2, column '{column}': 9 tokens, {text}"):
                read([long])
            read([{**long, column: long[column][:-2]}])  # one less


def test_a_check_of_nothing_and_of_the_first_rows():
    collator = Collator(make_tokenizer(TEMPLATE), max_length=8)
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b c d e f"}
    with pytest.raises(InputError, match="no row to learn from"):
        collator.check([])
    assert collator.check([good, bad], limit=1) == pytest.approx(2 / 6)
    assert collator.check(iter([good] * 250 + [bad])) == pytest.approx(2 / 6)
    with pytest.raises(InputError, match="10 tokens, max_length=8"):
        collator.check(iter([good] * 249 + [bad]))
    assert collator.check(iter([good, bad]), limit=10) == pytest.approx(2 / 6)


def test_each_image_is_decoded_once_for_all_that_is_made_of_its_row(tmp_path, monkeypatch):
    rows = []
    for i, row in enumerate(vision_rows(3)):
        row["image"].save(tmp_path / f"{i}.png")
        rows.append({"messages": row["messages"], "image": str(tmp_path / f"{i}.png")})
    collator, opened, open_ = Collator(vision_processor()), [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or open_(file))
    collator(rows)
    assert len(opened) == 3
    collator.evaluation(rows)
    assert len(opened) == 6


def test_labels_that_nobody_asked_for_are_refused():
    row = {"text": "a b", "label": 1, ROW: 3}
    asked = Collator(make_tokenizer(TEMPLATE), refuse_labels=True)
    for read in (asked, asked.check):
        with pytest.raises(InputError, match=r"^row 3, column 'label': .*task=classification"):
            read([row])
        read([{"text": "a b", "label": None}, {"prompt": "a", "completion": "b", "label": 1}])
    Collator(make_tokenizer(TEMPLATE))([row])
