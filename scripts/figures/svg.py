"""Draws a figure as SVG: boxes, lines with and without heads, brackets, cells and text that fits.

A figure is 380 units wide, the column of a telephone of 420 pixels, and as high as what is drawn.
Lengths are in these units, x grows to the right and y down. Every width of a text is computed from
the widths of DejaVu Sans, the widest of the usual fonts, so that a text that fits here fits
everywhere. `Figure.problems` says what overlaps or sticks out.

In a text `x_{i}` is a subscript, `x^{2}` a superscript, and a line break begins a new line. Colours
are CSS variables, which follow the light or dark scheme of whoever looks; scripts/build_site.py
puts a figure into the page and lets it follow the switch of the site.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from xml.sax.saxutils import escape

Point = tuple[float, float]

WIDTH = 380.0
# How much larger than its units a figure is shown on a wide screen.
SCALE = 1.25
MARGIN = 6.0
SIZE = 13.0
# No text is smaller, but for its subscripts.
SMALL = 11.0
LINE_HEIGHT = 1.3
SCRIPT_SIZE = 0.78
PADDING = 5.0
HEAD = 6.0

# Widths of DejaVu Sans in thousandths of the size.
_WIDTHS = {
    280: "'ijl",
    300: "IJ",
    330: " ,.·⟨⟩",
    350: "/:;|f",
    400: "-()[]t!²′",
    420: "r",
    510: '"*_`–',
    560: "szc?L",
    600: "Fkvxy",
    640: "TYaoeESPbdghnpqu$0123456789{}σγλθπρταβΣ√",
    700: "ABVKRXZC",
    760: "UHNDG",
    800: "&OQw",
    880: "#+<=>^~M×→←↑↓≤≥∈−⊕⊙∞≈",
    1000: "%mW@…½",
}
LETTERS = {letter: width / 1000 for width, letters in _WIDTHS.items() for letter in letters}
# Bold letters are wider.
STRONG = 1.1

LIGHT = {
    "ink": "#1f2328",
    "soft": "#57606a",
    "line": "#57606a",
    "plain": "#f6f8fa",
    "plain-edge": "#8c959f",
    "learned": "#ddf4ff",
    "learned-edge": "#0969da",
    "state": "#dafbe1",
    "state-edge": "#1a7f37",
    "memory": "#fff1e5",
    "memory-edge": "#bc4c00",
    "chosen": "#fbefff",
    "chosen-edge": "#8250df",
    "heat": "#0969da",
}
DARK = {
    "ink": "#e6edf3",
    "soft": "#9da7b1",
    "line": "#9da7b1",
    "plain": "#262c36",
    "plain-edge": "#768390",
    "learned": "#12304f",
    "learned-edge": "#4493f8",
    "state": "#12361f",
    "state-edge": "#3fb950",
    "memory": "#3d2310",
    "memory-edge": "#db6d28",
    "chosen": "#2e1f4d",
    "chosen-edge": "#a371f7",
    "heat": "#4493f8",
}
# What a box holds: anything, parameters, what a cache or a state keeps, rows of a memory, what is
# chosen; and a box without a fill.
KINDS = ("plain", "learned", "state", "memory", "chosen", "empty")
# How the files of figures begin.
START = '<svg xmlns="http://www.w3.org/2000/svg" class="figure"'
FONT = (
    'system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", '
    '"Noto Sans CJK SC", sans-serif'
)


def style() -> str:
    """Returns the CSS of a figure; its dark colours are one @media rule."""
    light = " ".join(f"--{name}: {value};" for name, value in LIGHT.items())
    dark = " ".join(f"--{name}: {value};" for name, value in DARK.items())
    rules = [
        f".figure {{ {light} }}",
        f"@media (prefers-color-scheme: dark) {{ .figure {{ {dark} }} }}",
        f".figure text {{ fill: var(--ink); font-family: {FONT}; }}",
        ".figure .soft { fill: var(--soft); }",
        ".figure .strong { font-weight: 600; }",
        ".figure polyline { fill: none; stroke: var(--line); stroke-width: 1.4; }",
        ".figure polygon { fill: var(--line); }",
        ".figure .dashed { stroke-dasharray: 4 3; }",
        ".figure .empty { fill: none; stroke: var(--plain-edge); }",
        ".figure .heat { fill: var(--heat); }",
    ]
    for kind in KINDS[:-1]:
        rules.append(f".figure .{kind} {{ fill: var(--{kind}); stroke: var(--{kind}-edge); }}")
        rules.append(f".figure polyline.{kind} {{ fill: none; }}")
        head = f"fill: var(--{kind}-edge); stroke: none;"
        rules.append(f".figure polygon.{kind} {{ {head} }}")
    return "\n".join(rules)


@dataclass(frozen=True)
class Box:
    """A rectangle of the figure, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def cx(self) -> float:
        return self.x + self.width / 2

    @property
    def cy(self) -> float:
        return self.y + self.height / 2

    def north(self, share: float = 0.5) -> Point:
        """Returns the point of the upper edge at a share of it, from the left."""
        return (self.x + share * self.width, self.y)

    def south(self, share: float = 0.5) -> Point:
        """Returns the point of the lower edge at a share of it, from the left."""
        return (self.x + share * self.width, self.bottom)

    def west(self, share: float = 0.5) -> Point:
        """Returns the point of the left edge at a share of it, from above."""
        return (self.x, self.y + share * self.height)

    def east(self, share: float = 0.5) -> Point:
        """Returns the point of the right edge at a share of it, from above."""
        return (self.right, self.y + share * self.height)

    def padded(self, by: float) -> "Box":
        """Returns the rectangle with its edges moved outwards."""
        return Box(self.x - by, self.y - by, self.width + 2 * by, self.height + 2 * by)

    def overlaps(self, other: "Box") -> bool:
        """Returns whether the interiors of two rectangles meet."""
        across = min(self.right, other.right) - max(self.x, other.x)
        down = min(self.bottom, other.bottom) - max(self.y, other.y)
        return across > 0.01 and down > 0.01

    def contains(self, other: "Box") -> bool:
        """Returns whether another rectangle lies inside, edges included."""
        return (
            self.x <= other.x + 0.01
            and self.y <= other.y + 0.01
            and self.right >= other.right - 0.01
            and self.bottom >= other.bottom - 0.01
        )

    def crossed(self, start: Point, end: Point) -> bool:
        """Returns whether a straight line passes through the interior."""
        low, high = 0.0, 1.0
        delta = (end[0] - start[0], end[1] - start[1])
        inner = self.padded(-0.5)
        edges = ((inner.x, inner.right), (inner.y, inner.bottom))
        # Cuts the line at both pairs of edges, and looks whether something is left of it.
        for axis, (first, last) in enumerate(edges):
            if abs(delta[axis]) < 1e-9:
                if not first < start[axis] < last:
                    return False
                continue
            ends = ((first - start[axis]) / delta[axis], (last - start[axis]) / delta[axis])
            low = max(low, min(ends))
            high = min(high, max(ends))
        return low < high


def around(boxes: Sequence[Box]) -> Box:
    """Returns the smallest rectangle that contains all of several."""
    x = min(box.x for box in boxes)
    y = min(box.y for box in boxes)
    right = max(box.right for box in boxes)
    bottom = max(box.bottom for box in boxes)
    return Box(x, y, right - x, bottom - y)


SCRIPT = re.compile(r"([_^])\{([^}]*)\}")


def pieces(line: str) -> Iterator[tuple[str, str]]:
    """Yields (sign, text) of a line: "_" for a subscript, "^" for a superscript, else ""."""
    start = 0
    for match in SCRIPT.finditer(line):
        if match.start() > start:
            yield "", line[start : match.start()]
        yield match[1], match[2]
        start = match.end()
    if start < len(line):
        yield "", line[start:]


def text_width(line: str, size: float = SIZE, kind: str = "ink") -> float:
    """Returns how wide a line of text is at most."""
    total = 0.0
    for sign, text in pieces(line):
        width = sum(LETTERS.get(letter, 1.0) for letter in text)
        total += width * (SCRIPT_SIZE if sign else 1.0)
    return total * size * (STRONG if kind == "strong" else 1.0)


# A Chinese character with the punctuation behind it, or letters up to a space or such a character.
_HAN = r"\u3000-\u9fff\uff00-\uffef"
WORD = re.compile(rf" *(?:[{_HAN}][，。、；：）]*|[^\s{_HAN}]+[，。、；：）]*)")


def wrapped(text: str, width: float, size: float = SIZE, kind: str = "ink") -> list[str]:
    """Returns the lines of a text that is at most so wide.

    It breaks at spaces and between Chinese characters. Raises ValueError for a word that is wider.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in WORD.findall(paragraph):
            if line and text_width(line + word, size, kind) > width:
                lines.append(line)
                line = ""
            line += word if line else word.lstrip()
            if text_width(line, size, kind) > width + 0.01:
                raise ValueError(
                    f"got {line!r}, {text_width(line, size, kind):.0f} wide, expected at most "
                    f"{width:.0f}: shorten it or widen its box"
                )
        lines.append(line)
    return lines


class Figure:
    """A figure in one language, drawn by calls; `svg` returns it."""

    def __init__(self, language: str = "en") -> None:
        self.language = language
        # What the figure shows, in a sentence or two, for whoever cannot see it.
        self.alt = ""
        self.texts: list[tuple[Box, str]] = []
        self.solids: list[Box] = []
        self.frames: list[Box] = []
        self.segments: list[tuple[Point, Point]] = []
        # What is drawn later covers what was drawn before.
        self._behind: list[str] = []
        self._lines: list[str] = []
        self._boxes: list[str] = []
        self._letters: list[str] = []

    def say(self, english: str, chinese: str) -> str:
        """Returns the text of the figure's language."""
        return chinese if self.language == "zh" else english

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "middle", size: float = SIZE,
        kind: str = "ink", width: float = WIDTH,
    ) -> Box:  # fmt: skip
        """Writes lines of text below y, and returns the rectangle they fill.

        anchor: what stands at x, "start", "middle" or "end". kind: "ink", "soft" or "strong".
        width: where longer lines are broken.
        """
        if size < SMALL:
            raise ValueError(f"got a text of size {size}, expected at least {SMALL}")
        lines = wrapped(words, width, size, kind)
        widest = max(text_width(line, size, kind) for line in lines)
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * widest
        box = Box(left, y, widest, len(lines) * size * LINE_HEIGHT)
        self.texts.append((box, words))
        for number, line in enumerate(lines):
            baseline = y + size * (number * LINE_HEIGHT + 1.0)
            self._letters.append(
                f'<text x="{x:.4g}" y="{baseline:.5g}" font-size="{size:.4g}" '
                f'text-anchor="{anchor}"{_class(kind, "ink")}>{_spans(line, size)}</text>'
            )
        return box

    def box(
        self, x: float, y: float, width: float, words: str = "", *, height: float | None = None,
        kind: str = "plain", size: float = SIZE, text_kind: str = "ink",
    ) -> Box:  # fmt: skip
        """Draws a box with text in its middle, and returns it; without a height the text gives it.

        kind: one of KINDS, which chooses the colour.
        """
        lines = wrapped(words, width - 2 * PADDING, size, text_kind) if words else []
        needed = len(lines) * size * LINE_HEIGHT + 2 * PADDING
        if height is None:
            height = needed
        elif words and height < needed - 2 * PADDING:
            raise ValueError(f"got {words!r} in a box {height} high, expected at least {needed}")
        box = Box(x, y, width, height)
        self.solids.append(box)
        self._boxes.append(_rectangle(box, kind, radius=4))
        if words:
            top = box.cy - len(lines) * size * LINE_HEIGHT / 2
            self.text(box.cx, top, "\n".join(lines), size=size, kind=text_kind)
        return box

    def circle(self, cx: float, cy: float, sign: str, *, radius: float = 10.0) -> Box:
        """Draws a sign in a circle, as + or ×, and returns the square around it."""
        box = Box(cx - radius, cy - radius, 2 * radius, 2 * radius)
        self.solids.append(box)
        self._boxes.append(f'<circle class="plain" cx="{cx:.5g}" cy="{cy:.5g}" r="{radius:.4g}"/>')
        self.text(cx, cy - SIZE * LINE_HEIGHT / 2, sign)
        return box

    def line(self, *points: Point, kind: str = "", dashed: bool = False) -> None:
        """Draws straight lines from point to point. kind: one of KINDS, for its colour."""
        self.segments += pairwise(points)
        path = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
        names = f"{kind} {'dashed' if dashed else ''}".strip()
        self._lines.append(f'<polyline{_class(names, "")} points="{path}"/>')

    def connect(self, *points: Point, kind: str = "", dashed: bool = False) -> None:
        """Draws lines from point to point, and a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        along = ((x - x0) / length, (y - y0) / length)
        base = (x - HEAD * along[0], y - HEAD * along[1])
        side = (HEAD / 2 * along[1], -HEAD / 2 * along[0])
        # The line ends inside of the head, whose tip is sharper than a line's end.
        self.line(*points[:-1], base, kind=kind, dashed=dashed)
        corners = (
            (x, y),
            (base[0] + side[0], base[1] + side[1]),
            (base[0] - side[0], base[1] - side[1]),
        )
        path = " ".join(f"{a:.5g},{b:.5g}" for a, b in corners)
        self._lines.append(f'<polygon{_class(kind, "")} points="{path}"/>')

    def frame(self, boxes: Sequence[Box], words: str = "", *, padding: float = 8.0) -> Box:
        """Draws a dashed frame around boxes, with a title above them, and returns it."""
        inner = around(boxes).padded(padding)
        # The title stands inside the frame, at its upper left corner.
        title = SMALL * LINE_HEIGHT + 2 if words else 0.0
        frame = Box(inner.x, inner.y - title, inner.width, inner.height + title)
        if words:
            self.text(
                frame.x + 5, frame.y + 3, words, anchor="start", size=SMALL, kind="soft",
                width=frame.width - 10,
            )  # fmt: skip
        self.frames.append(frame)
        self._behind.append(_rectangle(frame, "empty dashed", radius=6))
        return frame

    def bracket(self, box: Box, side: str, words: str = "", *, gap: float = 4.0) -> Box:
        """Draws a bracket along a side of a box, and returns the rectangle of its text.

        side: "left", "right", "above" or "below".
        """
        depth = 5.0
        sign = -1.0 if side in ("left", "above") else 1.0
        if side in ("left", "right"):
            inner = box.x - gap if side == "left" else box.right + gap
            outer = inner + sign * depth
            self.line((inner, box.y), (outer, box.y), (outer, box.bottom), (inner, box.bottom))
            lines = len(words.split("\n")) * SMALL * LINE_HEIGHT
            anchor = "end" if side == "left" else "start"
            return self.text(
                outer + sign * 4, box.cy - lines / 2, words, anchor=anchor, size=SMALL, kind="soft"
            )
        inner = box.y - gap if side == "above" else box.bottom + gap
        outer = inner + sign * depth
        self.line((box.x, inner), (box.x, outer), (box.right, outer), (box.right, inner))
        lines = len(words.split("\n")) * SMALL * LINE_HEIGHT
        top = outer - lines - 2 if side == "above" else outer + 2
        return self.text(box.cx, top, words, size=SMALL, kind="soft")

    def cells(
        self, x: float, y: float, values: Sequence[Sequence[float | str | None]], *,
        size: float = 22.0, height: float | None = None, rows: Sequence[str] = (),
        columns: Sequence[str] = (), show: Callable[[float], str] | None = None,
        kind: str | Callable[[int, int], str] = "empty", text_size: float = SMALL,
    ) -> Box:  # fmt: skip
        """Draws a matrix of cells whose upper left corner is (x, y), and returns the matrix.

        A number in [0, 1] colours its cell, and `show` writes it; a string is written; None leaves
        the cell empty. rows, columns: labels to the left and above. kind: the colour of cells, or a
        function of row and column that says it.
        """
        height = size if height is None else height
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                cell = Box(x + j * size, y + i * height, size, height)
                name = kind(i, j) if callable(kind) else kind
                self._boxes.append(_rectangle(cell, name))
                written = value if isinstance(value, str) else ""
                if isinstance(value, (int, float)):
                    # At most this opaque, so that the text upon it can be read.
                    self._boxes.append(_rectangle(cell, "heat", opacity=0.55 * float(value)))
                    written = show(value) if show is not None else ""
                if written:
                    wrapped(written, size, text_size)
                    self.text(
                        cell.cx, cell.cy - text_size * LINE_HEIGHT / 2, written, size=text_size
                    )
        matrix = Box(x, y, size * max(len(row) for row in values), height * len(values))
        self.solids.append(matrix)
        for i, label in enumerate(rows):
            middle = y + (i + 0.5) * height
            self.text(
                x - 5,
                middle - SMALL * LINE_HEIGHT / 2,
                label,
                anchor="end",
                size=SMALL,
                kind="soft",
            )
        for j, label in enumerate(columns):
            self.text(
                x + (j + 0.5) * size, y - SMALL * LINE_HEIGHT - 2, label, size=SMALL, kind="soft"
            )
        return matrix

    @property
    def height(self) -> float:
        """How high the figure is: what is drawn, and a margin."""
        ends = [box.bottom for box, _ in self.texts]
        ends += [box.bottom for box in (*self.solids, *self.frames)]
        ends += [y for segment in self.segments for _, y in segment]
        return max(ends) + MARGIN

    def problems(self) -> Iterator[str]:
        """Yields what a reader would stumble over: what overlaps, sticks out or is crossed."""
        if not self.alt:
            yield "no alt text"
        page = Box(0, 0, WIDTH, self.height)
        edges = (*self.solids, *self.frames)
        for box in (*(box for box, _ in self.texts), *edges):
            if not page.contains(box):
                yield f"{self._name(box)} sticks out of the page"
        for first, second in combinations(edges, 2):
            inside = first.contains(second) or second.contains(first)
            if first.overlaps(second) and not inside:
                yield f"{self._name(first)} and {self._name(second)} overlap"
        for box in self.solids:
            if any(box.crossed(*segment) for segment in self.segments):
                yield f"a line crosses {self._name(box)}"
        yield from self._problems_of_texts(edges)

    def _problems_of_texts(self, edges: Sequence[Box]) -> Iterator[str]:
        for (first, a), (second, b) in combinations(self.texts, 2):
            if first.overlaps(second):
                yield f"{a!r} overlaps {b!r}"
        for box, words in self.texts:
            for edge in edges:
                if box.overlaps(edge) and not edge.contains(box):
                    yield f"{words!r} crosses the edge of {self._name(edge)}"
            if any(box.crossed(*segment) for segment in self.segments):
                yield f"a line crosses {words!r}"

    def _name(self, box: Box) -> str:
        """Returns what a box says, or else where it stands."""
        words = " ".join(words for inner, words in self.texts if box.contains(inner))
        return repr(words) if words else f"the box at {box.x:.0f}, {box.y:.0f}"

    def svg(self) -> str:
        """Returns the figure as an SVG file."""
        height = self.height
        body = "\n".join((*self._behind, *self._lines, *self._boxes, *self._letters))
        return (
            f'{START} role="img" '
            f'aria-label="{escape(self.alt, {chr(34): "&quot;"})}" '
            f'viewBox="0 0 {WIDTH:g} {height:.4g}" '
            f'width="{WIDTH * SCALE:g}" height="{height * SCALE:.4g}">\n'
            f"<style>\n{style()}\n</style>\n{body}\n</svg>\n"
        )


def _class(name: str, usual: str) -> str:
    return "" if name == usual else f' class="{name}"'


def _rectangle(box: Box, name: str, *, radius: float = 0.0, opacity: float | None = None) -> str:
    round_corners = f' rx="{radius:g}"' if radius else ""
    opaque = "" if opacity is None else f' fill-opacity="{opacity:.3g}"'
    return (
        f'<rect class="{name}" x="{box.x:.5g}" y="{box.y:.5g}" width="{box.width:.5g}" '
        f'height="{box.height:.5g}"{round_corners}{opaque}/>'
    )


def _spans(line: str, size: float) -> str:
    """Returns a line with its subscripts and superscripts moved down and up."""
    result = ""
    moved = 0.0
    for sign, text in pieces(line):
        target = size * {"_": 0.22, "^": -0.36, "": 0.0}[sign]
        attributes = ""
        if target != moved:
            attributes += f' dy="{target - moved:.3g}"'
        if sign:
            attributes += f' font-size="{size * SCRIPT_SIZE:.3g}"'
        moved = target
        result += f"<tspan{attributes}>{escape(text)}</tspan>" if attributes else escape(text)
    return result
