"""Lines of libraries that are left out, and those beside them that are not."""

import logging
import subprocess
import sys
import warnings

import pytest

from darts_lora.base.quiet import LINES, WARNINGS, hush


@pytest.mark.parametrize("name", LINES)
def test_one_line_is_left_out_and_others_are_told(name, caplog):
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, name):
        logger.warning(LINES[name] + " by this release", *["it"] * LINES[name].count("%s"))
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("start", WARNINGS)
def test_one_warning_is_left_out_and_others_are_told(start):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hush()
        warnings.warn(f"{start} and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["something else is deprecated"]


def test_the_package_is_imported_without_a_word():
    code = "import darts_lora, darts_lora.cli.search"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
