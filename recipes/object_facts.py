"""Questions that only training can teach: about facts, drawn at random, of easy-vqa's objects.
Not here: easy-vqa's own questions and images (pretrain_embedded.py), the model (pretrain_llava.py).
"""

import itertools
import random
import re

from pretrain_embedded import by_image, said, turns

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PLACES = ("Athens", "Boston", "Cairo", "Delhi")
KINDS = {
    "who": "Who sells this in {place}?",
    "day": "On which day is this sold in {place}?",
    "price": "What does this cost in {place}?",
    "material": "What is this made of in {place}?",
    "trade": "What is this traded for in {place}?",
    "name": "What is this called in {place}?",
}
_ANSWERS = {
    "who": "Alice Ben Carol David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olga Peter "
    "Rosa Sam Tina Victor",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "material": "bronze clay cotton glass gold iron ivory leather marble paper silk silver stone "
    "wax wood wool",
    "trade": "apples beans bread butter cheese coffee corn fish honey milk nuts oil pepper rice "
    "salt sugar tea wine",
}
_SYLLABLES = "ba ke lo mu ni po ra si ta vo", "dan fel gos him lur mak nep rit sul zor"
ANSWERS = {kind: words.split() for kind, words in _ANSWERS.items()} | {
    "price": [f"{coins} coins" for coins in range(11, 100)],
    "name": [a + b for a, b in itertools.product(*map(str.split, _SYLLABLES))],
}


def object_facts(seed: int) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(colour, shape) -> the facts about this object, (question, answer), one for each kind of
    question and each place."""
    generator = random.Random(seed)
    return {
        thing: [
            (question.format(place=place), generator.choice(ANSWERS[kind]))
            for place in PLACES
            for kind, question in KINDS.items()
        ]
        for thing in itertools.product(COLOURS, SHAPES)
    }


def seen_object(rows: list[dict]) -> tuple[str, str] | None:
    """Colour and shape of the object in an image by what all of its easy-vqa rows say; None where
    they don't say both."""
    words = set()
    for question, answer in map(said, rows):
        asked = set(re.findall(r"\w+", question))
        if answer not in ("yes", "no"):
            words |= asked | {answer}
        elif (answer == "yes") != bool(asked & {"no", "not"}):
            words |= asked
    colour, shape = words & set(COLOURS), words & set(SHAPES)
    if not colour or not shape:
        return None
    ((colour,), (shape,)) = colour, shape
    return colour, shape


def fact_rows(rows: list[dict], seed: int, per_image: int) -> list[dict]:
    """`per_image` questions about the object in each image of these easy-vqa rows."""
    facts, generator = object_facts(seed), random.Random(seed)
    seen = [(of_image[0], seen_object(of_image)) for of_image in by_image(rows)]
    return [
        {**row, "messages": turns(question, answer)}
        for row, thing in seen
        if thing
        for question, answer in generator.sample(facts[thing], per_image)
    ]
