"""ADE20K, Cityscapes and CamVid: street and indoor scenes."""

from collections.abc import Iterator
from functools import partial

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG
from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive
from topformer_jax.preparation.writer import Plan, Task, plan_of
from topformer_jax.runtime.errors import UserError

# Names of Cityscapes' raw ids 0 to 33 (cityscapesScripts, helpers/labels.py). Those that are no classes are void.
_CITYSCAPES_IDS = """
unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, sidewalk, parking,
rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, traffic light, traffic sign,
vegetation, terrain, sky, person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle
"""

# CamVid's colours and the class of SegNet's 11 that each belongs to.
_CAMVID_COLOURS = """
sky: 128 128 128 (Sky)
building: 0 128 64 (Bridge), 128 0 0 (Building), 64 192 0 (Wall), 64 0 64 (Tunnel), 192 0 128 (Archway)
pole: 192 192 128 (Column_Pole), 0 0 64 (TrafficCone)
road: 128 64 128 (Road), 128 0 192 (LaneMkgsDriv), 192 0 64 (LaneMkgsNonDriv)
pavement: 0 0 192 (Sidewalk), 64 192 128 (ParkingBlock), 128 128 192 (RoadShoulder)
tree: 128 128 0 (Tree), 192 192 0 (VegetationMisc)
sign symbol: 192 128 128 (SignSymbol), 128 128 64 (Misc_Text), 0 64 64 (TrafficLight)
fence: 64 64 128 (Fence)
car: 64 0 128 (Car), 64 128 192 (SUVPickupTruck), 192 128 192 (Truck_Bus), 192 64 128 (Train), 128 64 64 (OtherMoving)
pedestrian: 64 64 0 (Pedestrian), 192 128 64 (Child), 64 0 192 (CartLuggagePram), 64 128 64 (Animal)
bicyclist: 0 128 192 (Bicyclist), 192 0 192 (MotorcycleScooter)
"""
# SegNet's lists of the 701 pictures: prefix of the names, digits of the number, first, last and step.
_CAMVID_LISTS = {
    "train": (
        ("0001TP_", 6, 6690, 8520, 30),
        ("0006R0_f", 5, 930, 3930, 30),
        ("0016E5_", 5, 390, 870, 30),
        ("0016E5_", 5, 901, 901, 1),
        ("0016E5_", 5, 930, 2400, 30),
        ("0016E5_", 5, 4350, 7920, 30),
        ("0016E5_", 5, 8190, 8640, 30),
    ),
    "val": (("0016E5_", 5, 7959, 8159, 2),),
    "test": (("0001TP_", 6, 8550, 10380, 30), ("Seq05VD_f", 5, 0, 5100, 30)),
}


def plan_ade20k(archive: Archive) -> Plan:
    """ADE20K (SceneParse150): all files as they are."""
    return plan_of(
        [
            Task(path, split, kind, archive[path])
            for split, word in (("train", "training"), ("validation", "validation"))
            for folder, kind, suffix in (("images", "image", ".jpg"), ("annotations", "label", ".png"))
            for name in archive.names(f"{folder}/{word}/", suffix)
            for path in [f"{folder}/{word}/{name}{suffix}"]
        ]
    )


def plan_cityscapes(images: Archive, fine: Archive) -> Plan:
    """Cityscapes: train ids from the raw ids, or from the polygons where there are none."""
    classes = CATALOG["cityscapes"].classes
    names = " ".join(_CITYSCAPES_IDS.split()).split(", ")
    train_ids = {name: classes.index(name) if name in classes else IGNORE_LABEL for name in names}
    raw = partial(labels.map_values, dict(enumerate(train_ids.values())))
    polygons = partial(labels.draw_cityscapes, train_ids | {"license plate": -1})
    tasks = []
    for split, word in (("train", "train"), ("validation", "val")):
        for name in images.names(f"leftImg8bit/{word}/", "_leftImg8bit.png"):
            path = f"leftImg8bit/{word}/{name}_leftImg8bit.png"
            tasks.append(Task(path, split, "image", images[path]))
            label = f"gtFine/{word}/{name}_gtFine"
            if f"{label}_labelIds.png" in fine.members:
                source, convert = fine[f"{label}_labelIds.png"], raw
            else:
                source, convert = fine[f"{label}_polygons.json"], polygons
            tasks.append(Task(f"{label}_labelTrainIds.png", split, "label", source, convert))
    return plan_of(tasks)


def plan_camvid(stills: Archive, labelled: Archive) -> Plan:
    """CamVid, 960 x 720: SegNet's 11 classes and lists."""
    colours: dict[labels.Colour, int] = {(0, 0, 0): IGNORE_LABEL}
    for name, line in (row.split(": ") for row in _CAMVID_COLOURS.strip().splitlines()):
        for entry in line.split(", "):
            red, green, blue, _ = entry.split(" ")
            colours[int(red), int(green), int(blue)] = CATALOG["camvid"].classes.index(name)
    convert = partial(labels.map_colours, colours, IGNORE_LABEL)
    present = set(stills.names("", ".png"))
    if not present & {name for word in _CAMVID_LISTS for name in _list_camvid(word)}:
        raise UserError(f"{stills.path} holds none of CamVid's 701 pictures: it is another archive")
    tasks = []
    for word in _CAMVID_LISTS:
        for name in _list_camvid(word):
            if name in present:
                tasks.append(Task(f"images/{word}/{name}.png", word, "image", stills[f"{name}.png"]))
                source = labelled[f"{name}_L.png"]
                tasks.append(Task(f"annotations/{word}/{name}.png", word, "label", source, convert))
    return plan_of(tasks)


def plan_camvid_of_segnet(archive: Archive) -> Plan:
    """CamVid, 480 x 360, of the SegNet tutorial: void is 255 instead of 11."""
    convert = partial(labels.map_values, {label: label for label in range(11)} | {11: IGNORE_LABEL})
    tasks = []
    for word in _CAMVID_LISTS:
        for name in archive.names(f"CamVid/{word}/", ".png"):
            tasks.append(
                Task(f"images/{word}/{name}.png", word, "image", archive[f"CamVid/{word}/{name}.png"])
            )
            source = archive[f"CamVid/{word}annot/{name}.png"]
            tasks.append(Task(f"annotations/{word}/{name}.png", word, "label", source, convert))
    return plan_of(tasks)


def _list_camvid(word: str) -> Iterator[str]:
    for prefix, digits, first, last, step in _CAMVID_LISTS[word]:
        for number in range(first, last + 1, step):
            yield f"{prefix}{number:0{digits}}"
