"""Which radii are looked at: the rule, and what it says where an attack wins or fails everywhere."""

import pytest

from latlib.report.telling_radii import telling_radii


def test_the_smallest_that_succeeds_beside_the_largest_that_fails():
    found = telling_radii({0.8: 1.0, 0.1: 0.98, 0.05: 0.62, 0.025: 0.03, 0.0125: 0.0})
    assert (found.large, found.small) == (0.1, 0.025)
    assert "**0.1**, where the attack wins 98 %: the smallest at which 90 % or more" in found.why
    assert "**0.025**, where the attack wins 3 %: the largest at which 10 % or fewer" in found.why


@pytest.mark.parametrize(
    ("asr", "eps", "radii", "said"),
    [
        (
            {0.1: 0.0, 0.2: 0.0, 0.4: 0.3},
            None,
            (0.4, 0.2),
            "wins 30 %: the largest; 90 % are won at",
        ),
        ({0.1: 0.95, 0.2: 1.0}, None, (0.1, 0.1), "No smaller radius was measured."),
        ({0.1: 0.5, 0.2: 0.8, 0.4: 1.0}, None, (0.4, 0.1), "more than 10 % are won at all"),
        ({0.1: 0.0, 0.2: 1.0, 0.4: 1.0}, 0.4, (0.4, 0.1), "wins 100 %: it was asked for"),
        ({0.1: 0.0, 0.2: 0.9}, None, (0.2, 0.1), "wins 0 %: the largest at which 10 % or fewer"),
    ],
)
def test_where_there_is_no_such_radius_it_says_so(asr, eps, radii, said):
    found = telling_radii(asr, eps)
    assert (found.large, found.small) == radii and said in found.why


def test_a_radius_that_was_not_measured_cannot_be_asked_for():
    with pytest.raises(ValueError, match=r"eps = 0.3 was not measured: choose one of \[0.1, 0.2\]"):
        telling_radii({0.2: 0.0, 0.1: 0.0}, 0.3)
