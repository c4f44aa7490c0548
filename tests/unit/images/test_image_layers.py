"""What of an image is moved, and when an image may go."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyd.errors import InvalidInput
from flyd.images.layers import (
    KEPT_RELEASES,
    ORPHAN_AGE_S,
    Deployed,
    checked,
    expendable,
    known_layers,
    lacking,
    layers_of,
    needs,
)
from flyd.model import BlobNeed, HeldImage
from flyd.model.image import IMAGE_PREFIX, image_id

A, B, C, D, X = (letter * 64 for letter in "abcde")


@pytest.mark.parametrize(
    ("layers", "images", "lacks"),
    [
        ((), [], ()),
        ((A, B), [], (A, B)),
        ((A, B, C), [(A, B)], (C,)),
        ((A, B, C), [(A,), (A, B, D)], (C,)),
        ((A, B), [(A, B, C)], ()),
        ((A, B), [(B, A)], (A, B)),  # a layer is known only on top of the same ones
        ((A, B, B, C), [(A,)], (B, C)),  # each once
        ((A, B), [()], (A, B)),
    ],
)
def test_lacking(layers: tuple[str, ...], images: list[tuple[str, ...]], lacks: tuple[str, ...]) -> None:
    assert lacking(layers, images) == lacks


chains = st.lists(st.sampled_from([A, B, C, D]), max_size=5).map(tuple)


@settings(max_examples=100)
@given(chains, st.lists(chains, max_size=4))
def test_what_is_known_and_what_is_lacking_make_the_image(
    layers: tuple[str, ...], images: list[tuple[str, ...]]
) -> None:
    known = known_layers(layers, images)
    assert known == 0 or any(image[:known] == layers[:known] for image in images)
    assert all(image[: known + 1] != layers[: known + 1] for image in images) or known == len(layers)
    assert sorted({*layers[:known], *lacking(layers, images)}) == sorted({*layers})
    assert lacking(layers, [*images, layers]) == ()


def test_needs_begin_with_the_configuration_and_go_on_where_a_blob_was_cut() -> None:
    assert needs(X, (A, B, C), [(A,)], {B: 7}) == (
        BlobNeed(digest=X),
        BlobNeed(digest=B, offset_bytes=7),
        BlobNeed(digest=C),
    )
    assert needs(X, (A, B), [(A,)], {X: None, B: None}) == ()


@settings(max_examples=100)
@given(
    chains,
    st.lists(chains, max_size=4),
    st.dictionaries(st.sampled_from([A, B, C, D, X]), st.none() | st.integers(0, 9)),
)
def test_needs_are_what_lacks_but_for_whole_blobs(
    layers: tuple[str, ...], images: list[tuple[str, ...]], received: dict[str, int | None]
) -> None:
    found = needs(X, layers, images, received)
    whole = [digest for digest, size in received.items() if size is None]
    assert [n.digest for n in found] == [d for d in (X, *lacking(layers, images)) if d not in whole]
    assert all(n.offset_bytes == received.get(n.digest, 0) for n in found)


def test_configurations() -> None:
    config = {"rootfs": {"type": "layers", "diff_ids": [f"sha256:{A}", f"sha256:{B}"]}, "os": "linux"}
    assert layers_of(json.dumps(config).encode()) == (A, B)
    assert layers_of(b'{"rootfs": {"type": "layers"}}') == ()
    for bad in (b"", b"{}", b'{"rootfs": 1}', b'{"rootfs": {"diff_ids": ["sha256:../../x"]}}'):
        with pytest.raises(InvalidInput):
            layers_of(bad)
    for bad in ("", "A" * 64, "../" + A, A + "0"):
        with pytest.raises(InvalidInput):
            checked(bad)


def test_references() -> None:
    assert image_id(IMAGE_PREFIX + A) == A
    assert image_id(f"source:sha256:{A}") == image_id("host:") == ""


# --------------------------------------------------------------------------- pruning


def released(app: str, *images: str, failed: str = "") -> list[Deployed]:
    """Versions 1, 2, ... of an app."""
    return [
        Deployed(app=app, version=n, image=IMAGE_PREFIX + image, complete=image not in failed.split())
        for n, image in enumerate(images, 1)
    ]


def held(*images: str, since_s: float = 0.0) -> list[HeldImage]:
    return [HeldImage(image_id=image, since_s=since_s) for image in images]


NOW_S = 10 * ORPHAN_AGE_S


def test_the_last_three_releases_stay() -> None:
    releases = released("web", A, B, C, D)
    assert KEPT_RELEASES == 3
    assert expendable(held(A, B, C, D), releases, (), NOW_S) == (A,)


def test_an_image_that_a_machine_or_another_app_uses_stays() -> None:
    releases = released("web", A, B, C, D)
    assert expendable(held(A), releases, [IMAGE_PREFIX + A], NOW_S) == ()
    assert expendable(held(A), [*releases, *released("api", A)], (), NOW_S) == ()


def test_the_last_complete_release_stays_behind_three_failed_ones() -> None:
    releases = released("web", A, B, C, D, X, failed=f"{C} {D} {X}")
    assert expendable(held(A, B, C, D, X), releases, (), NOW_S) == (A,)


def test_an_image_of_no_release_stays_for_a_day() -> None:
    assert expendable(held(A, since_s=NOW_S - 60), [], (), NOW_S) == ()
    assert expendable(held(A, since_s=NOW_S - ORPHAN_AGE_S - 1), [], (), NOW_S) == (A,)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["web", "api"]), st.sampled_from([A, B, C, D, X]), st.booleans())),
    st.frozensets(st.sampled_from([A, B, C, D, X])),
)
def test_what_is_used_or_young_never_goes(rows: list[tuple[str, str, bool]], used: frozenset[str]) -> None:
    releases = [
        Deployed(app=app, version=n, image=IMAGE_PREFIX + image, complete=complete)
        for n, (app, image, complete) in enumerate(rows)
    ]
    in_use = [IMAGE_PREFIX + image for image in sorted(used)]
    gone = expendable(held(A, B, C, D, X), releases, in_use, NOW_S)
    young = [image for app in ("web", "api") for _, image, _ in [r for r in rows if r[0] == app][-3:]]
    assert not {*gone} & used
    assert not {*gone} & {*young}
