"""Figures of docs/hyper.md: hyper-connections."""

import math

from figures.svg import SMALL, Figure


def hyper_site(f: Figure) -> None:
    """One site: what is read, what is written, how the streams mix."""
    f.alt = f.say(
        "Four residual streams. Their weighted sum by pre goes through the sublayer; its output, "
        "weighted by post, is added to every stream, while the streams mix by the doubly "
        "stochastic "
        "matrix comb. All three come from one projection of the normed streams.",
        "四条残差流。按 pre 加权求和后进入子层，子层的输出按 post 加权加回各流，"
        "同时各流按双随机矩阵 comb 混合。"
        "三者都由归一化后的各流经一次投影得到。",
    )
    xs = (20.0, 72.0, 124.0, 176.0)
    streams = [f.box(x, 14, 40, f"x_{{{i + 1}}}", kind="state") for i, x in enumerate(xs)]
    m = f.box(
        240,
        9,
        126,
        f.say("m = fn · norm of all streams", "m = fn ·\n归一化后的各流"),
        kind="learned",
        size=SMALL,
    )
    every = f.frame(streams, padding=6)
    f.connect(every.east(), (m.x, every.cy))
    words = (
        f.say("pre: what is read", "pre：读多少"),
        f.say("post: what is written", "post：写多少"),
        f.say("comb: how they mix", "comb：如何混合"),
    )
    coefficients = []
    y = m.bottom + 18
    for word in words:
        box = f.box(244, y, 118, word, size=SMALL, kind="learned", height=34)
        coefficients.append(box)
        y = box.bottom + 74 if word == words[0] else box.bottom + 8
    f.connect((m.cx, m.bottom), coefficients[0].north())
    for box in coefficients[1:]:
        # Beside the coefficients before it.
        side = m.right + 4
        f.connect(m.east(), (side, m.cy), (side, box.cy), box.east())
    read = f.box(20, coefficients[0].y + 2, 196, "u = Σ pre_{i} x_{i}", height=30)
    for stream in streams:
        f.connect((stream.cx, every.bottom), (stream.cx, read.y))
    f.connect(coefficients[0].west(), (read.right, coefficients[0].cy))
    layer = f.box(
        20,
        read.bottom + 24,
        196,
        f.say("norm and sublayer F", "归一化与子层 F"),
        kind="plain",
        height=40,
    )
    f.connect(read.south(), layer.north())
    write = f.box(
        20,
        coefficients[1].y,
        196,
        "x_{k} ← post_{k} F(u)\n+ Σ_{j} comb[j, k] x_{j}",
        height=coefficients[2].bottom - coefficients[1].y,
    )
    f.connect(layer.south(), write.north())
    for box in coefficients[1:]:
        f.connect(box.west(), (write.right, box.cy))
    outs = [
        f.box(x, write.bottom + 24, 40, f"x_{{{i + 1}}}", kind="state") for i, x in enumerate(xs)
    ]
    for out in outs:
        f.connect((out.cx, write.bottom), out.north())


def _normalised(matrix: list[list[float]], axis: int) -> list[list[float]]:
    """Divides every column (axis 0) or row (axis 1) by its sum."""
    if axis == 1:
        return [[value / sum(row) for value in row] for row in matrix]
    sums = [sum(column) for column in zip(*matrix, strict=True)]
    return [[value / total for value, total in zip(row, sums, strict=True)] for row in matrix]


def hyper_sinkhorn(f: Figure) -> None:
    """A matrix of 3 x 3 on its way to doubly stochastic."""
    f.alt = f.say(
        "Three matrices with the sums of their rows and columns. The exponentials of the logits "
        "have any sums; after the rows and then the columns are normalised, columns sum to 1 and "
        "rows nearly; after twenty rounds both do.",
        "三个矩阵及其行和与列和。logits 的指数之和是任意的；先按行、再按列归一化之后，列和为 1，"
        "行和接近 1；"
        "二十轮之后两者都是 1。",
    )
    logits = [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [-1.0, 1.0, 2.0]]
    matrix = [[math.exp(value) for value in row] for row in logits]
    captions = (
        f.say("exp of the logits", "logits 的指数"),
        f.say("rows, then columns, once", "先行后列，各一次"),
        f.say("twenty times", "二十次"),
    )
    y = 30.0
    for number, caption in enumerate(captions):
        if number:
            for _ in range(1 if number == 1 else 19):
                matrix = _normalised(_normalised(matrix, 1), 0)
        written = [[f"{value:.2f}" for value in row] for row in matrix]
        largest = max(max(row) for row in matrix)
        f.text(8, y + 38, caption, anchor="start", size=12, width=120)
        grid = f.cells(
            140,
            y,
            [[value / largest for value in row] for row in matrix],
            size=44,
            height=30,
        )
        for i, row in enumerate(written):
            for j, text in enumerate(row):
                f.text(grid.x + (j + 0.5) * 44, y + i * 30 + 7, text, size=12)
            total = sum(matrix[i])
            f.text(
                grid.right + 8,
                y + i * 30 + 8,
                f"= {total:.2f}",
                anchor="start",
                size=SMALL,
                kind="soft",
            )
        for j in range(3):
            total = sum(row[j] for row in matrix)
            f.text(
                grid.x + (j + 0.5) * 44, grid.bottom + 3, f"{total:.2f}", size=SMALL, kind="soft"
            )
        y = grid.bottom + 44
    f.text(
        grid.right + 8, 10, f.say("sum of the row", "行和"), anchor="start", size=SMALL, kind="soft"
    )
    f.text(
        130,
        grid.bottom + 3,
        f.say("sum of the column", "列和"),
        anchor="end",
        size=SMALL,
        kind="soft",
    )
