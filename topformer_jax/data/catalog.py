"""Data sets as plain tables: their classes in label order, a colour for each, and where the files are."""

import dataclasses
from collections.abc import Iterable, Sequence

from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

SPLITS = ("train", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # of pictures in folders
Colour = tuple[int, int, int]  # red, green, blue


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a data set's files are below its root: the layouts that mmsegmentation documents.

    `{split}` in a path stands for one of the words in `train` or `validation`: the one whose folder exists. A label
    has its image's path with the suffix replaced, or with one more ending that all labels have. Sub-folders are
    searched too.
    """

    images: str
    labels: str
    image_suffixes: tuple[str, ...]  # in lower case; a file's suffix may be in upper case, a label's too
    label_suffix: str
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("val",)
    names: str = ""  # a file with the names of the split's images, without suffix, a line each; empty: all images


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Names and colours of a data set's classes, and the layout of its files.

    `classes[i]` and `palette[i]` (red, green, blue) belong to label i, after `data.reduce_zero_label` is applied.
    `layout` is None for the synthetic shapes.
    """

    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    layout: Layout | None = None


_ADE20K = """
wall #787878, building #b47878, sky #06e6e6, floor #503232, tree #04c803, ceiling #787850, road #8c8c8c, bed #cc05ff,
windowpane #e6e6e6, grass #04fa07, cabinet #e005ff, sidewalk #ebff07, person #96053d, earth #787846, door #08ff33,
table #ff0652, mountain #8fff8c, plant #ccff04, curtain #ff3307, chair #cc4603, car #0066c8, water #3de6fa,
painting #ff0633, sofa #0b66ff, shelf #ff0747, house #ff09e0, sea #0907e6, mirror #dcdcdc, rug #ff095c, field #7009ff,
armchair #08ffd6, seat #07ffe0, fence #ffb806, desk #0aff47, rock #ff290a, wardrobe #07ffff, lamp #e0ff08,
bathtub #6608ff, railing #ff3d06, cushion #ffc207, base #ff7a08, box #00ff14, column #ff0829, signboard #ff0599,
chest of drawers #0633ff, counter #eb0cff, sand #a09614, sink #00a3ff, skyscraper #8c8c8c, fireplace #fa0a0f,
refrigerator #14ff00, grandstand #1fff00, path #ff1f00, stairs #ffe000, runway #99ff00, case #0000ff,
pool table #ff4700, pillow #00ebff, screen door #00adff, stairway #1f00ff, river #0bc8c8, bridge #ff5200,
bookcase #00fff5, blind #003dff, coffee table #00ff70, toilet #00ff85, flower #ff0000, book #ffa300, hill #ff6600,
bench #c2ff00, countertop #008fff, stove #33ff00, palm #0052ff, kitchen island #00ff29, computer #00ffad,
swivel chair #0a00ff, boat #adff00, bar #00ff99, arcade machine #ff5c00, hovel #ff00ff, bus #ff00f5, towel #ff0066,
light #ffad00, truck #ff0014, tower #ffb8b8, chandelier #001fff, awning #00ff3d, streetlight #0047ff, booth #ff00cc,
television receiver #00ffc2, airplane #00ff52, dirt track #000aff, apparel #0070ff, pole #3300ff, land #00c2ff,
bannister #007aff, escalator #00ffa3, ottoman #ff9900, bottle #00ff0a, buffet #ff7000, poster #8fff00, stage #5200ff,
van #a3ff00, ship #ffeb00, fountain #08b8aa, conveyer belt #8500ff, canopy #00ff5c, washer #b800ff, plaything #ff001f,
swimming pool #00b8ff, stool #00d6ff, barrel #ff0070, basket #5cff00, waterfall #00e0ff, tent #70e0ff, bag #46b8a0,
minibike #a300ff, cradle #9900ff, oven #47ff00, ball #ff00a3, food #ffcc00, step #ff008f, tank #00ffeb,
trade name #85ff00, microwave #ff00eb, pot #f500ff, animal #ff007a, bicycle #fff500, lake #0abed4, dishwasher #d6ff00,
screen #00ccff, blanket #1400ff, sculpture #ffff00, hood #0099ff, sconce #0029ff, vase #00ffcc, traffic light #2900ff,
tray #29ff00, ashcan #ad00ff, fan #00f5ff, pier #4700ff, crt screen #7a00ff, plate #00ffb8, monitor #005cff,
bulletin board #b8ff00, shower #0085ff, radiator #ffd600, glass #19c2c2, clock #66ff00, flag #5c00ff
"""

_CITYSCAPES = """
road #804080, sidewalk #f423e8, building #464646, wall #66669c, fence #be9999, pole #999999, traffic light #faaa1e,
traffic sign #dcdc00, vegetation #6b8e23, terrain #98fb98, sky #4682b4, person #dc143c, rider #ff0000, car #00008e,
truck #000046, bus #003c64, train #005064, motorcycle #0000e6, bicycle #770b20
"""

_CONTEXT60 = """
background #787878, aeroplane #b47878, bag #06e6e6, bed #503232, bedclothes #04c803, bench #787850, bicycle #8c8c8c,
bird #cc05ff, boat #e6e6e6, book #04fa07, bottle #e005ff, building #ebff07, bus #96053d, cabinet #787846, car #08ff33,
cat #ff0652, ceiling #8fff8c, chair #ccff04, cloth #ff3307, computer #cc4603, cow #0066c8, cup #3de6fa,
curtain #ff0633, dog #0b66ff, door #ff0747, fence #ff09e0, floor #0907e6, flower #dcdcdc, food #ff095c, grass #7009ff,
ground #08ffd6, horse #07ffe0, keyboard #ffb806, light #0aff47, motorbike #ff290a, mountain #07ffff, mouse #e0ff08,
person #6608ff, plate #ff3d06, platform #ffc207, pottedplant #ff7a08, road #00ff14, rock #ff0829, sheep #ff0599,
shelves #0633ff, sidewalk #eb0cff, sign #a09614, sky #00a3ff, snow #8c8c8c, sofa #fa0a0f, table #14ff00,
track #1fff00, train #ff1f00, tree #ffe000, truck #99ff00, tvmonitor #0000ff, wall #ff4700, water #00ebff,
window #00adff, wood #1f00ff
"""

_COCO_STUFF = """
person #00c040, bicycle #00c040, car #004060, motorcycle #80c0c0, airplane #004040, bus #00c0e0, train #00c0c0,
truck #80c040, boat #00c060, traffic light #80c040, fire hydrant #8020c0, stop sign #0000e0, parking meter #000040,
bench #00a0c0, bird #800060, cat #8000c0, dog #0020c0, horse #8080e0, sheep #0000c0, cow #80a0c0, elephant #808000,
bear #800020, zebra #802000, giraffe #800080, backpack #408020, umbrella #00a000, handbag #000000, tie #c080a0,
suitcase #002000, frisbee #008080, skis #4080a0, snowboard #80a000, sports ball #008000, kite #c08020,
baseball bat #806080, baseball glove #000080, skateboard #400020, surfboard #00e080, tennis racket #800000,
bottle #c000a0, wine glass #006080, cup #808080, fork #4000a0, knife #80e080, spoon #808040, bowl #c00020,
banana #806000, apple #8000c0, sandwich #008020, orange #40e000, broccoli #000040, carrot #8080a0, hot dog #406000,
pizza #0080c0, donut #0080a0, cake #c0e000, chair #008040, couch #808020, potted plant #c02080, bed #0040c0,
dining table #000020, toilet #40a080, tv #804040, laptop #8000a0, mouse #402080, remote #80c0c0, keyboard #0000a0,
cell phone #c0a080, microwave #80c000, oven #800060, toaster #c02000, sink #804080, refrigerator #408060,
book #40a000, clock #004000, vase #c080e0, scissors #402000, teddy bear #00c080, hair drier #4080e0,
toothbrush #c0a000, banner #00c000, blanket #c08060, branch #c06080, bridge #004080, building-other #400060,
bush #40e080, cabinet #804000, cage #c000e0, cardboard #406080, carpet #80c080, ceiling-other #4000e0,
ceiling-tile #c0e080, cloth #80c040, clothes #c00060, clouds #c06000, counter #8040c0, cupboard #008060,
curtain #00e000, desk-stuff #404040, dirt #8080e0, door-stuff #006000, fence #40c0c0, floor-marble #0080e0,
floor-other #80e000, floor-stone #40c040, floor-tile #808060, floor-wood #802080, flower #4000c0, fog #004060,
food-other #00a080, fruit #c00040, furniture-other #8040e0, grass #002080, gravel #c080c0, ground-other #0040e0,
hill #80a080, house #c08000, leaves #804020, light #802040, mat #c00080, metal #40c020, mirror-stuff #00a040,
moss #400000, mountain #c0c0a0, mud #002040, napkin #408080, net #40c0a0, paper #80a040, pavement #408000,
pillow #c0c020, plant-other #8060c0, plastic #400080, platform #404020, playingfield #00e0c0, railing #c00000,
railroad #c040a0, river #0060c0, road #c08080, rock #4040a0, roof #80e0c0, rug #c08040, salad #c04020, sand #806040,
sea #c000c0, shelf #00c020, sky-other #40e040, skyscraper #400040, snow #80c0a0, solid-other #406040, stairs #4080c0,
stone #00c0a0, straw #c0e040, structural-other #408040, table #80c020, tent #c020c0, textile-other #4040c0,
towel #004020, tree #40a0c0, vegetable #c04040, wall-brick #8040a0, wall-concrete #4020c0, wall-other #c0c0c0,
wall-panel #0040a0, wall-stone #c0a0c0, wall-tile #c0c000, wall-wood #804060, water-other #c02040, waterdrops #c04080,
window-blind #40c060, window-other #40a040, wood #404000
"""

_VOC2012 = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
person, pottedplant, sheep, sofa, train, tvmonitor
"""

_CAMVID = """
sky #808080, building #800000, pole #c0c080, road #804080, pavement #3c28de, tree #808000, sign symbol #c08080,
fence #404080, car #400080, pedestrian #404000, bicyclist #0080c0
"""

_SHAPES = """
gradient #46608c, clouds #b4c8dc, stripes #d2b464, bricks #a0503c, disc #e63c3c, triangle #aa46dc, ball #ff9628,
target #28c8d2, board #f0e646, dice #3cb44b
"""


def _split(table: str) -> tuple[str, ...]:
    """The entries between commas; line breaks count as spaces."""
    return tuple(" ".join(table.split()).split(", "))


def _parse_table(table: str, layout: Layout | None) -> DataSet:
    """Reads `name #rrggbb, name #rrggbb, ...`."""
    names, colours = zip(*(entry.split(" #") for entry in _split(table)), strict=True)
    return DataSet(names, tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in colours), layout)


def _voc_colours(numbers: Iterable[int]) -> tuple[Colour, ...]:
    """PASCAL VOC's colours: the bits of a number in turns for red, green and blue, the highest bit of each first."""

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(number, 0), channel(number, 1), channel(number, 2)) for number in numbers)


_JPEG, _FOLDERS = (".jpg",), ("images/{split}", "annotations/{split}")
CUSTOM_LAYOUT = Layout(
    *_FOLDERS, IMAGE_SUFFIXES, ".png", train=("train", "training"), validation=("val", "valid", "validation")
)
_ADE_LAYOUT = Layout(*_FOLDERS, _JPEG, ".png", train=("training",), validation=("validation",))
_CITYSCAPES_LAYOUT = Layout(
    "leftImg8bit/{split}", "gtFine/{split}", ("_leftimg8bit.png",), "_gtFine_labelTrainIds.png"
)
_CONTEXT_LAYOUT = Layout(
    "JPEGImages", "SegmentationClassContext", _JPEG, ".png", names="ImageSets/SegmentationContext/{split}.txt"
)
_VOC_LAYOUT = Layout(
    *("JPEGImages", "SegmentationClassAug", _JPEG, ".png", ("trainaug",)),
    names="ImageSets/Segmentation/{split}.txt",
)
_COCO_LAYOUTS = [
    Layout(*_FOLDERS, _JPEG, "_labelTrainIds.png", train=(train,), validation=(validation,))
    for train, validation in (("train2014", "test2014"), ("train2017", "val2017"))
]
_context = _parse_table(_CONTEXT60, _CONTEXT_LAYOUT)

# The names are those of config/settings.py:DATASETS, without "imagenet" and "custom".
CATALOG = {
    "ade20k": _parse_table(_ADE20K, _ADE_LAYOUT),
    "cityscapes": _parse_table(_CITYSCAPES, _CITYSCAPES_LAYOUT),
    "context60": _context,
    "context59": DataSet(_context.classes[1:], _context.palette[1:], _CONTEXT_LAYOUT),
    "cocostuff10k": _parse_table(_COCO_STUFF, _COCO_LAYOUTS[0]),
    "cocostuff164k": _parse_table(_COCO_STUFF, _COCO_LAYOUTS[1]),
    "voc2012": DataSet(_split(_VOC2012), _voc_colours(range(21)), _VOC_LAYOUT),
    "camvid": _parse_table(_CAMVID, CUSTOM_LAYOUT),
    "shapes": _parse_table(_SHAPES, None),
}


def find_layout(dataset: str) -> Layout | None:
    """How a data set's folder is laid out; None for ImageNet, which has a folder per class."""
    if dataset == "custom":
        return CUSTOM_LAYOUT
    return CATALOG[dataset].layout if dataset in CATALOG else None


def is_name(text: object) -> bool:
    """Whether a text can be the name of a class: one line, without control characters, and not blank.

    >>> is_name("traffic light"), is_name(" "), is_name("a\\u2028b")
    (True, False, False)
    """
    return isinstance(text, str) and bool(text.strip(" \ufeff\u200b")) and not files.CONTROL.search(text)


def name_classes(dataset: str, classes: Sequence[str], palette: Sequence[Colour] = ()) -> DataSet:
    """A data set with these names. Without a palette, it has the catalog's colours for its own names, else VOC's.

    >>> name_classes("shapes", ["sky", "sea"]).palette
    ((128, 0, 0), (0, 128, 0))
    """
    known, own = CATALOG.get(dataset), custom(classes)
    layout = own.layout if known is None else known.layout
    if not palette and known is not None and known.classes == own.classes:
        return known
    return DataSet(own.classes, tuple(palette) or own.palette, layout)


def custom(classes: Sequence[str]) -> DataSet:
    """A user's own data set: images/ and annotations/ folders, with PASCAL VOC's colours from the second on.

    Raises UserError if a name is blank, or holds a line break or another control character.
    """
    if strange := [number for number, name in enumerate(classes) if not is_name(name)]:
        raise UserError(
            f"class {strange[0]} has the name {classes[strange[0]][:40]!r}: expected a text of one line that shows"
        )
    return DataSet(tuple(classes), _voc_colours(range(1, len(classes) + 1)), CUSTOM_LAYOUT)
