"""Figures of docs/csa2.md: DeepSeek-V4.1's shared entries and the formats of its caches."""

from figures.svg import SMALL, Figure

SOURCES = (2, 8, 14, 20)
SELECTS = (24, 28, 32, 36)


def csa2_sharing(f: Figure) -> None:
    """The forty blocks of DeepSeek-V4.1-Flash by what each of them makes for the others."""
    f.alt = f.say(
        "The forty blocks of DeepSeek-V4.1-Flash. Blocks 0 and 1 have a window alone. Blocks 2, 8, "
        "14 and 20 are sources: they compress tokens to entries and select. Blocks 24, 28, 32 and "
        "36 select anew among the entries of block 20. All others use what was made last.",
        "DeepSeek-V4.1-Flash 的四十个块。块 0、1 只有窗口。块 2、8、14、20 是源：把词元压缩成条"
        "目并做选择。块 24、28、32、36 在块 20 的条目中重新选择。"
        "其余的块都用最近一次做好的。",
    )
    f.text(
        10,
        4,
        f.say("blocks 0 to 39, from left to right", "块 0 至 39，自左向右"),
        anchor="start",
        size=SMALL,
        kind="soft",
    )

    def kind(row: int, column: int) -> str:
        block = row * 10 + column
        if block in SOURCES:
            return "state"
        if block in SELECTS:
            return "chosen"
        return "empty" if block < 2 else "plain"

    blocks = [[str(row * 10 + column) for column in range(10)] for row in range(4)]
    grid = f.cells(10, 24, blocks, size=36, height=28, kind=kind)
    legend = (
        (
            "state",
            f.say(
                "source: makes entries (20: ratio 1, the others 2) and selects",
                "源：制作条目（20 的比率为 1，其余为 2），并选择",
            ),
        ),
        (
            "chosen",
            f.say("selects anew, inside the coarse blocks of 20", "在 20 选出的粗块之内重新选择"),
        ),
        (
            "plain",
            f.say("uses the last entries and the last selection", "沿用最近的条目与最近的选择"),
        ),
        ("empty", f.say("a window alone", "只有窗口")),
    )
    y = grid.bottom + 12
    for name, words in legend:
        mark = f.box(10, y, 16, height=16, kind=name)
        text = f.text(mark.right + 7, y, words, anchor="start", size=SMALL, width=340)
        y = max(mark.bottom, text.bottom) + 7


def cache_levels(f: Figure) -> None:
    """The eight magnitudes of e2m1, and where numbers between them go."""
    f.alt = f.say(
        "A line from 0 to 6 with the magnitudes that four bits can store: 0, 0.5, 1, 1.5, 2, 3, 4 "
        "and 6. 1.25 lies in the middle of 1 and 1.5 and goes to 1, whose code is even; 5 goes t"
        "o 4.",
        "从 0 到 6 的数轴，标出四个比特能存的大小：0、0.5、1、1.5、2、3、4、6。1.25 恰在 1 与 1."
        "5 中间，取编码为偶数的 1；5 取 4。",
    )
    levels = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    left, unit, y = 20.0, 56.0, 74.0
    f.line((left, y), (left + 6 * unit, y))
    for code, level in enumerate(levels):
        x = left + level * unit
        f.line((x, y - 5), (x, y + 5))
        f.text(x, y + 8, f"{level:g}", size=SMALL)
        f.text(x, y + 24, f"{code:03b}", size=SMALL, kind="soft")
    for value, target in ((1.25, 1.0), (5.0, 4.0)):
        x = left + value * unit
        f.text(x, y - 52, f"{value:g}", size=SMALL)
        f.connect(
            (x, y - 34),
            (x, y - 22),
            (left + target * unit, y - 22),
            (left + target * unit, y - 6),
            kind="chosen",
        )
    f.text(
        left,
        y + 44,
        f.say("magnitude, and its code", "大小及其编码"),
        anchor="start",
        size=SMALL,
        kind="soft",
    )
