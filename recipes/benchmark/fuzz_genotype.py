"""Fuzzes the reader of genotypes, guided by the code that it reaches. pip install atheris first.
Not here: generated genotypes, configurations and rows (tests/test_fuzz.py, FUZZ_EXAMPLES).

python recipes/benchmark/fuzz_genotype.py -max_total_time=300 runs/corpus    # libFuzzer's options
"""

import json
import os
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["json", "darts_lora.base.files", "darts_lora.genotype"]):
    from darts_lora import Genotype, InputError

FOLDER = tempfile.TemporaryDirectory()
GENOTYPE = os.path.join(FOLDER.name, "genotype.json")


def read(content: bytes) -> None:
    """Only InputError may come out; what is read comes back as it was."""
    with open(GENOTYPE, "wb") as file:
        file.write(content)
    try:
        found = Genotype.load(GENOTYPE)
    except InputError:
        return
    found.save(GENOTYPE)
    assert Genotype.load(GENOTYPE) == found


def seed(corpus: str) -> None:
    """A genotype of a search, and bare ranks: where the fuzzer starts."""
    os.makedirs(corpus, exist_ok=True)
    genotype = Genotype(
        {"a": 2, "b.c": 0},
        shapes={"a": (8, 4), "b.c": (8, 8)},
        candidates=[0, 2],
        probabilities={"a": [0.25, 0.75], "b.c": [0.5, 0.5]},
        modules_to_save=["head"],
    )
    genotype.save(os.path.join(corpus, "searched.json"))
    with open(os.path.join(corpus, "bare.json"), "w", encoding="utf-8") as file:
        json.dump({"base_model.model.a": 2}, file)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seed(argument)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
