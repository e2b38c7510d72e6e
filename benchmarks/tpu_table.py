"""The table of docs/pods.md: what `python -m benchmarks.tpu --table` compiles, keeps and writes.

Each program takes minutes to compile, so its row is kept in a folder as soon as it is there. A row is used again as
long as the package's source is that of the commit that it was compiled at.
"""

import json
import pathlib
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.timing import Row
from topformer_jax import files
from topformer_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- benchmarks.tpu writes from here -->", "<!-- to here -->"
# By kind of chip: its memory's bytes a second, and bfloat16 operations a second.
CHIPS = {
    "v4": (1228e9, 275e12),
    "v5e": (819e9, 197e12),
    "v5p": (2765e9, 459e12),
    "v6e": (1640e9, 918e12),
}


class Program(NamedTuple):
    """A program to compile.

    Attributes:
        variant: of the network.
        slices: name of the slice, with `*2` for two of them.
        batch: images of a training step over all chips; 0: an evaluation.
    """

    variant: str
    slices: str
    batch: int = 0

    @property
    def file_name(self) -> str:
        """Of its rows in the folder."""
        return f"{self.variant} {self.slices.replace(':', ' ').replace('*', ' times ')} {self.batch}.json"


# The most wanted first. A v4 or v5p slice is called by its cores, two a chip: v4-16 and v5p-64 have 8 and 32 chips.
STEPS = (
    ("v5e:2x4", 32),
    ("v5e:16x16", 256),
    ("v5e:16x16", 1024),
    ("v5e:16x16", 2048),
    ("v5e:16x16*2", 2048),
    ("v4:2x2x2", 32),
    ("v5p:2x4x4", 128),
    ("v6e:4x4", 64),
)
PROGRAMS = [
    *(Program("base", *step) for step in STEPS[:4]),
    Program("base", "v5e:2x4"),
    Program("base", "v5e:16x16"),
    Program("tiny", *STEPS[0]),
    *(Program("base", *step) for step in STEPS[4:]),
    *(Program("tiny", *step) for step in STEPS[1:]),
    Program("tiny", "v5e:2x4"),
    Program("tiny", "v5e:16x16"),
]


def write_table(
    folder: pathlib.Path,
    compile_rows: Callable[[Program], list[Row]],
    commit: str,
    *,
    page: pathlib.Path = PAGE,
    programs: Sequence[Program] = PROGRAMS,
) -> None:
    """Compiles what the folder does not have yet, and writes the table into the page after each program.

    Args:
        folder: of the rows, made if missing.
        compile_rows: the rows of a program, see `benchmarks.tpu.compile_row`.
        commit: whose rows they are.
        page: has `BEGIN` and `END`, between which the table goes.
        programs: in the order in which they are compiled and listed.

    Raises:
        UserError: the page lacks `BEGIN` or `END`.
    """
    rows: list[tuple[Program, list[Row]]] = []
    for program in programs:
        path = folder / commit / program.file_name
        if not path.exists():
            files.write_file(path, json.dumps(compile_rows(program), indent=2) + "\n")
        rows.append((program, json.loads(path.read_text())))
        _replace_block(page, format_block(commit, rows, programs[len(rows) :]))


def format_block(
    commit: str, rows: Sequence[tuple[Program, Sequence[Row]]], missing: Sequence[Program]
) -> str:
    """The block in Markdown: commit, table, and which programs are not in it."""
    lines = [
        f"Commit {commit}; bfloat16, crops of 512 x 512, evaluation of 8 images of 512 x 683 a chip:",
        "",
        "| | chips | images a chip | arguments MB | temporary MB | moved GB | TFLOP | sent MB | "
        "images/s a chip, at most | compiled in s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for program, found in rows:
        for row in found:
            what = f"{program.variant}, {row['program']}, {program.slices}"
            if "failed" in row:
                lines.append(f"| {what}, {program.batch} | {row['failed']} |" + " |" * 8)
                continue
            cells = (
                f"{what}{f', {program.batch}' if program.batch else ''}",
                f"{row['chips']}",
                f"{row['images']:g}",
                f"{row['arguments_bytes'] / 1e6:.0f}",
                f"{row['temporary_bytes'] / 1e6:.0f}",
                f"{row['moved_bytes'] / 1e9:.2f}",
                f"{row['operations'] / 1e12:.3f}",
                f"{row['collective_bytes'] / 1e6:.2f}",
                f"{bound_speed(program.slices, row):.0f}",
                f"{row['compile_seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    if missing:
        names = (f"{p.variant} {p.slices} {p.batch or 'evaluation'}" for p in missing)
        lines += ["", f"Not compiled at this commit: {'; '.join(names)}."]
    return "\n".join(lines)


def bound_speed(slices: str, row: Row) -> float:
    """Images a second of a chip that its memory and its arithmetic allow, whichever takes longer."""
    bytes_a_second, operations_a_second = CHIPS[slices.partition(":")[0]]
    seconds = max(row["moved_bytes"] / bytes_a_second, row["operations"] / operations_a_second)
    return float(row["images"] / seconds)


def find_commit() -> str:
    """The last commit that changed the package.

    Raises:
        UserError: the package differs from it.
    """
    run = ["git", "-C", str(ROOT)]
    changed = subprocess.run(
        [*run, "status", "--porcelain", "topformer_jax"], capture_output=True, text=True, check=True
    ).stdout
    if changed:
        raise UserError(
            f"the table is of a commit, but the package has changes: commit them first\n{changed}"
        )
    last = [*run, "log", "-1", "--format=%h", "--", "topformer_jax"]
    return subprocess.run(last, capture_output=True, text=True, check=True).stdout.strip()


def _replace_block(path: pathlib.Path, block: str) -> None:
    """Writes the block between its two markers.

    Raises:
        UserError: the file does not have the two markers.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no lines {BEGIN} and {END} to write the table between")
    path.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}")
