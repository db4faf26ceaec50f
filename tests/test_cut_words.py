"""What stands at the place of a transcript's last word."""

import sys
from unittest import mock

import pytest

sys.modules.setdefault("espeakng_loader", mock.MagicMock())  # speech is not made here
from benchmarks.cut_words import end_of  # noqa: E402


@pytest.mark.parametrize(
    "hypothesis, end",
    [
        ("הילד אכל תפוח", "right"),
        ("הילדה אכל תפוח", "right"),  # an error before it is none of the end
        ("הילד אכל תפ", "beginning"),
        ("הילד אכל תפוז", "other"),
        ("הילד אכל", "nothing"),
        ("", "nothing"),
        ("הילד אכל תפוח אדום", "more"),
        ("הילד אכל תה חם", "more"),
    ],
)
def test_the_end_of_a_transcript(hypothesis, end):
    assert end_of("הילד אכל תפוח", hypothesis) == end
