"""ImageNet (ILSVRC 2012): a folder a class, named by its WordNet id, as PyTorch's ImageFolder reads it."""

from collections.abc import Iterator

from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive, open_nested
from topformer_jax.preparation.writer import Plan, Task
from topformer_jax.runtime.errors import UserError

_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


def plan_imagenet(train: Archive, validation: Archive, devkit: Archive) -> Plan:
    """`train/<WordNet id>/` from an archive of archives, `val/<WordNet id>/` by the development kit's ground truth.

    The development kit numbers the classes by an order of its own; labels of a training are the places of the
    folders' sorted names.
    """
    meta = devkit["data/meta.mat"]
    with labels.expect_fields(meta.where):
        rows = labels.read_mat(meta.read(), meta.where)["synsets"].ravel()
        names = {int(row["ILSVRC2012_ID"].item()): str(row["WNID"].item()) for row in rows}
    with labels.expect_fields(devkit[_GROUND_TRUTH].where):
        numbers = [int(line) for line in devkit.lines(_GROUND_TRUTH)]
    pictures = validation.names("", ".JPEG")
    if len(pictures) != len(numbers):
        raise UserError(
            f"{validation.path} holds {len(pictures)} pictures, {devkit.path} the classes of {len(numbers)}: "
            "download the one again that is not whole"
        )

    def list_tasks() -> Iterator[Task]:
        for name, number in zip(pictures, numbers, strict=True):
            yield Task(f"val/{names[number]}/{name}.JPEG", "validation", "image", validation[f"{name}.JPEG"])
        for wnid in train.names("", ".tar"):
            for member in open_nested(train[f"{wnid}.tar"]):
                yield Task(f"train/{wnid}/{member.name}", "train", "image", member)

    return Plan(list_tasks(), sum(member.size for a in (train, validation) for member in a.members.values()))
