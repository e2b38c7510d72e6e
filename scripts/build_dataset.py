"""Packs a data set's folder into array_record shards: few large files, for disks and buckets slow with small ones.

  python scripts/build_dataset.py --dataset ade20k --source data/ade/ADEChallengeData2016 --output data/records

The shards are in tensorflow-datasets' format, written and read without TensorFlow; they hold the files' bytes
unchanged. --output may be a bucket (gs://...; that needs the package gcsfs).
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from topformer_jax import cli
from topformer_jax.data import sources
from topformer_jax.data.catalog import CATALOG, CUSTOM_LAYOUT
from topformer_jax.errors import UserError


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the examples of folder sources, in their order."""

    VERSION = tfds.core.Version(sources.VERSION)

    def __init__(self, dataset: str, splits: dict[str, sources.Source], output: str):
        self.name = dataset
        self._splits = splits
        super().__init__(data_dir=output, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(),
            "label": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
        }
        # TFDS would shuffle the records, but the order of training depends on the folder's order.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        source = self._splits[split]
        for index in tqdm(range(len(source)), desc=split, unit=" examples"):
            example = source[index]
            yield index, {"name": example.name, "image": example.image, "label": example.label}


def build(dataset: str, source: str, output: str) -> epath.Path:
    """Writes both splits and returns their folder.

    Raises:
        UserError: the source is incomplete, or the output exists already.
    """
    layout = CUSTOM_LAYOUT if dataset == "custom" else CATALOG[dataset].layout
    splits = {split: sources.open_folder(dataset, layout, source, split) for split in sources.SPLITS}
    root = epath.Path(output).expanduser()
    folder = root / dataset / sources.VERSION
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or give another --output")
    builder: Any = FolderBuilder(dataset, splits, str(root))
    tfds.disable_progress_bar()  # TFDS's own bars, one a shard
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as empty:
            builder.download_and_prepare(download_dir=empty)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    classes = epath.Path(source).expanduser() / "classes.txt"
    if dataset == "custom" and classes.exists():
        (folder / "classes.txt").write_text(classes.read_text())
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [name for name, data_set in CATALOG.items() if data_set.layout] + ["custom"]
    parser.add_argument("--dataset", choices=names, required=True, help="which layout the folder has")
    parser.add_argument("--source", metavar="DIR", required=True, help="the folder, as for data.root")
    parser.add_argument("--output", metavar="DIR", required=True, help="a folder or a bucket for the shards")
    args = parser.parse_args()
    folder = build(args.dataset, args.source, args.output)
    size = sum(file.stat().length for file in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.0f} MB); use it with any config of {args.dataset}:")
    print(f"  --config.data.source=array_record --config.data.root={args.output}")


if __name__ == "__main__":
    cli.run(main)
