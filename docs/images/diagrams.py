"""Draws the diagrams of docs/: network.svg, batch.svg, canvases.svg and mesh.svg.

python docs/images/diagrams.py
"""

import html
import pathlib

FOLDER = pathlib.Path(__file__).parent
INK, HOST, DEVICE, ACCENT, PLAIN = "#333333", "#e8eef7", "#fdeedd", "#e06c00", "#f4f4f4"


class Diagram:
    """An SVG of boxes, arrows and text, in pixels."""

    def __init__(self, width: int, height: int, title: str):
        font = f"font-family='Helvetica, Arial, sans-serif' font-size='13' fill='{INK}'"
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {font}>",
            f"<title>{html.escape(title)}</title>",
            "<defs><marker id='tip' markerWidth='9' markerHeight='8' refX='8' refY='4' orient='auto'>"
            f"<path d='M0 0 L9 4 L0 8 z' fill='{INK}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' fill='white'/>",
        ]

    def text(self, x: float, y: float, text: str, *, style: str = "text-anchor='middle'") -> None:
        self.parts.append(f"<text x='{x}' y='{y}' {style}>{html.escape(text)}</text>")

    def box(self, place: tuple[float, ...], text: str = "", fill: str = PLAIN, line: str = INK) -> None:
        """A box at (x, y, width, height) with lines of text in its middle."""
        x, y, width, height = place
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='{fill}' stroke='{line}'/>"
        )
        lines = text.split("\n")
        for row, part in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 5 + 17 * (row - (len(lines) - 1) / 2), part)

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f"<path d='M{path}' fill='none' stroke='{INK}' marker-end='url(#tip)'/>")

    def write(self, name: str) -> None:
        (FOLDER / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def draw_network() -> None:
    """The paper's figure: token pyramid, pooling, transformer, injections, head."""
    d = Diagram(860, 440, "TopFormer: token pyramid, transformer, semantics injection, head")
    d.box((15, 40, 80, 50), "image\nh x w x 3")
    d.arrow((95, 65), (123, 65))
    for row, (stride, height) in enumerate(((4, 70), (8, 60), (16, 50), (32, 42))):
        y = 30 + row * 85
        d.box((125, y, 120, height), f"tokens\nstride {stride}", HOST)
        if row:
            d.arrow((185, y - 85 + (80, 70, 60, 50)[row - 1] - 10), (185, y))
        d.arrow((245, y + height / 2), (275, y + height / 2), (275, 385), (298, 385))
        if row:
            d.arrow((245, y + height / 2), (558, y + height / 2))
            d.box((560, y, 130, height), "injection", DEVICE)
    d.box((300, 362, 90, 46), "pool to\nstride 64", HOST)
    d.arrow((390, 385), (408, 385))
    d.box((410, 362, 110, 46), "transformer\n4 blocks", DEVICE)
    for y in (155, 235, 315):
        d.arrow((520, 385), (538, 385), (538, y + 10), (558, y + 10))
    d.text(560, 100, "semantics gate and shift the tokens", style=f"font-size='11' fill='{ACCENT}'")
    for y in (145, 225, 306):
        d.arrow((690, y), (720, y), (720, 225), (743, 225))
    d.box((745, 195, 100, 60), "sum, head:\nlogits\nstride 8", DEVICE)
    d.text(185, 20, "token pyramid (tpm)", style=f"text-anchor='middle' fill='{ACCENT}'")
    for x, name in ((415, "ppa and trans"), (625, "SIM"), (795, "decode_head")):
        d.text(x, 430, name, style=f"text-anchor='middle' fill='{ACCENT}'")
    d.write("network.svg")


def draw_batch() -> None:
    """The way of a training batch."""
    d = Diagram(860, 250, "The way of a training batch from the files to the update")
    d.text(15, 25, "host: worker processes", style=f"fill='{ACCENT}'")
    d.text(15, 225, "devices: one compiled step", style=f"fill='{ACCENT}'")
    host = "files or\narray_record|decode|resize, crop\n(seed, example)|batch\nuint8|copy ahead\nonto the mesh"
    device = "flip, colours,\nnormalise|network|loss in tiles\nof the logits|gradients:\nsum over devices|AdamW,\nEMA"
    for row, (texts, fill) in enumerate(((host, HOST), (device, DEVICE))):
        for column, text in enumerate(texts.split("|")):
            x, y = 15 + column * 170, 40 + row * 115
            d.box((x, y, 130, 55), text, fill)
            if column:
                d.arrow((x - 40, y + 27), (x - 2, y + 27))
    d.arrow((760, 95), (760, 122), (80, 122), (80, 153))
    d.text(845, 235, "the host fetches losses on log steps only", style="text-anchor='end' font-size='11'")
    d.write("batch.svg")


def draw_canvases() -> None:
    """Images of many sizes on four input shapes."""
    d = Diagram(860, 225, "An evaluation places images of all sizes on at most four canvases")
    d.text(15, 25, "resized images of many sizes", style=f"fill='{ACCENT}'")
    d.text(330, 25, "at most four canvases: one compiled network each", style=f"fill='{ACCENT}'")
    sizes = ((70, 52), (76, 52), (52, 78), (110, 52), (60, 52), (52, 70))
    for number, (width, height) in enumerate(sizes):
        d.box((15 + number % 3 * 95, 45 + number // 3 * 95, width * 0.75, height * 0.95), fill=HOST)
    d.arrow((285, 120), (325, 120))
    canvases = ((80, 56, 76, 52), (120, 56, 110, 52), (56, 82, 52, 78), (84, 84, 60, 52))
    for number, (width, height, inner, tall) in enumerate(canvases):
        x = 330 + number * 130
        d.box((x, 50, width, height * 1.3), fill=PLAIN, line="#999999")
        d.box((x, 50, inner, tall * 1.3), fill=HOST)
        d.text(x, 180, f"canvas {number + 1}", style="font-size='11'")
    note = "grey: padding, masked in every layer; the logits are those of the image alone, up to rounding"
    d.text(330, 210, note, style="font-size='12'")
    d.write("canvases.svg")


def draw_mesh() -> None:
    """Two slices of hosts and chips, with the axes of the mesh."""
    d = Diagram(860, 300, "The mesh of a pod: slices, hosts, chips")
    for slice_number in range(2):
        x = 15 + slice_number * 450
        d.box((x, 30, 380, 200), fill="#fafafa")
        d.text(x + 190, 22, f"slice {slice_number}", style=f"text-anchor='middle' fill='{ACCENT}'")
        for host in range(2):
            top = 45 + host * 92
            d.box((x + 12, top, 90, 80), f"host {2 * slice_number + host}\nreads its\nimages", HOST)
            for chip in range(4):
                d.box((x + 125 + chip * 62, top + 15, 50, 50), "chip", DEVICE)
            d.arrow((x + 102, top + 40), (x + 123, top + 40))
    d.arrow((397, 115), (463, 115))
    d.arrow((463, 145), (397, 145))
    d.text(430, 165, "sums", style="text-anchor='middle' font-size='12'")
    d.text(
        15,
        258,
        "axis data: each chip has its own images; gradients and BatchNorm statistics are summed",
        style="",
    )
    d.text(15, 280, "axis fsdp: chips of a slice that share parameters and optimizer state (mesh.fsdp)", style="")
    d.write("mesh.svg")


if __name__ == "__main__":
    for draw in (draw_network, draw_batch, draw_canvases, draw_mesh):
        draw()
