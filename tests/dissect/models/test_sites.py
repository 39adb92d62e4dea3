"""Names of sites: reading them, and what they resolve to."""

import pytest

from dissect.models.sites import PATCH_SITES, SITES, parse_site_set, parse_sites, site_label
from tests.dissect.helpers import build_pair
from unlearning.common.errors import InputError


def test_a_list_of_sites_is_read_in_its_order_and_without_duplicates() -> None:
    expected = (("attn_out",), ("mlp_coef", "attn_out"), ("mlp_coef",))
    assert parse_sites("attn_out, mlp_coef+attn_out,mlp_coef,attn_out") == expected
    assert parse_sites(["attn_out", "attn_out + mlp_coef", "mlp_coef"]) == expected


def test_a_set_of_sites_is_the_same_however_it_is_ordered() -> None:
    assert parse_site_set("attn_out+mlp_coef") == parse_site_set("mlp_coef+attn_out") == ("mlp_coef", "attn_out")


def test_labels_and_parsing_are_inverse() -> None:
    assert parse_sites(",".join(map(site_label, PATCH_SITES))) == PATCH_SITES
    assert site_label(("mlp_coef", "attn_out")) == "mlp_coef+attn_out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp_coeff", "got 'mlp_coeff'; did you mean 'mlp_coef'?"),
        ("zzz", "among mlp_coef, attn_out, mlp_out, resid_post, got 'zzz'"),
        ("mlp_coef+mlp_coef", "got 'mlp_coef+mlp_coef'"),
        (" , ", "got none"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_sites(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_every_site_is_a_hook_point_of_every_layer(family: str) -> None:
    model = build_pair(family).base
    points = [site.hook_name(layer) for site in SITES.values() for layer in range(model.n_layers)]
    assert len(set(points)) == len(SITES) * 3
    assert set(points) <= set(model.bridge.hook_dict)
