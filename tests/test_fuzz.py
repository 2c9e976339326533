"""Generated input: readers raise InputError or nothing, and what is valid comes back as it was.
FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py runs that many of each. Not here: chosen bad input
(test_bad_input.py)."""

import json
import os
import re
import tempfile
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from darts_lora import Genotype, InputError, SearchConfig, discretize
from darts_lora.base.options import load_config, parse, save_config
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.data.rows import row_images, row_messages
from small_models import vision_processor

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
fuzz_slowly = settings(fuzz, max_examples=max(EXAMPLES // 10, 10))  # 0.1 s an example
FILE = os.path.join(tempfile.mkdtemp(prefix="darts_lora-fuzz-"), "file")
CLASSES = (SearchConfig, ModelConfig, DataConfig, TrainingConfig)

pieces = st.text(min_size=1, max_size=6).filter(lambda t: t.isprintable() and "." not in t)
pieces |= st.sampled_from(["layers", "q_proj", "0", "(", "$", "^a|b", "\\", "*", "[x", "é", "a b"])
names = st.lists(pieces, min_size=1, max_size=4).map(".".join)
candidate_lists = st.sets(st.integers(0, 64), min_size=2, max_size=5).map(sorted)
# all kinds of values, and such as look right
wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | names
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e999, "", ".", "a", "\ud800", "1e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip


def is_refused(read, *args):
    """What was read, None where it was refused; whatever else is raised fails the test."""
    try:
        return read(*args)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


def write(content):
    with open(FILE, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return FILE


@st.composite
def genotypes(draw):
    """Valid ones, as a search writes them."""
    modules = draw(st.sets(names, min_size=1, max_size=5).map(sorted))
    candidates = draw(candidate_lists)
    weights = st.lists(st.integers(1, 9), min_size=len(candidates), max_size=len(candidates))
    shares = {n: [w / sum(ws) for w in ws] for n in modules for ws in [draw(weights)]}
    return Genotype(
        {n: draw(st.sampled_from(candidates)) for n in modules},
        scaling=draw(st.floats(0.01, 100)),
        shapes={n: (draw(st.integers(64, 99)), draw(st.integers(64, 99))) for n in modules},
        candidates=candidates,
        probabilities=shares,
        modules_to_save=draw(st.lists(names, max_size=2)),
        base_model=draw(st.none() | st.text(max_size=5).filter(str.isprintable)),
    )


@st.composite
def damaged(draw, content):
    """Bytes of `content` with a few of them cut out, doubled or replaced."""
    text = draw(content)
    for _ in range(draw(st.integers(1, 4))):
        start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 9))
        part = draw(st.binary(max_size=5) | st.just(text[start : start + 3 * length]))
        part = draw(
            st.sampled_from([part, b"NaN", b"[" * 2000, b"\xef\xbb\xbf", b"\\ud800", b"9" * 99])
        )
        text = text[:start] + part + text[start + length :]
    return text


genotype_texts = genotypes().map(lambda g: json.dumps({"version": 1, **asdict(g)}).encode())


@fuzz
@given(genotypes())
def test_a_genotype_comes_back(genotype):
    genotype.save(FILE)
    assert Genotype.load(FILE) == genotype
    bare = write(json.dumps(genotype.ranks))
    assert Genotype.load(bare).ranks == genotype.ranks


@fuzz_slowly
@given(genotypes(), st.floats(0, 70), st.integers(0, 10**6))
def test_a_budget_is_kept_or_refused(genotype, rank, parameters):
    for options in ({"budget_rank": rank}, {"budget_parameters": parameters}):
        found = is_refused(lambda options=options: discretize(genotype, **options))
        assert found is None or found.num_parameters <= found.found_by["budget_parameters"]


@fuzz
@given(genotypes(), st.lists(names, max_size=5))
def test_names_are_no_regular_expressions(genotype, others):
    """PEFT's own matching gives each module its rank, and no other module any."""
    config = is_refused(genotype.to_lora_config)
    if config is None:
        assert not any(genotype.ranks.values())
        return
    near = [f"{p}{n}{s}" for n in genotype.ranks for p, s in (("x.", ""), ("", ".x"), ("x", ""))]
    for name in {*genotype.ranks, *others, *near}:
        rank = genotype.ranks.get(name, 0)
        assert bool(re.fullmatch(config.target_modules, name)) == (rank > 0)
        key = get_pattern_key(config.rank_pattern.keys(), name)
        assert config.rank_pattern.get(key, config.r if rank else 0) == rank


@fuzz
@given(st.data())
def test_genotypes_with_a_wild_field(data):
    content = json.loads(data.draw(genotype_texts))
    field = data.draw(st.sampled_from([*content, "other"]))
    table = content.get(field)
    if isinstance(table, dict) and table and data.draw(st.booleans()):
        table[data.draw(st.sampled_from(list(table)) | st.text(max_size=3))] = data.draw(wild)
    else:
        content[field] = data.draw(wild)
    check_genotype(json.dumps(content))


@fuzz
@given(wild.map(json.dumps) | st.dictionaries(names, wild).map(json.dumps) | st.text())
def test_anything_for_a_genotype(text):
    check_genotype(text.encode(errors="surrogatepass"))


@fuzz
@given(damaged(genotype_texts))
def test_damaged_genotypes(text):
    check_genotype(text)


def check_genotype(text):
    found = is_refused(Genotype.load, write(text))
    if found is not None:
        found.save(FILE)
        assert Genotype.load(FILE) == found
        is_refused(discretize, found)
        is_refused(found.to_lora_config)


@st.composite
def configurations(draw):
    """Valid ones, one object of each class."""
    search = {
        "ranks": draw(candidate_lists), "scaling": draw(st.floats(1e-3, 1e3)),
        "target_modules": draw(st.just("all-linear") | st.lists(names, max_size=3)),
        "modules_to_save": draw(st.none() | st.lists(names, max_size=2)),
        "dropout": draw(st.floats(0, 0.99)),
        "search_fraction": draw(st.floats(1e-5, 1)), "arch_every": draw(st.integers(1, 99)),
        "budget_rank": draw(st.none() | st.floats(1e-5, 1e5)),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }  # fmt: skip
    model = {"model_name_or_path": draw(names), "gradient_checkpointing": draw(st.booleans())}
    files = st.none() | names | st.lists(names, min_size=1, max_size=2)
    files |= st.dictionaries(names, names, min_size=1, max_size=2)
    data = {
        "dataset": draw(names),
        "data_files": draw(files),
        "test_split": draw(st.none() | names),
    }
    training = {
        "learning_rate": draw(st.floats(1e-9, 1)),
        "max_steps": draw(st.integers(1, 2**63 - 1)),
    }
    options = (search, model, data, training)
    return [c(**given) for c, given in zip(CLASSES, options, strict=True)]


@fuzz_slowly
@given(configurations())
def test_a_configuration_comes_back(configs):
    path = save_config(os.path.dirname(FILE), *configs)
    assert parse(["--config", path], *CLASSES) == configs


OPTIONS = [name for c in CLASSES for name in c.__dataclass_fields__]
option_texts = st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=5), wild, max_size=4)


@fuzz
@given(st.data())
def test_options_with_wild_values(data):
    for config_class in CLASSES:
        fields = st.sampled_from(list(config_class.__dataclass_fields__))
        options = data.draw(st.dictionaries(fields, wild, max_size=3))
        is_refused(lambda c=config_class, options=options: c(**options))


configuration_texts = (
    option_texts.map(yaml.safe_dump) | option_texts.map(json.dumps) | st.text()
).map(lambda text: text.encode(errors="surrogatepass"))
configuration_texts |= damaged(
    configurations().map(lambda configs: yaml.safe_dump(plain(configs)).encode())
)


def plain(configs):
    return json.loads(json.dumps({k: v for c in configs for k, v in asdict(c).items()}))


@fuzz
@given(configuration_texts)
def test_anything_for_a_configuration_file(text):
    options = is_refused(load_config, write(text))
    assert options is None or all(isinstance(name, str) for name in options)


@fuzz_slowly
@given(configuration_texts)
def test_anything_for_a_configuration(text):
    is_refused(parse, ["--config", write(text)], SearchConfig, TrainingConfig)


COLUMNS = ["messages", "prompt", "completion", "texts", "text", "images", "image", "label"]
texts = st.text(max_size=9)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts})
answers = st.fixed_dictionaries({"role": st.just("assistant"), "content": texts})
turns = st.tuples(st.lists(messages, max_size=2), answers).map(lambda t: [*t[0], t[1]])
pairs = st.fixed_dictionaries({"user": texts, "assistant": texts})


@pytest.fixture(scope="module")
def collators():
    processor = vision_processor()
    return Collator(processor), Collator(processor.tokenizer)


@fuzz
@given(turns, st.lists(pairs, min_size=1, max_size=3), texts, texts)
def test_rows_mean_what_they_say(conversation, asked, prompt, completion):
    assert row_messages({"messages": conversation}) == conversation
    said = [m["content"] for m in row_messages({"texts": asked})]
    assert said == [text for pair in asked for text in (pair["user"], pair["assistant"])]
    user, assistant = row_messages({"prompt": prompt, "completion": completion})
    assert (user["content"], assistant["content"]) == (prompt, completion)
    assert row_messages({"text": prompt}) == [{"role": "assistant", "content": prompt}]


@fuzz
@given(st.data())
def test_rows_with_wild_columns(collators, data):
    parts = st.lists(st.dictionaries(st.sampled_from(["type", "text"]), wild | texts), max_size=3)
    turn = st.dictionaries(
        st.sampled_from(["role", "content"]), wild | parts | st.just("assistant")
    )
    values = wild | st.lists(turn | messages | answers | pairs, max_size=3) | turns
    row = data.draw(st.dictionaries(st.sampled_from(COLUMNS), values, max_size=4))
    is_refused(row_messages, row)
    is_refused(row_images, row)
    for collator in collators:
        is_refused(collator.check, [row])
