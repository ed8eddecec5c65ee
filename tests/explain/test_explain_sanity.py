"""What explanations must do: find a planted cue, add up, and depend on what was learnt."""

import numpy as np
import pytest
import tiny
from helpers import refused
from scipy import stats

from bertfast.data import Examples
from bertfast.explain import Settings, explain
from bertfast.explain.explainer import Explainer
from bertfast.explain.sanity import randomisation, spearman
from bertfast.train import ConfigError

pytest.importorskip("captum")
TEXTS = [row["text"] for row in tiny.rows(60, 7)]
COLOURS = tiny.WORDS[:3]
SIGNED = ("integrated_gradients", "occlusion")


@pytest.fixture(scope="module")
def found(colours):
    return explain(colours, TEXTS, methods=[*SIGNED, "gradient_attention"], device="cpu")


@pytest.mark.parametrize("method", (*SIGNED, "gradient_attention"))
def test_the_cue_is_ranked_first(found, method):
    """The colour, which alone decides the class, in at least 95 of 100 texts."""
    first = [max(r["words"], key=lambda w: w["scores"][method])["text"] for r in found]
    right = [word == r["target"] for word, r in zip(first, found, strict=True)]
    assert (
        np.mean(
            [r["target"] == r["predicted"] in text for r, text in zip(found, TEXTS, strict=True)]
        )
        > 0.95
    )
    assert np.mean(right) >= 0.95


def test_sums_are_complete(found):
    for result in found:
        own = result["methods"]["integrated_gradients"]
        total = sum(w["scores"]["integrated_gradients"] for w in result["words"])
        change = own["logit"] - own["baseline_logit"]
        assert own["complete"] and abs(total - change) <= 0.01 * abs(change)
        assert own["rest"] == pytest.approx(0, abs=1e-6)


def test_too_few_steps_are_told(colours):
    settings = {"methods": ["integrated_gradients"], "steps": 1, "max_steps": 1, "device": "cpu"}
    owns = [r["methods"]["integrated_gradients"] for r in explain(colours, TEXTS[:9], **settings)]
    assert any(not own["complete"] for own in owns)
    assert all(own["complete"] == (own["completeness_error"] <= 0.01) for own in owns)
    more = explain(colours, TEXTS[:9], **settings | {"max_steps": 64})
    raised = [r["methods"]["integrated_gradients"] for r in more]
    assert all(own["complete"] and own["steps"] <= 64 for own in raised)
    assert any(own["steps"] > 1 for own in raised)


def test_random_weights_give_other_scores(colours):
    """Adebayo et al. 2018: what stays alike says nothing of the trained model."""
    given = Explainer(colours, Settings(methods=(*SIGNED, "gradient_attention")), device="cpu")
    examples = Examples(TEXTS)
    results = given.explained(examples, 16)
    before = {k: v.clone() for k, v in given.model.state_dict().items()}
    agreement = randomisation(given, examples, results, 16)
    for one in agreement.values():
        assert abs(one["spearman"]) < 0.4 and one["texts"] > 50
    assert all(v.equal(before[k]) for k, v in given.model.state_dict().items())


def test_equal_weights_agree(colours, monkeypatch):
    """That the measure could fail: of the same model it is 1."""
    from bertfast.explain import sanity

    given = Explainer(colours, Settings(methods=SIGNED, target="red"), device="cpu")
    monkeypatch.setattr(sanity, "untrained", lambda model: model)
    examples = Examples(TEXTS[:20])
    results = given.explained(examples, 16)
    for one in randomisation(given, examples, results, 16).values():
        assert one["spearman"] == pytest.approx(1) == one["spearman_of_absolute"]


def test_spearman_is_scipys():
    r = np.random.default_rng(0)
    for n in (3, 8, 40):
        a, b = r.integers(0, 9, n).astype(float), r.normal(size=n)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_other_targets_have_other_signs(colours):
    """What speaks for red speaks against blue."""
    text = ["red cat dog walk"]
    red, blue = (
        explain(colours, text, methods=SIGNED, target=name, device="cpu")[0]
        for name in ("red", "blue")
    )
    for method in SIGNED:
        assert red["words"][0]["scores"][method] > 0 > blue["words"][0]["scores"][method]


def test_unknown_targets_name_the_known(colours):
    refused(
        ConfigError,
        "'purple'.*known are blue, green, none, red",
        explain,
        colours,
        TEXTS[:1],
        target="purple",
    )
