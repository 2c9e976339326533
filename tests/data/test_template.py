"""Which tokens of a conversation are the answers, whatever tokenizers merge and templates write.
Not here: labels of whole batches (test_collator.py)."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from darts_lora.base.errors import InputError
from darts_lora.data.template import ChatTemplate
from small_models import make_tokenizer

SPECIAL = ["<|s|>", "<|e|>", "<|r|>", "<|c|>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
# as Qwen3's that thinks: the prompt opens what the template writes into the last answer alone
THINKS = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n<think>\n{% endif %}"
)
# as gpt-oss's: a channel before the answer, another end mark behind the last one
CHANNELS = (
    "{% for m in messages %}<|s|>{{ m.role }}{% if m.role == 'assistant' %}<|c|>final{% endif %}"
    "{{ m.content }}{{ '<|r|>' if loop.last and m.role == 'assistant' else '<|e|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|s|>assistant{% endif %}"
)
# the answer is joined to the text before it: SentencePiece and BPE merge over the border
JOINED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|e|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|e|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|e|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|e|>\n{% endif %}",
)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE that has several newlines, and a blank with the next word, as one token."""
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?[^\s]+|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=bytes_.alphabet()
    )
    words = ["\n\n", "\n\n\n", " yes", " no", "assistant", "user", "hello", "again"]
    made.train_from_iterator(words * 50, trainer)

    def make(template):
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<|e|>", eos_token="<|e|>", chat_template=template
        )

    return make


def slow(template):
    """A tokenizer that does not say where its tokens are."""
    tokenizer = ByT5Tokenizer(additional_special_tokens=SPECIAL, extra_ids=0)
    tokenizer.chat_template = template
    assert not tokenizer.is_fast
    return tokenizer


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def answers(tokenizer, conversation):
    """The texts of what is learnt, one for each run of tokens."""
    template = ChatTemplate(tokenizer)
    ids, mask = template.learnt({}, conversation)
    runs, before = [], False
    for token, own in zip(ids, mask, strict=True):
        if own:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = own
    return [tokenizer.decode(run) for run in runs]


CASES = {  # template, conversation, what is learnt
    "newline": (CHATML, turns("hello", "\n\nyes"), ["\n\n\nyes<|e|>\n"]),
    "newlines, two answers": (
        CHATML, turns("hello", "\n\nyes", "again", "no"), ["\n\n\nyes<|e|>\n", "no<|e|>\n"]
    ),
    "thinks": (THINKS, turns("hello", "yes"), ["\n\n</think>\n\nyes<|e|>\n"]),
    "thinks last": (
        THINKS, turns("hello", "yes", "again", "no"),
        ["yes<|e|>\n", "\n\n</think>\n\nno<|e|>\n"],
    ),
    "channel": (CHANNELS, turns("hello", "yes"), ["<|c|>finalyes<|r|>"]),
    "channels": (
        CHANNELS, turns("hello", "yes", "again", "no"),
        ["<|c|>finalyes<|e|>", "<|c|>finalno<|r|>"],
    ),
    "joined": (JOINED, turns("hello", "yes"), [" yes<|e|>"]),
    "marks": (MARKED, turns("hello", "\n\nyes"), ["\n\n\nyes<|e|>\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_answers_are_found_by_their_characters(bpe, case):
    template, conversation, wanted = CASES[case]
    assert answers(bpe(template), conversation) == wanted


@pytest.mark.parametrize("case", CASES)
def test_answers_of_a_tokenizer_without_offsets(case):
    template, conversation, wanted = CASES[case]
    found = answers(slow(template), conversation)
    # a byte is a token: none is of both prompt and answer
    assert len(found) == len(wanted)
    assert all(want.endswith(one) and one.strip() for one, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_last_answer_continues_its_prompt(bpe, case):
    template, conversation, wanted = CASES[case]
    tokenizer = bpe(template)
    ids, mask = ChatTemplate(tokenizer).last_answer({}, conversation)
    answer = tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own])
    assert answer == wanted[-1]


def test_a_prompt_of_another_role_is_refused(bpe):
    template = CHATML.replace("<|s|>assistant\n", "<|s|>model\n")
    with pytest.raises(InputError, match="does not continue its own prompt"):
        answers(bpe(template), turns("hello", "yes"))


# Which template is taken.

TEXT_ALONE = "{% for m in messages %}{{ m.role }} {{ m.content | trim }} {% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEXT_ALONE, PARTS], ids=["text", "parts"])
def test_a_processor_without_a_template_has_its_tokenizers(template):
    size = {"height": 4, "width": 4}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = LlavaProcessor(images, make_tokenizer(template), patch_size=2)
    assert processor.chat_template is None
    parts = [{"type": "image"}, {"type": "text", "text": "a b"}]
    chat = [{"role": "user", "content": parts}]
    text = ChatTemplate(processor).text({}, chat)
    assert text.replace("<image>", "<image> ").split() == ["user", "<image>", "a", "b"]


def test_of_several_templates_the_default_is_taken_and_without_one_they_are_named():
    names = {"tool_use": PARTS, "rag": PARTS}
    with pytest.raises(InputError, match=r"chat templates \(rag, tool_use\) and none called def"):
        ChatTemplate(make_tokenizer(names))
    assert ChatTemplate(make_tokenizer({**names, "default": TEXT_ALONE})).source == TEXT_ALONE
