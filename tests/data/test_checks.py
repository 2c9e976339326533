"""Bad rows: told ten at a time, left out or cut where that is wished; tokens of another model.
Not here: what makes a row bad (test_rows.py)."""

import json
import re

import pytest
from PIL import Image
from torch import nn

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig
from darts_lora.data.collator import Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import checked_rows, load_splits
from darts_lora.data.places import ROW
from small_models import make_tokenizer, vision_processor

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[A]' if m.role == 'assistant' else '[U]' }}"
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
GOOD, LONG, BAD = ({"prompt": "a", "completion": c} for c in ("b", "b c d e f a b", None))


def train_rows(tmp_path, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(str(path), split_by="row", max_length=8, **options)
    return load_splits(config)["train"], config


def collator(config):
    truncate = config.on_long_row == "truncate"
    return Collator(make_tokenizer(TEMPLATE), config.max_length, truncate=truncate)


def test_the_first_ten_bad_rows_are_told_with_their_number(tmp_path):
    rows, config = train_rows(tmp_path, [GOOD, BAD, LONG] * 20)
    with pytest.raises(InputError) as error:
        checked_rows(rows, collator(config), config)
    head, *told, more = str(error.value).splitlines()
    bad = [row[ROW] for row in rows if row["completion"] != "b"]
    assert head == f"{len(bad)} of {len(rows)} rows cannot be used:"
    assert more == f"  and {len(bad) - 10} more"
    assert [int(re.search(r":(\d+), row", line)[1]) - 1 for line in told] == bad[:10]


SKIPS = {  # on_bad_row, on_long_row -> the rows that stay, or what is refused
    ("skip", None): "b", ("skip", "skip"): "b", ("skip", "error"): "tokens, max_length=8",
    ("error", "skip"): "empty", ("skip", "truncate"): "bL", ("error", None): "cannot be used",
    ("error", "truncate"): "empty",
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("options", SKIPS, ids=str)
def test_which_rows_are_left_out(tmp_path, options, streaming, capsys):
    on_bad, on_long = options
    rows, config = train_rows(
        tmp_path, [GOOD, BAD, LONG] * 10, on_bad_row=on_bad, on_long_row=on_long,
        streaming=streaming,
    )  # fmt: skip
    make = collator(config)
    wanted = SKIPS[options]
    if wanted not in ("b", "bL"):
        with pytest.raises(InputError, match=wanted if not streaming else "."):
            checked_rows(rows, make, config)
        return
    kept, share = checked_rows(rows, make, config)
    found = list(kept)
    expected = {"b": ["b"], "bL": ["b", LONG["completion"]]}[wanted]
    assert found == [row for row in rows if row["completion"] in expected] and 0 < share < 1
    assert make(found)["input_ids"].shape[1] <= 8
    assert "left out" in capsys.readouterr().err


def test_a_run_that_has_no_row_left_is_refused(tmp_path):
    rows, config = train_rows(tmp_path, [BAD, LONG] * 10, on_bad_row="skip")
    with pytest.raises(InputError, match=r"^\d+ of \d+ rows left out:"):
        checked_rows(rows, collator(config), config)


def test_as_many_rows_as_a_run_reads_are_checked():
    rows = [{"prompt": "a", "completion": "b"}] * 10_500 + [LONG]
    make = Collator(make_tokenizer(TEMPLATE), 8)
    assert checked_rows(rows, make, DataConfig())[0] is rows, "10,000 for a short run"
    with pytest.raises(InputError, match="tokens, max_length=8"):
        checked_rows(rows, make, DataConfig(), reads=20_000)


def test_the_rows_with_most_images_are_made_a_batch_of_at_the_start():
    """What an image takes in tokens, and whether it can be decoded, shows in a batch alone."""
    messages = [{"role": "user", "content": "which"}, {"role": "assistant", "content": "red"}]
    make = Collator(vision_processor())
    rows = [{"messages": messages, "image": Image.new("RGB", (16, n))} for n in (16, 48, 32)]
    rows[1]["image"].load = lambda: (_ for _ in ()).throw(OSError("cut off"))
    with pytest.raises(InputError, match=r"image does not open \(cut off\)"):
        make.check(rows)


def test_a_cut_row_keeps_the_start_of_its_answer():
    make = Collator(make_tokenizer(TEMPLATE), 8, truncate=True)
    batch = make([LONG, GOOD])
    assert batch["input_ids"].tolist() == [[1, 4, 6, 5, 7, 8, 9, 10], [1, 4, 6, 5, 7, 2, 0, 0]]
    assert batch["labels"][0].tolist() == [-100] * 4 + [7, 8, 9, 10]
    with pytest.raises(InputError, match="no token to learn from"):
        make([{"prompt": "a " * 9, "completion": "b"}])
    labels = LabelCollator(make_tokenizer(None), 4, {"a": 0}, truncate=True)
    assert labels([{"text": "a b c d e f", "label": 0}])["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_a_token_that_the_model_does_not_embed_is_named(kind):
    model = nn.Module()
    tokenizer = make_tokenizer(TEMPLATE)
    model.get_input_embeddings = lambda: nn.Embedding(11, 2)
    rows = [{"prompt": "a", "completion": word, "text": word, "label": 0} for word in "ef"]
    rows = [row | {ROW: i} for i, row in enumerate(rows)]
    if kind == "generation":
        make = Collator(tokenizer)
        rows = [{k: v for k, v in row.items() if k not in ("text", "label")} for row in rows]
    else:
        make = LabelCollator(tokenizer, 8, {"a": 0})
    text = "the token 'f' has number 11, the model embeds 11; "
    make.check(rows)
    with pytest.raises(InputError, match=rf"^row 1, column '(completion|text)': {text}"):
        make.limits.of_model(model)
    for _ in range(2):
        with pytest.raises(InputError, match=f"^row 1, .*{text}"):
            make(rows)
    make(rows[:1])
