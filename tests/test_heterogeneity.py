"""Profiles and what is made of them: by hand, against scipy, and the noise against its law."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare, dlaplace

from fedmllm import rng
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.heterogeneity import (
    Profile,
    factors,
    is_complete,
    jensen_shannon,
    noised,
    profile_of,
    standings,
    traffic,
)

PICTURE = MemoryImage("x", lambda: Image.new("RGB", (2, 2)))


def shares(both: int, image: int, text: int, neither: int, labels=()) -> Profile:
    return Profile((both, image, text, neither), labels)


def test_a_profile_is_counted_from_a_partys_own_samples() -> None:
    samples = [
        Sample("a", "x", text="t", image=PICTURE, label=1),
        Sample("b", "x", text="t", label=1),
        Sample("c", "x", image=PICTURE, label=0),
        Sample("d", "x", label=2),
        Sample("e", "x", text="t", image=PICTURE, label=1),
    ]
    found = profile_of(samples, 3)
    assert found == shares(2, 1, 1, 1, (1, 3, 1))
    assert found.nbytes == 4 * (4 + 3)
    assert [is_complete(sample) for sample in samples] == [True, False, False, False, True]


def test_a_question_is_text_that_no_scenario_takes() -> None:
    whole = Sample("a", "yes", question="Is it?", image=PICTURE)
    assert profile_of([whole, whole.masked(keep_image=False, keep_text=False)], 0) == shares(
        1, 0, 1, 0
    )
    assert is_complete(whole)


def test_standings_by_hand() -> None:
    """Two parties, images only and texts only: the mean is (0, 1/2, 1/2, 0), the middle of each
    with it (3/4, 1/4), so JSD = 2 - 3/4 log2 3 - (0 + 1) / 2 = 0.311278; nothing is whole."""
    found = standings({"a": shares(0, 8, 0, 0, (4, 4)), "b": shares(0, 0, 2, 0, (2, 0))})
    assert found["a"].incomplete == found["b"].incomplete == 1.0
    assert found["a"].divergence == pytest.approx(1.5 - 0.75 * math.log2(3))
    assert found["b"].divergence == pytest.approx(found["a"].divergence)  # parties count alike
    assert found["a"].index == 1.0
    # labels (1/2, 1/2) and (1, 0), mean (3/4, 1/4): middle of b (7/8, 1/8)
    entropy = lambda p: -p * math.log2(p) - (1 - p) * math.log2(1 - p)  # noqa: E731
    assert found["b"].label_divergence == pytest.approx(entropy(7 / 8) - entropy(3 / 4) / 2)


def test_the_index_by_hand() -> None:
    """One party of whole samples, one of which half are texts: mean (3/4, 0, 1/4, 0)."""
    found = standings({"whole": shares(6, 0, 0, 0), "half": shares(2, 0, 2, 0)})
    for name, incomplete in (("whole", 0.0), ("half", 0.5)):
        each = found[name]
        assert each.incomplete == incomplete
        assert 0 < each.divergence < 0.2
        assert each.index == pytest.approx(1 - (1 - incomplete) * (1 - each.divergence))


def test_it_grows_in_the_order_of_the_papers_weights() -> None:
    """aligned, 30 % and 50 % missing, one modality each."""
    means = []
    for parties in (
        [shares(100, 0, 0, 0)] * 4,
        [shares(49, 21, 21, 9)] * 4,
        [shares(25, 25, 25, 25)] * 4,
        [shares(0, 100, 0, 0)] * 2 + [shares(0, 0, 100, 0)] * 2,
    ):
        found = standings({str(k): profile for k, profile in enumerate(parties)})
        means.append(sum(each.index for each in found.values()) / 4)
    assert means == pytest.approx([0.0, 0.51, 0.75, 1.0])


def test_divergence_against_scipy() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        p, q = draw.dirichlet([0.3] * 5, 2)
        expected = jensenshannon(p, q, base=2) ** 2
        assert jensen_shannon(p, q) == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1.0
    assert jensen_shannon(p, p) == 0.0
    assert jensen_shannon(np.zeros(0), np.zeros(0)) == 0.0


def test_factors_by_hand() -> None:
    found = standings({"a": shares(0, 9, 0, 0), "b": shares(0, 0, 5, 0), "c": shares(0, 0, 5, 0)})
    assert found["a"].divergence > found["b"].divergence
    raw = {client: math.exp(-2 * each.divergence) for client, each in found.items()}
    expected = {client: 3 * value / sum(raw.values()) for client, value in raw.items()}
    assert factors(found, 2.0) == pytest.approx(expected)
    assert factors(found, 2.0)["a"] < 1 < factors(found, -2.0)["a"]
    assert set(factors(found, 0.0).values()) == {1.0}


def test_noise_follows_its_law() -> None:
    """P(z) ~ exp(-epsilon |z| / 2): scipy's discrete Laplace with a = epsilon / 2."""
    profile = shares(1000, 1000, 1000, 1000, (1000,) * 46)
    epsilon = 1.6
    drawn = [
        count - 1000
        for client in range(200)
        for given in [noised(profile, epsilon, client=str(client), seed=3)]
        for count in (*given.modalities, *given.labels)
    ]
    edge = 6
    tally = Counter(max(-edge, min(edge, z)) for z in drawn)
    law = dlaplace(epsilon / 2)
    expected = [law.pmf(z) for z in range(-edge, edge + 1)]
    expected[0], expected[-1] = law.cdf(-edge), law.sf(edge - 1)
    observed = [tally[z] for z in range(-edge, edge + 1)]
    assert chisquare(observed, np.array(expected) * len(drawn)).pvalue > 0.01
    assert np.var(drawn) == pytest.approx(law.var(), rel=0.05)


def test_noise_is_a_function_of_seed_and_client() -> None:
    profile = shares(50, 3, 0, 7, (30, 30))
    first = noised(profile, 0.5, client="a", seed=0)
    assert first == noised(profile, 0.5, client="a", seed=0)
    others = [
        noised(profile, 0.5, client="b", seed=0),
        noised(profile, 0.5, client="a", seed=1),
    ]
    assert first not in others
    assert min((*first.modalities, *first.labels)) >= 0
    assert noised(profile, None, client="a", seed=0) is profile


def test_noise_of_a_deployment_follows_the_same_law(monkeypatch) -> None:
    """Drawn from the system's secrets; here from numbers that can be repeated."""
    monkeypatch.setattr("fedmllm.rng.secret_uniform", random.Random(5).random)
    profile = shares(1000, 1000, 1000, 1000, (1000,) * 96)
    drawn = [
        count - 1000
        for _ in range(100)
        for given in [noised(profile, 1.6, client="a", seed=None)]
        for count in (*given.modalities, *given.labels)
    ]
    edge = 6
    tally = Counter(max(-edge, min(edge, z)) for z in drawn)
    law = dlaplace(0.8)
    expected = [law.pmf(z) for z in range(-edge, edge + 1)]
    expected[0], expected[-1] = law.cdf(-edge), law.sf(edge - 1)
    observed = [tally[z] for z in range(-edge, edge + 1)]
    assert chisquare(observed, np.array(expected) * len(drawn)).pvalue > 0.01
    assert np.var(drawn) == pytest.approx(law.var(), rel=0.05)


def test_secret_noise_by_hand(monkeypatch) -> None:
    """epsilon = 2 ln 2, so that P(G >= g) = 2^-g: U = 0.8 is floor(log2 5) = 2, U = 0.4 is 0."""
    numbers = iter([0.8, 0.4, 0.4, 0.8, 0.95, 0.0, 0.5, 0.51])
    monkeypatch.setattr("fedmllm.rng.secret_uniform", lambda: next(numbers))
    found = noised(shares(5, 1, 0, 7), 2 * math.log(2), client="a", seed=None)
    assert found.modalities == (5 + 2, 0, 0 + 4, 7)  # 1 - 2 is cut at 0


def test_secrets_are_drawn_from_the_system() -> None:
    found = {rng.secret_uniform() for _ in range(100)}
    assert len(found) == 100
    assert min(found) >= 0
    assert max(found) < 1


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan")])
def test_bad_noise_is_refused(epsilon) -> None:
    with pytest.raises(UserError, match="above 0"):
        noised(shares(1, 1, 1, 1), epsilon, client="a", seed=0)


def test_a_party_that_noise_left_without_counts_is_like_the_others() -> None:
    found = standings(
        {"a": shares(4, 0, 0, 0), "b": shares(0, 4, 0, 0), "gone": shares(0, 0, 0, 0)}
    )
    assert found["gone"].incomplete == 0.5
    assert found["gone"].divergence == pytest.approx(0.0)
    only = standings({"gone": shares(0, 0, 0, 0)})["gone"]
    assert (only.incomplete, only.divergence) == (1.0, 0.0)


def test_bytes_on_the_wire() -> None:
    profiles = [shares(1, 0, 0, 0, (1, 0))] * 10
    assert traffic(profiles, weighted=True) == (10 * 24, 10 * 4)
    assert traffic(profiles, weighted=False) == (240, 0)
