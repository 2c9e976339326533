"""Tables of a genotype: each layer stands where it belongs, sums are right.
Not here: the views in TensorBoard (test_tensorboard.py)."""

import io

import pytest
import torch
from families import make_moe
from rich.console import Console

from darts_lora import Genotype, SearchConfig, Supernet
from darts_lora.views.console import by_part, rank_tables, show, show_batch, show_supernet

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


def test_a_part_without_an_adapter_has_one_row():
    ranks = RANKS | {name: 0 for name in RANKS if name.startswith("vision")}
    tables = {table.title: table for table in rank_tables(Genotype(ranks, shapes=SHAPES))}
    assert cells(tables["vision.layers"]) == [["all 3 layers", "0", "0", "0", "0"]]
    assert len(cells(tables["text.layers"])) == 1


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


def supernet_text(model, **options):
    console = Console(file=io.StringIO(), width=150)
    show_supernet(Supernet(model, SearchConfig(ranks=(0, 1), **options)), console)
    return console.file.getvalue()


def test_the_table_says_how_many_parameters_no_adapter_reaches():
    model = make_moe("mixtral")
    whole = sum(p.numel() for p in model.parameters())
    experts = 2 * 4 * (16 * 48 + 24 * 16)
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n)
    told = supernet_text(model)
    assert f"no adapter reaches {whole - linear:,} of {whole:,} parameters" in told
    assert f"model.layers.*.mlp.experts.gate_up_proj ({2 * 4 * 16 * 48:,})" in told
    assert f"experts that are not searched: 4 tensors, {experts:,} parameters" in told
    told = supernet_text(make_moe("mixtral"), target_parameters="all-experts")
    assert f"no adapter reaches {whole - linear - experts:,} of {whole:,} parameters" in told
    assert "4 x 16 -> 48" in told and "not searched" not in told


def test_the_table_says_what_is_left_out():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = torch.nn.MultiheadAttention(16, 2), torch.nn.Linear(16, 16)

    with pytest.warns(UserWarning, match="left out"):
        told = supernet_text(Attention())
    assert "left out: attention.out_proj: its weight is read past its forward" in told
