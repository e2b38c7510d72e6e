"""Images: the right colours at the right pixels, legends that hold every class, files written whole or not at all."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from topformer_jax.data import codecs
from topformer_jax.data.catalog import CATALOG, custom
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing

SHAPES = CATALOG["shapes"]
RNG = np.random.default_rng(0)
HOSTILE = ['<b>&"', "Größe Übermaß", "x" * 60, "i", "$\\alpha$", *(f"class {number}" for number in range(60))]


def test_error_map_shows_correct_wrong_and_void() -> None:
    label, prediction = np.array([[3, 3, 255]], np.uint8), np.array([[3, 4, 255]], np.uint8)
    right, wrong, void = drawing.error_map(label, prediction)[0].astype(int)
    assert void.sum() == 0
    assert np.ptp(right) < 30 < wrong.mean() - right.mean()  # dim against strong, in lightness too


def test_an_opacity_beyond_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"opacity is 1.5, expected a number from 0 to 1"):
        drawing.overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8), SHAPES, opacity=1.5)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(1, 1, 400), (3, 2, 133), (20, 20_000, 1), (20_000, 20, 1), (300, 300, 1), (1200, 1600, 1)],
)
@pytest.mark.parametrize("classes", [1, 65])
def test_overlay_of_any_size_keeps_the_image_and_its_legend_fits(
    height: int, width: int, factor: int, classes: int
) -> None:
    data_set = custom(HOSTILE)
    labels = (np.arange(height * width) % classes).astype(np.uint8).reshape(height, width)
    image = RNG.integers(0, 256, (height, width, 3), np.uint8)
    result = drawing.overlay(image, labels, data_set)
    blend = drawing.blend(image, labels, data_set.palette)
    shown = result[: height * factor, : width * factor]
    np.testing.assert_array_equal(shown, np.kron(blend, np.ones((factor, factor, 1), np.uint8)))
    table = result[height * factor :]
    edges = [table[0], table[-1], table[:, 0], table[:, -1]]
    assert all((edge == drawing.BACKGROUND).all() for edge in edges), "something is cut off"
    colours = {(int(x) >> 16, int(x) >> 8 & 255, int(x) & 255) for x in np.unique(table @ [65536, 256, 1])}
    assert {data_set.palette[label] for label in np.unique(labels)} <= colours


def test_legend_lists_the_largest_first_and_void_last() -> None:
    labels = np.full((100, 50), 7, np.uint8)
    labels[:60], labels[60], labels[0, 0] = 255, 2, 200
    entries = [(name, drawing.format_share(share)) for name, _, share in drawing.class_shares(labels, SHAPES)]
    assert entries == [("target", "39.0%"), ("stripes", "1.0%"), ("void", "60.0%")]
    assert drawing.format_share(1 / 5000) == "<0.1%"


def test_grid_aligns_columns_and_writes_titles_and_captions_above() -> None:
    red, blue = np.full((10, 20, 3), (255, 0, 0), np.uint8), np.full((40, 40, 3), (0, 0, 255), np.uint8)
    result = drawing.image_grid([[red, blue], [blue, red]], ("a" * 9, ""), height=20)
    assert result.shape == (22 + 44, 84, 3)
    assert result[:22, :60].min() < 100
    assert result[:22, 70:].min() == 255
    grid, white = result[22:], (255, 255, 255)
    np.testing.assert_array_equal(grid[:20, :40], np.broadcast_to((255, 0, 0), (20, 40, 3)))
    np.testing.assert_array_equal(grid[:20, 44:64], np.broadcast_to((0, 0, 255), (20, 20, 3)))
    np.testing.assert_array_equal(grid[24:, 44:], np.broadcast_to((255, 0, 0), (20, 40, 3)))
    assert (grid[20:24] == white).all()
    assert (grid[:, 40:44] == white).all()
    captioned = drawing.image_grid([[red, blue], [blue, red]], ("", ""), ["a" * 99, ""], height=20)
    assert captioned.shape == (22 + 2 * 22 + 44, 84, 3)
    assert captioned[22:44].min() < 100
    np.testing.assert_array_equal(captioned[44:64], grid[:20])
    assert captioned[68:90].min() == 255


def test_grid_keeps_extreme_images_in_a_box() -> None:
    wide, tall = np.zeros((2, 9000, 3), np.uint8), np.zeros((9000, 2, 3), np.uint8)
    grid = drawing.image_grid([[wide, tall]], ("", ""), height=50)
    assert grid.shape == (22 + 50, 4 * 50 + 4 + 1, 3)


@pytest.mark.parametrize("name", ["deep/er/a.png", "a.JPG", "b.jpeg"])
def test_write_is_read_back(name: str, tmp_path: pathlib.Path) -> None:
    image = np.full((9, 8, 3), (250, 128, 0), np.uint8)
    drawing.write_image(tmp_path / name, image)
    found = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
    assert np.abs(found - image).max() <= (0 if name.endswith("png") else 3)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_indexed_labels_keep_their_values_and_show_their_colours(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "labels.png"
    labels = np.array([[0, 9, 255], [1, 2, 3]], np.uint8)
    drawing.write_labels(path, labels, SHAPES.palette)
    image = Image.open(path)
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), labels)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), drawing.colorize(labels, SHAPES.palette))
    np.testing.assert_array_equal(
        codecs.decode_label(path.read_bytes(), path.name, classes=10, reduce_zero_label=False), labels
    )


def test_a_failed_write_is_a_one_line_error_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    image, labels = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, line in {
        "a.gif": "an image's name ends in .jpg, .jpeg, .png",
        "a": "an image's name ends in",
        "file/a.png": "cannot write",
        "folder.png": "cannot write",
    }.items():
        with pytest.raises(UserError, match=line) as error:
            drawing.write_image(tmp_path / name, image)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"go into a \.png file"):
        drawing.write_labels(tmp_path / "a.jpg", labels, SHAPES.palette)
    with pytest.raises(UserError, match="65500 pixels"):
        drawing.write_image(tmp_path / "a.jpg", np.zeros((1, 70_000, 3), np.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
