"""The catalogue: a card may name a sibling, which has to be there."""

from __future__ import annotations

import pytest

from router_ml.catalog import Catalog, card_from_json
from router_ml.errors import InputError

CARD = {
    "id": "new",
    "provider": "acme",
    "tier": "mid-closed",
    "input_usd_per_mtok": 1.0,
    "output_usd_per_mtok": 3.0,
    "context_window": 8192,
}


def test_a_sibling_goes_to_json_and_back(catalog: Catalog) -> None:
    more = catalog.with_card(card_from_json(CARD | {"sibling": "mid"}, "card"))
    assert more["new"].sibling == "mid" and more.ids == (*catalog.ids, "new")
    again = Catalog.from_json(more.to_json())
    assert again == more
    assert "sibling" not in catalog.to_json()["models"][0], "a card without one is written as before"


def test_a_sibling_may_stand_after_the_model_that_names_it(catalog: Catalog) -> None:
    cards = catalog.to_json()["models"]
    assert Catalog.from_json({"models": [CARD | {"sibling": "mid"}, *cards]})["new"].sibling == "mid"


def test_a_subset_without_the_sibling_no_longer_names_it(catalog: Catalog) -> None:
    more = catalog.with_card(card_from_json(CARD | {"sibling": "mid"}, "card"))
    assert more.subset(["new", "mid"])["new"].sibling == "mid"
    assert more.subset(["new", "local"])["new"].sibling is None


@pytest.mark.parametrize(
    ("sibling", "message"),
    [
        ("new", "'new' is its own sibling"),
        ("nobody", "names the sibling 'nobody', which the catalogue does not list"),
        (7, "'sibling' has to be the id of another model"),
    ],
)
def test_a_sibling_that_cannot_be_is_refused(catalog: Catalog, sibling: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalog.with_card(card_from_json(CARD | {"sibling": sibling}, "card"))


def test_a_card_that_is_listed_already_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="lists model 'mid' twice"):
        catalog.with_card(card_from_json(CARD | {"id": "mid"}, "card"))


def test_other_prices_are_one_models_alone(catalog: Catalog) -> None:
    cheaper = catalog.with_prices("mid", 0.25, 1.0)
    assert (cheaper["mid"].input_usd_per_mtok, cheaper["mid"].output_usd_per_mtok) == (0.25, 1.0)
    assert cheaper.ids == catalog.ids and cheaper["mid"].regions == catalog["mid"].regions
    assert [cheaper[model] for model in catalog.ids if model != "mid"] == [c for c in catalog if c.id != "mid"]
    with pytest.raises(InputError, match="'other' is not in the catalogue: it has frontier"):
        catalog.with_prices("other", 0.1, 0.1)
