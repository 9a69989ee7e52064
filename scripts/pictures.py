"""Draws the pictures of docs/method.md and docs/choosing.md as SVG, by the package's functions.

    python scripts/pictures.py docs/pictures

Writes rearrangement.svg, spectra.svg, forms.svg and place.svg. Equal code draws equal bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kpsvd_tune.linalg import FORMS, KroneckerShape, kpsvd, kron_sum, num_trained, rearrange
from kpsvd_tune.linalg.cutoff import elbow_count

INK, QUIET, TRAINED, FROZEN = "#2b2f36", "#6b7280", "#e8853a", "#c9ced6"
# Of the blocks of a weight, row by row.
COLOURS = ["#7aa6d9", "#e8a15c", "#8fbf7f", "#d98a9e", "#b49ad6", "#d9c25c"]
WIDTH = 840


class Drawing:
    """An SVG that grows by shapes and texts."""

    def __init__(self, height: int, title: str) -> None:
        """Begin with a white ground and the title that screen readers say."""
        self.height = height
        self.parts = [
            f"<title>{title}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A filled rectangle with an outline."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{INK}" stroke-width="1"/>'
        )

    def text(self, x: float, y: float, words: str, size: int = 14, anchor: str = "start",
             weight: str = "normal", fill: str = INK) -> None:  # fmt: skip
        """A line of text whose baseline begins, or is centred, at x, y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}" fill="{fill}">{words}</text>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False
    ) -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        """A round mark."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" font-family="DejaVu Sans, Arial, sans-serif">'
        )
        return "\n".join([head, *self.parts, "</svg>\n"])


def rearrangement() -> str:
    """A weight of numbered entries, and where each goes."""
    shape = KroneckerShape(2, 3, 2, 2)
    rows, columns = shape.out_features, shape.in_features
    entries = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    drawing = Drawing(390, "The rearrangement: each block of W becomes a row of R(W)")
    size = 44

    def cell(x: float, y: float, entry: int) -> None:
        row, column = divmod(entry, columns)
        block = row // shape.p * shape.n + column // shape.q
        drawing.box(x, y, size, size, COLOURS[block])
        drawing.text(x + size / 2, y + size / 2 + 5, f"{row + 1},{column + 1}", 13, "middle")

    for row in range(rows):
        for column in range(columns):
            cell(60 + column * size, 90 + row * size, int(entries[row, column]))
    for row, line in enumerate(rearrange(entries, shape).tolist()):
        for column, entry in enumerate(line):
            cell(560 + column * size, 50 + row * size, int(entry))
    drawing.text(60, 75, "W: 4 × 6, in 2 × 3 blocks of 2 × 2", 14, weight="bold")
    drawing.text(560, 35, "R(W): a row for each block", 14, weight="bold")
    drawing.text(440, 185, "→", 40, "middle")
    drawing.text(
        60, 350, "If all blocks are multiples of one matrix B, W = A ⊗ B, and all rows of R(W) are"
    )
    drawing.text(
        60,
        372,
        "multiples of one row: R(W) has rank one. So the SVD of R(W) finds Kronecker products.",
    )
    return drawing.svg()


def planted(shape: KroneckerShape, strengths: Sequence[float]) -> torch.Tensor:
    """A weight of noise with one Kronecker product for each strength."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator)
    for strength in strengths:
        left = torch.randn(1, shape.m, shape.n, generator=generator)
        right = torch.randn(1, shape.p, shape.q, generator=generator)
        weight += strength * kron_sum(left, right)
    return weight


def spectra() -> str:
    """Two spectra: Kronecker structure in noise, and noise alone."""
    shape, num_terms = KroneckerShape(16, 16, 16, 16), 32
    drawing = Drawing(
        380, "Spectra: with structure a curve has an elbow, noise has none to speak of"
    )
    left, bottom, wide, high = 70, 320, 720, 250
    curves = {
        "six Kronecker products in noise": (
            planted(shape, [0.5, 0.4, 0.32, 0.26, 0.2, 0.16]),
            TRAINED,
        ),
        "noise alone": (planted(shape, []), QUIET),
    }
    found = {
        name: (kpsvd(weight, shape, num_terms).values.tolist(), colour)
        for name, (weight, colour) in curves.items()
    }
    top = max(values[0] for values, _ in found.values())

    def at(term: int, value: float) -> tuple[float, float]:
        return left + wide * term / (num_terms - 1), bottom - high * value / top

    drawing.line([at(0, top), at(0, 0), at(num_terms - 1, 0)], INK)
    drawing.text(left, 40, "singular values σₖ of R(W), the largest first", 14, weight="bold")
    drawing.text(left + wide, bottom + 24, "term k", 13, "end", fill=QUIET)
    for number, (name, (values, colour)) in enumerate(found.items()):
        drawing.line([at(term, value) for term, value in enumerate(values)], colour)
        drawing.text(left + wide, 70 + 22 * number, name, 14, "end", "bold", colour)
    values, colour = next(iter(found.values()))
    drawing.line([at(0, values[0]), at(num_terms - 1, values[-1])], colour, dashed=True)
    count, _ = elbow_count(values)
    x, y = at(count - 1, values[count - 1])
    drawing.dot(x, y, INK)
    drawing.text(
        x + 12, y - 12, f"elbow: {count} terms are kept, the point farthest below the chord"
    )
    drawing.text(
        left,
        bottom + 48,
        "Spectra of real weights lie between the two, nearer to the noise.",
        13,
        fill=QUIET,
    )
    return drawing.svg()


_FORM_WORDS = {
    "both": ("both factors are trained, as offsets from the weight's own terms", "r (mn + pq)"),
    "left": ("the left factor is trained, spread by a frozen right one", "r mn"),
    "right": ("the right factor is trained, repeated by a frozen left one", "r pq"),
    "core": ("r × r numbers between frozen factors are trained", "r²"),
}


def forms() -> str:
    """The forms of an adapter: what is trained, what is frozen, and how much in an example."""
    shape, rank = KroneckerShape(24, 24, 24, 24), 4
    drawing = Drawing(
        140 * len(FORMS), "The forms of an adapter; trained parts orange, frozen grey"
    )
    for number, form in enumerate(FORMS):
        y = 140 * number
        words, size = _FORM_WORDS[form]
        trained = num_trained(form, shape, rank)
        drawing.text(20, y + 44, form, 18, weight="bold")
        drawing.text(20, y + 68, words, 13)
        drawing.text(
            20, y + 90, f"trained: {size}; of a 576 × 576 weight with r = {rank}: {trained:,}", 13
        )
        drawing.box(480, y + 24, 84, 84, FROZEN)
        drawing.text(522, y + 72, "W", 15, "middle")
        drawing.text(584, y + 74, "+", 22, "middle")
        drawing.text(618, y + 74, "Σ", 30, "middle")
        x = 645
        if form == "core":
            drawing.box(x, y + 52, 28, 28, TRAINED)
            drawing.text(x + 14, y + 71, "c", 15, "middle")
            x += 36
        drawing.box(x, y + 38, 56, 56, TRAINED if form in {"both", "left"} else FROZEN)
        drawing.text(
            x + 28, y + 71, "a" if form == "left" else "A" if form == "both" else "U", 15, "middle"
        )
        drawing.text(x + 74, y + 73, "⊗", 22, "middle")
        drawing.box(x + 92, y + 44, 44, 44, TRAINED if form in {"both", "right"} else FROZEN)
        drawing.text(
            x + 114,
            y + 71,
            "b" if form == "right" else "B" if form == "both" else "V",
            15,
            "middle",
        )
    return drawing.svg()


def place() -> str:
    """Where in the weight one trained number of either factor acts."""
    shape = KroneckerShape(4, 4, 3, 3)
    drawing = Drawing(
        420, "Where a parameter sits: one entry of A moves a block, one of B a place in all blocks"
    )
    ones_left, ones_right = torch.ones(1, shape.m, shape.n), torch.ones(1, shape.p, shape.q)
    one_left, one_right = torch.zeros_like(ones_left), torch.zeros_like(ones_right)
    one_left[0, 1, 2] = one_right[0, 0, 1] = 1.0
    size = 22
    for x, name, words, left, right in (
        (70, "A", "one entry of A: one block, shaped as B", one_left, ones_right),
        (480, "B", "one entry of B: its place in every block", ones_left, one_right),
    ):
        drawing.text(x, 36, words, 14, weight="bold")
        factor = (left if name == "A" else right)[0]
        for row, line in enumerate(factor.tolist()):
            for column, value in enumerate(line):
                drawing.box(x + column * 18, 56 + row * 18, 18, 18, TRAINED if value else "#fff")
        drawing.text(x + 90, 95, f"{name}, {factor.shape[0]} × {factor.shape[1]}", 13, fill=QUIET)
        for row, line in enumerate(kron_sum(left, right).tolist()):
            for column, value in enumerate(line):
                shade = "#fff" if (row // shape.p + column // shape.q) % 2 else "#eef0f3"
                drawing.box(
                    x + column * size, 142 + row * size, size, size, TRAINED if value else shade
                )
    return drawing.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "rearrangement": rearrangement,
    "spectra": spectra,
    "forms": forms,
    "place": place,
}


def main() -> None:
    """Write every picture."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
