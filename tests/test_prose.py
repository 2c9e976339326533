"""Documents that one can read: short sentences, short lines, pages of a bounded length.
Not here: whether what they say is right (test_readme.py, recipes/)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": 150, "recipes/README.md": None, "recipes/benchmark/README.md": 200}
PAGES |= {f"recipes/benchmark/notes/{p.name}": None
          for p in sorted((ROOT / "recipes/benchmark/notes").glob("*.md"))}  # fmt: skip
LONGEST, WORDS, SHARE = 120, 25, 0.95


def sentences(text: str) -> list[str]:
    """Those of the prose: neither code nor tables, headings or pictures; a list's item ends one."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^( {4}\S.*|\s*\|.*|#.*|!\[.*)$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        found += re.split(r"(?<=[.!?:])[)*_]*\s+(?=[\"'`*_(\[A-Z0-9])", " ".join(paragraph.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def too_long(text: str) -> list[str]:
    """Sentences of more than WORDS words; a name in backquotes is one."""
    whole = (re.sub(r"`[^`]*`", "name", sentence) for sentence in sentences(text))
    return [s for s in whole if len(re.findall(r"\w[\w'.,%-]*", s)) > WORDS]


def test_sentences_are_counted():
    text = "# A heading\n\nOne two. Three `a b c` four:\n- five\n- six\n\n```sh\na. B. C.\n```\n"
    assert sentences(text) == ["One two.", "Three `a b c` four:", "five", "six"]
    assert too_long("word " * WORDS + "last.") and not too_long("word " * (WORDS - 1) + "last.")


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_so_are_their_sentences(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert PAGES[page] is None or len(lines) <= PAGES[page]
    wide = [n for n, line in enumerate(lines, 1) if len(line) > LONGEST]
    assert not wide, f"lines of more than {LONGEST} characters: {wide}"
    long = too_long(text)
    assert len(long) <= (1 - SHARE) * len(sentences(text)), long
