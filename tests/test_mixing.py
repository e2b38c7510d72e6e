"""What rare classes need: examples drawn for a class, and parts of other crops that are pasted."""

from typing import Any, cast

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.test_loader import EXAMPLES, Arrays, assert_same, batches, settings
from topformer_jax import browse
from topformer_jax.data import loader, sources
from topformer_jax.data.class_balance import group_by_class, mix
from topformer_jax.data.loader import count_pixels
from topformer_jax.data.transforms import CroppedExample
from topformer_jax.runtime.errors import UserError


def _crop(seed: int, size: tuple[int, int]) -> CroppedExample:
    """A crop of 30 x 40 pixels whose red is its seed and whose green is its label."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 3, 4, 8, 255], (6, 8)).astype(np.uint8).repeat(5, 0).repeat(5, 1)
    image = np.stack([np.full_like(label, seed), label, label], -1)
    image[size[0] :], image[:, size[1] :] = 0, 0
    label[size[0] :], label[:, size[1] :] = 255, 255
    return {"image": image, "label": label, "size": np.array(size, np.int32)}


def _mix(method: str, seed: int, pasted: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where another crop was pasted onto one, and the other's label; asserts that nothing else changed."""
    red = 2 + seed % 250
    crop, other, plain = (cast(Any, _crop(*each)) for each in ((1, (25, 40)), (red, (30, 33)), (1, (25, 40))))
    mix(crop, other, method, pasted, np.random.default_rng(seed))
    is_pasted = crop["image"][..., 0] == red
    for name, before in plain.items():
        wide = is_pasted if name == "label" else is_pasted[..., None]
        expected = before if name == "size" else np.where(wide, other[name], before)
        np.testing.assert_array_equal(crop[name], expected)
    assert not is_pasted[25:].any()
    assert not is_pasted[:, 33:].any()
    return is_pasted[:25, :33], other["label"][:25, :33]


def test_cutmix_pastes_boxes() -> None:
    areas = []
    for seed in range(300):
        is_pasted, _ = _mix("cutmix", seed)
        rows, columns = np.flatnonzero(is_pasted.any(1)), np.flatnonzero(is_pasted.any(0))
        areas.append(is_pasted.mean())
        if len(rows):
            assert is_pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            if rows[0] > 0 and rows[-1] < 24 and columns[0] > 0 and columns[-1] < 32:  # not cut off
                assert abs(len(columns) - len(rows) * 33 / 25) < 2.4
    # Of a box of side s = sqrt(u) at a uniform centre, s - s**2 / 4 of each side is inside.
    sides = np.sqrt(np.linspace(0, 1, 1001))
    assert np.mean(areas) == pytest.approx(np.mean((sides - sides**2 / 4) ** 2), abs=0.04)


def test_classmix_pastes_half_of_the_classes() -> None:
    picked = set()
    for seed in range(40):
        is_pasted, label = _mix("classmix", seed)
        present, chosen = np.setdiff1d(label, [255]), np.unique(label[is_pasted])
        assert len(chosen) == len(present) // 2
        np.testing.assert_array_equal(is_pasted, np.isin(label, chosen))
        picked |= {*chosen.tolist()}
    assert picked == {0, 3, 4, 8}


def test_paste_takes_one_class() -> None:
    for seed in range(5):
        is_pasted, label = _mix("paste", seed, 4)
        np.testing.assert_array_equal(is_pasted, label == 4)


def test_classes_are_drawn_equally_often_or_by_rarity() -> None:
    pixels = np.array([[900, 0, 100, 0]] * 8 + [[0, 0, 0, 16], [0, 0, 200, 9]], np.int32)
    draws, rng = group_by_class(pixels), np.random.default_rng(0)
    for by_rarity in (False, True):
        counts = np.zeros(pixels.shape)
        for _ in range(6000):
            label, index = draws.draw(rng, by_rarity=by_rarity)
            counts[index, label] += 1
        assert not counts[pixels == 0].any()
        rarity = [1 / 7200**0.5, 0, 1 / 1000**0.5, 1 / 25**0.5]
        weights = np.array(rarity if by_rarity else [1, 0, 1, 1])
        expected = pixels * (weights / weights.sum() / np.maximum(pixels.sum(0), 1))
        np.testing.assert_allclose(counts / 6000, expected, atol=0.03)
    with pytest.raises(UserError, match="no training label has a pixel of a class"):
        group_by_class(pixels * 0)


def _count(config: ConfigDict) -> np.ndarray:
    source = sources.open_source(config, "train")
    return np.stack(list(count_pixels(source, config, range(len(source)))))


def _make(count: int, config: ConfigDict, **place: int) -> list[Arrays]:
    return batches(config, count, class_draws=group_by_class(_count(config)), **place)


def test_balance_replaces_a_share_of_the_examples() -> None:
    plain, balanced = batches(settings(), 40), _make(40, settings(data__balance=0.3))
    rows = {name: np.concatenate([batch[name] for batch in balanced]) for name in balanced[0]}
    theirs = {name: np.concatenate([batch[name] for batch in plain]) for name in plain[0]}
    drawn = np.array([loader.is_drawn(int(epoch)) for epoch in rows["epoch"]])
    assert 0.2 < drawn.mean() < 0.4
    for name, values in rows.items():  # the others are those of a run without it
        np.testing.assert_array_equal(values[~drawn], theirs[name][~drawn])
    assert len({*zip(rows["index"].tolist(), rows["epoch"].tolist(), strict=True)}) == len(drawn)
    # A few crops are equal by chance.
    assert len({image.tobytes() for image in rows["image"]}) > 0.9 * len(drawn)
    all_drawn = _make(40, settings(data__balance=1.0))
    index = np.concatenate([batch["index"] for batch in all_drawn])
    pixels = _count(settings())
    expected = (pixels / pixels.sum(0)).mean(1)
    np.testing.assert_allclose(np.bincount(index, minlength=10) / len(index), expected, atol=0.08)


def test_an_example_is_cropped_where_its_class_is() -> None:
    config, pixels = settings(data__balance=1.0, data__crop_size=(16, 16)), _count(settings())
    chosen = int(np.where(pixels.any(0), pixels.sum(0), pixels.sum()).argmin())
    only = np.where(np.arange(10) == chosen, pixels, 0)
    made = batches(config, 20, class_draws=group_by_class(only))
    assert {*np.concatenate([batch["index"] for batch in made])} == {*np.flatnonzero(pixels[:, chosen])}
    held = [(batch["label"] == chosen).mean((1, 2)) for batch in made]
    source = sources.open_source(config, "train")
    anywhere = [
        np.mean(loader.crop_example(source[index], config, index, epoch)["label"] == chosen)
        for batch in made
        for index, epoch in zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)
    ]
    assert np.mean(held) > 1.2 * np.mean(anywhere)
    assert np.mean(np.concatenate(held) == 0) < 0.05 < np.mean(np.equal(anywhere, 0))


def test_mixed_examples_are_pasted_onto_those_of_a_run_without() -> None:
    plain = batches(settings(), 10)
    for method in ("cutmix", "classmix", "paste"):
        mixed = _make(10, settings(data__mix=method, data__mix_prob=0.6))
        changed = []
        for ours, theirs in zip(mixed, plain, strict=True):
            assert_same([ours | {name: theirs[name] for name in ("image", "label")}], [theirs])
            changed += (ours["image"] != theirs["image"]).any((1, 2, 3)).tolist()
            outside = theirs["image"].any(-1) | (theirs["label"] != 255)
            assert not (ours["image"].any(-1) & ~outside).any()
        assert 0.2 < np.mean(changed) < 0.8
    assert_same(batches(settings(data__mix="cutmix", data__mix_prob=0.0), 10), plain)


def test_the_same_on_processes_and_workers_and_from_any_step() -> None:
    changes: dict[str, Any] = {"data__balance": 0.5, "data__mix": "paste"}
    whole = _make(7, settings(**changes))
    place = {"start_step": 3, "process_index": 1, "process_count": 2}
    half = [{name: values[2:] for name, values in batch.items()} for batch in whole[3:]]
    assert_same(_make(4, settings(**changes), **place), half)
    assert_same(_make(4, settings(**changes, data__num_workers=2), **place), half)
    assert whole[0]["label"].tobytes() != _make(1, settings(**changes, seed=1))[0]["label"].tobytes()


def test_browse_counts_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    canvas = browse.browse(settings(data__balance=1.0), 1, 2)
    assert capsys.readouterr().out == f"counting the pixels of {EXAMPLES} labels\n"
    assert canvas.shape[0] > 2 * 256


def test_classes_must_be_counted() -> None:
    with pytest.raises(ValueError, match="need class_draws"):
        batches(settings(data__balance=0.1), 1)
