"""The ground layer: draws that depend on names only, and messages that help."""

import subprocess
import sys

import numpy as np
import pytest

from fedmllm.errors import UserError, unknown
from fedmllm.rng import stream, stream_seed, uniform


def test_a_stream_is_pinned():
    """The definition, by hand: the first 8 bytes of sha256("7<US>mask<US>a"), halved."""
    import hashlib

    digest = hashlib.sha256(b"7\x1fmask\x1fa").hexdigest()
    assert stream_seed(7, "mask", "a") == int(digest[:16], 16) // 2
    assert uniform(7, "mask", "a") == int(digest[:16], 16) // 2**11 / 2**53


def test_streams_depend_on_every_part_and_on_nothing_else():
    np.random.seed(0)
    first = stream(1, "mask", "a", 2).random(4)
    np.random.seed(1)
    np.testing.assert_array_equal(first, stream(1, "mask", "a", 2).random(4))
    for other in [
        (2, "mask", "a", 2),
        (1, "cohort", "a", 2),
        (1, "mask", "b", 2),
        (1, "mask", "a"),
    ]:
        assert not np.array_equal(first, stream(*other).random(4))


def test_neighbouring_ids_do_not_run_together():
    assert stream_seed(1, "mask", "ab", "c") != stream_seed(1, "mask", "a", "bc")
    assert stream_seed(1, "1") != stream_seed(11, "")


def test_draws_do_not_change_between_processes():
    """Unlike Python's hash(), which is salted per process."""
    code = "from fedmllm.rng import uniform; print(repr(uniform(3, 'mask', 'x')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) == uniform(3, "mask", "x")


def test_uniform_is_uniform():
    draws = np.array([uniform(0, "test", i) for i in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("given", "allowed", "message"),
    [
        ("mising", ["missing", "aligned"], "aligned or missing (did you mean 'missing'?)"),
        ("zzz", ["a", "b", "c"], "choose a, b or c"),
        ("x", ["only"], "choose only"),
        ("x", [], "choose (none)"),
        (7, ["a"], "unknown scenario '7': choose a"),
    ],
)
def test_unknown_names_say_what_is_allowed(given, allowed, message):
    assert unknown("scenario", given, allowed).endswith(message)


def test_user_errors_are_no_value_errors():
    """So that `except ValueError` around library calls does not swallow them."""
    assert not issubclass(UserError, ValueError)
