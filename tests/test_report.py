"""The report: what it says, that it stands alone, and that no name breaks out of its text."""

import base64
import io
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from topformer_jax.data.catalog import CATALOG, DataSet
from topformer_jax.visualize import drawing, report

HOSTILE = '<b onload="x">&"\'</style>'
NAMES = (HOSTILE, "Größe", "x" * 60, "absent", "predicted")
FIVE = DataSet(NAMES, ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (1, 2, 3)))
CONFUSION = np.array(
    [[60, 20, 0, 0, 0], [0, 90, 10, 0, 0], [0, 0, 15, 0, 5], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.int64
)
VOID_ELEMENTS = {"meta", "img"}


class Page(HTMLParser):
    """The elements and the text of a page; complains where a tag is not closed in turn."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def example(name: str = "a", size: tuple[int, int] = (40, 60), seed: int = 0) -> report.ReportExample:
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    label[: size[0] // 2] = 1
    prediction = label.copy()
    prediction[:, : size[1] // 2] = 4
    label[:, -1] = 255
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    return report.ReportExample(name, 0.5, float("nan"), image, label, prediction)


def write(path: pathlib.Path, **changes: object) -> Page:
    arguments: dict[str, object] = {
        "title": "a title",
        "facts": {"images": "12"},
        "data_set": FIVE,
        "confusion": CONFUSION,
        "best": [],
        "worst": [],
    }
    report.write_report(path, **{**arguments, **changes})  # type: ignore[arg-type]
    return Page(path)


def test_scores_are_those_of_the_matrix(tmp_path: pathlib.Path) -> None:
    page = write(tmp_path / "deep" / "report.html")
    # IoU 60/80, 90/120, 15/30, nan, 0/5; accuracy 60/80, 90/100, 15/20, nan, nan; 165 of 200 are right.
    assert [x for x in page.text if re.fullmatch(r"\d+\.\d\d%", x)][:3] == ["50.00%", "80.00%", "82.50%"]
    assert page.rows[0] == ["images", "12"]
    assert [[row[0], *row[2:]] for row in page.rows[2:6]] == [
        ["0", "", "75.0%", "75.0%", "40.00%"],
        ["1", "", "75.0%", "90.0%", "50.00%"],
        ["2", "", "50.0%", "75.0%", "10.00%"],
        ["4", "", "0.0%", "–", "0.00%"],  # noqa: RUF001
    ]
    assert [row[1] for row in page.rows[2:6]] == [NAMES[0], NAMES[1], NAMES[2], NAMES[4]]
    assert page.text.count("absent") == 1
    assert page.text.index("absent") > page.text.index("predicted")


def test_confusions_are_shares_of_their_label_sorted_by_pixels(tmp_path: pathlib.Path) -> None:
    page = write(tmp_path / "report.html", facts={})
    assert page.rows[6:] == [
        [NAMES[0], NAMES[1], "", "25.0%", "10.00%"],
        [NAMES[1], NAMES[2], "", "10.0%", "5.00%"],
        [NAMES[2], NAMES[4], "", "25.0%", "2.50%"],
    ]


def test_names_stay_text_and_nothing_comes_from_elsewhere(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    examples = [example(HOSTILE)]
    page = write(path, title=HOSTILE, facts={HOSTILE: HOSTILE}, best=examples, worst=examples)
    tags = {name for name, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    for name, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), name
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    assert "".join(page.text).count(HOSTILE) >= 8
    assert page.named("img")[1]["alt"] == f"image of {HOSTILE}"
    source = path.read_text(encoding="utf-8")
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert source.count("</style>") == 1
    links = {attributes["href"] for attributes in page.named("a")}
    assert links == {f"#{attributes['id']}" for attributes in page.named("section")}


def decode(attributes: dict[str, str | None]) -> Image.Image:
    """The embedded image of an element."""
    kind, data = str(attributes["src"]).removeprefix("data:image/").split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    return image


def test_embedded_images_are_reduced_and_in_their_colours(tmp_path: pathlib.Path) -> None:
    page = write(
        tmp_path / "report.html",
        best=[example(size=(600, 1200)), example()],
        worst=[example(size=(3000, 20))],
    )
    images = [decode(attributes) for attributes in page.named("img")[1:]]  # after the matrix
    assert [image.size for image in images] == [(5, 720)] * 4 + [(480, 240)] * 4 + [(60, 40)] * 4
    assert [image.format for image in images[4:]] == ["JPEG", "PNG", "PNG", "PNG"] * 2
    _, label, prediction, errors = (np.asarray(image) for image in images[4:8])
    np.testing.assert_array_equal(label[[60, 180], 100], [FIVE.palette[1], FIVE.palette[0]])
    np.testing.assert_array_equal(prediction[60, [100, 400]], [FIVE.palette[4], FIVE.palette[1]])
    np.testing.assert_array_equal(errors[60, [100, 400]], [drawing.WRONG, drawing.CORRECT])
    assert (np.asarray(images[11])[:, -1] == 0).all(), "void in the label is void in the errors"
    assert page.text.count("void") == 3
    assert "50.0% of its pixels right, mIoU –" in "".join(page.text)  # noqa: RUF001


@pytest.mark.parametrize("name", ["shapes", "ade20k"])
def test_the_matrix_is_drawn_for_few_and_many_classes(name: str, tmp_path: pathlib.Path) -> None:
    data_set = CATALOG[name]
    count = len(data_set.classes)
    confusion = np.full((count, count), 1) + 200 * np.eye(count, dtype=np.int64)
    page = write(tmp_path / "report.html", data_set=data_set, confusion=confusion)
    (image,) = map(decode, page.named("img"))
    assert image.width == min(300 + 30 * count, 1200)
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[..., 1] - pixels[..., 0]).max() > 60, "what is right is green"
    assert len(page.rows) == 1 + 1 + count + 1 + report.MAX_CONFUSIONS


@pytest.mark.parametrize("confusion", [np.zeros((5, 5), np.int64), 7 * np.eye(5, dtype=np.int64)])
def test_nothing_labelled_or_nothing_wrong(confusion: np.ndarray, tmp_path: pathlib.Path) -> None:
    page = write(tmp_path / "report.html", confusion=confusion, facts={}, title="")
    text = "".join(page.text)
    assert "No pixel was taken for another class." in text
    assert ("100.00%" in text) == bool(confusion.any())
    assert ("No pixel has a label." in text) != bool(confusion.any())
    assert "nan" not in text
