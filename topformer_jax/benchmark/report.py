"""What a measurement tells: a table, JSON, a chart."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

from topformer_jax import cli, files

Row = dict[str, Any]


def _milliseconds(seconds: dict[str, float]) -> str:
    low, middle, high = (1000 * seconds[name] for name in ("low", "median", "high"))
    places = 1 if middle >= 1 else 3
    return f"{middle:.{places}f} ({low:.{places}f}-{high:.{places}f})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


# The columns of a table after its first: a row's key, the heading, and how the value is written.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("seconds", "ms, median (range)", _milliseconds),
    ("images_per_second", "images/s", "{:.1f}".format),
    ("images_per_second_per_core", "a core", "{:.1f}".format),
    ("ours_faster", "ours faster", "{:.2f}x".format),
    ("share_of_step", "of the step's rate", "{:.0%}".format),
    ("data_wait", "waits for data", "{:.0%}".format),
    ("first_seconds", "first call s", "{:.2f}".format),
    ("arguments_bytes", "arguments MB", _megabytes),
    ("memory_bytes", "memory MB", _megabytes),
    ("temporary_bytes", "temporary MB", _megabytes),
    ("share_of_peak", "of peak", "{:.1%}".format),
    ("share_of_bandwidth", "of bandwidth", "{:.1%}".format),
    ("operations", "GFLOP", lambda count: f"{count / 1e9:.1f}"),
    ("accessed_bytes", "accessed GB", lambda count: f"{count / 1e9:.2f}"),
    ("moved_bytes", "moved GB", lambda count: f"{count / 1e9:.2f}"),
    ("memory_seconds", "memory ms", lambda seconds: f"{1000 * seconds:.2f}"),
    ("sent_bytes", "sent MB", _megabytes),
    ("compile_seconds", "compile s", "{:.0f}".format),
)
# What a chart shows: the first of these that there is.
BARS = {
    "images_per_second": ("images/s", 1.0),
    "seconds": ("ms", 1000.0),
    "temporary_bytes": ("temporary MB", 1e-6),
}


@dataclasses.dataclass
class Report:
    """What one measurement found.

    `rows` are ready for JSON: `case` and `program`, and any of the keys of `COLUMNS` (None: unknown). `facts` are
    what holds for all of them, `notes` are sentences on how to read them.
    """

    title: str
    facts: dict[str, Any]
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """Title, facts, table and notes, a line each."""
        shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in self.rows)]
        widest = max((len(row["case"]) for row in self.rows), default=0)
        lines: list[tuple[str, ...]] = [("", *(heading for _, heading, _ in shown))]
        for row in self.rows:
            cells = ("-" if row.get(key) is None else write(row[key]) for key, _, write in shown)
            lines.append((f"{row['case']:<{widest}}  {row['program']}".rstrip(), *cells))
        facts = ", ".join(
            f"{name} {_short(value)}" for name, value in self.facts.items() if value is not None
        )
        return "\n".join(filter(None, [self.title, facts, cli.table(lines), *self.notes]))

    def write_json(self, path: pathlib.Path) -> None:
        """Writes everything, at full precision."""
        files.write_file(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def write_chart(self, path: pathlib.Path) -> None:
        """Draws a bar a row: images a second, else milliseconds, else memory; the line over it is the range."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        key = next((key for key in BARS if any(row.get(key) is not None for row in self.rows)), "seconds")
        unit, factor = BARS[key]
        rows = [row for row in self.rows if row.get(key) is not None]
        names = list(dict.fromkeys(row["program"] for row in rows))
        figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, row in enumerate(rows):
            value, *ends = (factor * number for number in _values(row, key))
            colour = f"C{names.index(row['program']) % 10}"
            axes.barh(place, value, color=colour, height=0.7)
            if ends:
                axes.plot(ends, [place, place], color="black", linewidth=1)
            axes.text(max(value, *ends, value), place, f" {value:.4g}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [f"{row['case']}  {row['program']}".strip() for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.set_title(self.title, fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, format="png")
        files.write_file(path, picture.getvalue())


def _values(row: Row, key: str) -> list[float]:
    """A bar's length, and the two ends of its range where there is one."""
    seconds = row.get("seconds")
    if key == "seconds":
        return [row[key][name] for name in ("median", "low", "high")]
    if key == "images_per_second" and seconds:
        return [row[key], *(row[key] * seconds["median"] / seconds[name] for name in ("high", "low"))]
    return [float(row[key])]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
