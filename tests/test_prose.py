"""How the documents and the options' descriptions read: short sentences, short pages.
Not here: whether what they show is right (test_readme.py, recipes/test_recipes_readme.py)."""

import inspect
import re
from pathlib import Path

import pytest

from darts_lora import config

ROOT = Path(__file__).parents[1]
WORDS = 25  # of a sentence
SHARE = 0.95  # of the sentences, that keep to it
DOCUMENTS = [
    "README.md",
    "recipes/README.md",
    "recipes/benchmark/README.md",
    *(
        f"recipes/benchmark/notes/{path.name}"
        for path in sorted((ROOT / "recipes/benchmark/notes").glob("*.md"))
    ),
    *(f"recipes/docs/{path.name}" for path in sorted((ROOT / "recipes/docs").glob("*.md"))),
]


def sentences(text):
    """The sentences of Markdown without its code: of paragraphs, list items and cells alike."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|[-| ]+\|$", "", text, flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n|\n *(?:[-*]|\d+\.) |^#+ .*$|\|", text, flags=re.MULTILINE)
    found = [s for part in parts for s in re.split(r"(?<=[.?!])[*`)]* +", " ".join(part.split()))]
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def long_ones(text):
    found = sentences(text)
    return [s for s in found if len(s.split()) > WORDS], (1 - SHARE) * len(found)


@pytest.fixture(params=[ROOT / name for name in DOCUMENTS], ids=DOCUMENTS)
def document(request):
    return request.param.read_text(encoding="utf-8")


def test_sentences_are_short(document):
    found, most = long_ones(document)
    assert len(found) <= most, "\n".join(found)


def test_so_are_those_of_the_options():
    text = inspect.getsource(config)
    found, most = long_ones("\n\n".join(re.findall(r'"""(.*?)"""', text, flags=re.DOTALL)))
    assert len(found) <= most, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "most"), [("README.md", 150), ("recipes/benchmark/README.md", 200)]
)
def test_pages_are_short(name, most):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= most
    assert [line for line in lines if len(line) > 120] == []


def test_a_long_sentence_is_counted_wherever_it_stands():
    long = "word " * 26
    for text in (
        f"{long}.",
        f"Short. {long}. Short.",
        f"- {long}",
        f"| a | {long} |",
        f"1. {long}",
    ):
        assert long_ones(f"# Title\n\n{text}\n\nEnd.")[0], text
    short = long[: 5 * WORDS].strip()
    assert not long_ones(f"```sh\n{long}\n```\n\n{short}. {short}.")[0]
