"""Which values an option may have, by its annotation and by bounds. Not here: whose options
(test_config.py)."""

from dataclasses import dataclass
from typing import Literal

import pytest

from darts_lora import InputError
from darts_lora.base.bounds import check_bounds


@dataclass
class Options:
    kind: Literal["a", "b"] = "a"
    width: Literal[4, 8] | None = None
    name: str | None = None
    shape: str = "tiny"
    count: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_bounds(self, above={"count": 0}, choices={"shape": ("tiny", "large")})


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"kind": "c"}, "kind='c': must be one of a, b"),
        ({"kind": None}, "kind=None: must be one of a, b"),
        ({"width": 5}, "width=5: must be one of 4, 8, None"),
        ({"shape": "huge"}, "shape='huge': must be one of tiny, large"),
        ({"count": 0}, "count=0: must be an integer > 0"),
        ({"count": True}, "count=True: must be an integer > 0"),
        ({"seed": 2**31}, f"seed={2**31}: must be an integer <= {2**31 - 1}"),
    ],
)
def test_what_is_refused(changed, text):
    with pytest.raises(InputError) as caught:
        Options(**changed)
    assert str(caught.value) == text


def test_what_passes():
    Options()
    Options(kind="b", width=8, name="anything", shape="large", count=1, seed=2**31 - 1)
