"""recipes/object_facts.py: facts that only training can teach, asked about the right objects.
Not here: how they are written and learnt (test_pretrain_llava.py)."""

from collections import Counter, defaultdict

import pytest


@pytest.fixture(scope="module")
def facts(recipe_imports):
    import object_facts

    return object_facts


@pytest.fixture(scope="module")
def rows(facts):
    from pretrain_embedded import read_rows

    return read_rows("test")


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
def test_what_is_seen_follows_from_the_answers(facts, questions, thing):
    assert facts.seen_object([row(*pair) for pair in questions]) == thing


def test_what_is_seen_is_what_the_image_shows(facts, rows):
    """By its pixels: every colour of easy-vqa is one value, the background is another."""
    colours = defaultdict(set)
    for of_image in facts.by_image(rows):
        if thing := facts.seen_object(of_image):
            counts = of_image[0]["image"].getcolors(4096)
            _, inside = sorted(counts, reverse=True)[:2]
            colours[thing[0]].add(inside[1])
    assert set(colours) == set(facts.COLOURS)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(facts.COLOURS)


def test_every_object_has_an_answer_of_its_kind_for_each_question(facts):
    known = facts.object_facts(seed=0)
    assert len(known) == 24
    for of_object in known.values():
        assert len(of_object) == len(facts.PLACES) * len(facts.KINDS) == len(dict(of_object))
        for question, answer in of_object:
            (kind,) = [
                kind for kind, form in facts.KINDS.items()
                if any(form.format(place=place) == question for place in facts.PLACES)
            ]  # fmt: skip
            assert answer in facts.ANSWERS[kind]


def test_facts_are_drawn_at_random_by_the_seed(facts):
    known, other = (facts.object_facts(seed) for seed in (0, 1))
    assert known == facts.object_facts(seed=0) != other
    days = Counter(answer for of_object in known.values() for answer in dict(of_object).values())
    assert set(facts.ANSWERS["day"]) <= set(days)


def test_rows_tell_the_same_facts_of_training_and_test_images(facts, rows):
    from pretrain_embedded import read_rows

    known = facts.object_facts(seed=0)
    for split in (rows, read_rows("train")):
        made = facts.fact_rows(split, seed=0, per_image=3)
        rows_of = {of_image[0]["image_id"]: of_image for of_image in facts.by_image(split)}
        things = {image: facts.seen_object(of_image) for image, of_image in rows_of.items()}
        asked = Counter(r["image_id"] for r in made)
        assert asked == {image: 3 for image, thing in things.items() if thing}
        assert all(facts.said(r) in known[things[r["image_id"]]] for r in made)
        assert len({(r["image_id"], facts.said(r)) for r in made}) == len(made)
        assert all(r["image"] is rows_of[r["image_id"]][0]["image"] for r in made[:50])
