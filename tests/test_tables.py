"""Tables of a genotype: each layer stands where it belongs, sums are right.
Not here: the views in TensorBoard (test_tensorboard.py)."""

import io
import re

import torch
from rich.console import Console

from darts_lora import Genotype
from darts_lora.tables import by_part, rank_tables, show, show_batch

RANKS = {
    "vision.layers.0.mlp.fc1": 16,
    "vision.layers.1.mlp.fc1": 0,
    "vision.layers.1.mlp.fc2": 4,
    "text.layers.3.q_proj": 2,
    "text.layers.10.q_proj": 8,
    "projector": 1,
}
SHAPES = {name: (100, 60) for name in RANKS}


def cells(table):
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def printed(genotype, width=100):
    console = Console(file=io.StringIO(), width=width)
    show(genotype, console)
    return console.file.getvalue()


def test_names_are_taken_apart_at_their_first_number():
    assert by_part(["a.layers.2.x", "a.layers.10.x", "a.layers.2.sub.0.y", "b"]) == {
        "a.layers": {
            "x": {2: "a.layers.2.x", 10: "a.layers.10.x"},
            "sub.0.y": {2: "a.layers.2.sub.0.y"},
        },
        "b": {"-": {0: "b"}},
    }


def test_a_terminal_without_blocks_shows_plain_characters():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=100)
    show(Genotype(RANKS, shapes=SHAPES), console)
    console.file.flush()
    assert b"16  0" in console.file.buffer.getvalue() and b"8." in console.file.buffer.getvalue()


def test_the_text_of_a_row_sends_no_commands_to_the_terminal():
    """Colours, a cleared screen, a title, lines that a return hides; line ends stay."""

    class Tokenizer:
        def decode(self, tokens):
            return "a\x1b[2J\x1b]0;t\x07b\rc\nd\u202e" if tokens else ""

    console = Console(file=io.StringIO(), width=100)
    ones = torch.ones(1, 2, dtype=torch.long)
    show_batch(
        {name: ones for name in ("input_ids", "labels", "attention_mask")}, Tokenizer(), console
    )
    shown = console.file.getvalue()
    assert shown.count("a\\x1b[2J\\x1b]0;t\\x07b\\rc\nd\\u202e") == 2
    assert not set("\x1b\x07\r\u202e") & set(shown)


def test_each_layer_has_its_place_in_the_table_of_its_part():
    tables = {table.title: table for table in rank_tables(Genotype(RANKS, shapes=SHAPES))}
    assert list(tables) == ["vision.layers", "text.layers", "projector"]
    assert cells(tables["vision.layers"]) == [
        ["mlp.fc1", "16  0", "█·", "8.0", "2,560"],
        ["mlp.fc2", " .  4", " ▂", "4.0", "640"],
    ]
    assert tables["text.layers"].columns[1].header == " 3 10"
    assert cells(tables["text.layers"]) == [["q_proj", " 2  8", "▁▄", "5.0", "1,600"]]
    assert cells(tables["projector"]) == [["-", " 1", "▁", "1.0", "160"]]


def test_the_total_counts_adapted_layers_and_parameters():
    assert "5 of 6 layers adapted, 4,960 trainable parameters" in printed(
        Genotype(RANKS, shapes=SHAPES)
    )


def test_ranks_alone_have_no_parameters():
    text = printed(Genotype(RANKS))
    assert "parameters" not in text and "mlp.fc2" in text


def test_a_deep_model_shows_bars_alone_and_a_narrow_screen_loses_none():
    ranks = {f"text.layers.{i}.q_proj": 8 * (i % 3) for i in range(60)}
    text = printed(Genotype(ranks), width=50)
    assert [text.count(bar) for bar in "·▄█"] == [20, 20, 20] and "0..59" in text


def test_a_bar_is_as_high_as_the_rank():
    ranks = {f"text.layers.{i}.q_proj": rank for i, rank in enumerate((0, 1, 8, 32, 64))}
    (table,) = rank_tables(Genotype(ranks))
    assert cells(table)[0][2] == "·▁▁▄█"


def test_a_notebook_shows_the_tables():
    shown = Genotype(RANKS, shapes=SHAPES)._repr_html_()
    text = re.sub(r"<[^>]+>", "", shown)
    assert shown.startswith("<pre>") and "vision.layers" in text
    assert "5 of 6 layers adapted, 4,960 trainable parameters" in text
