"""What the README says of tests: that they are there."""

import re
from pathlib import Path

import pytest

LINKS = re.findall(r"\[(test_\w+)\]\((tests/\S+\.py)\)", Path("README.md").read_text(encoding="utf-8"))


def test_the_feature_table_was_found():
    assert len(LINKS) >= 20


@pytest.mark.parametrize(("name", "file"), LINKS, ids=[name for name, _ in LINKS])
def test_a_named_test_is_where_the_table_says(name, file):
    assert f"\ndef {name}(" in Path(file).read_text(encoding="utf-8")
