"""Figures of docs/moe.md: DeepSeekMoE."""

from figures.svg import SMALL, Figure


def moe_layer(f: Figure) -> None:
    """One token through shared and routed experts."""
    f.alt = f.say(
        "A token goes to the shared expert and to a router. The router scores six experts, adds a "
        "bias to choose experts 2 and 5, and weighs their outputs by the scores. Their sum and the "
        "shared expert's output are the result.",
        "词元同时进入共享专家与路由。路由给六个专家打分，加上偏置后选出专家 2 与 5，"
        "再用分数给它们的输出加权。加权和与共享专家的输出相加即为结果。",
    )
    token = f.box(150, 6, 80, "u")
    f.text(
        token.right + 8, token.y + 4, f.say("one token", "一个词元"), anchor="start", kind="soft"
    )
    router = f.box(
        112, 56, 260, f.say("router: s = score(W u)", "路由：s = score(W u)"), kind="learned"
    )
    top = router.bottom + 24
    width = 34.0
    experts = []
    for i in range(6):
        kind = "chosen" if i in (1, 4) else "plain"
        experts.append(f.box(112 + i * 45.2, top, width, f"E_{{{i + 1}}}", kind=kind, height=32))
    shared = f.box(8, top, 84, f.say("shared", "共享专家"), kind="learned", height=32)
    f.connect(token.south(0.65), (token.x + 0.65 * token.width, router.y))
    f.connect(token.west(), (shared.cx, token.cy), shared.north())
    for i in (1, 4):
        f.connect((experts[i].cx, router.bottom), experts[i].north(), kind="chosen")
    choice = f.say("top K = 2 of s + b", "按 s + b 取前 K = 2 个")
    f.text((experts[1].cx + experts[4].cx) / 2, router.bottom + 4, choice, size=SMALL, kind="soft")
    weigh = [f.circle(experts[i].cx, top + 66, "×") for i in (1, 4)]
    for i, sign in zip((1, 4), weigh, strict=True):
        f.connect(experts[i].south(), sign.north(), kind="chosen")
        f.text(sign.right + 6, sign.y + 1, f"w_{{{i + 1}}}", anchor="start")
    plus = f.circle((experts[1].cx + experts[4].cx) / 2, top + 108, "+")
    for sign in weigh:
        f.line(sign.south(), (sign.cx, plus.cy))
    f.connect((weigh[0].cx, plus.cy), plus.west())
    f.connect((weigh[1].cx, plus.cy), plus.east())
    total = f.circle(plus.cx, plus.cy + 38, "+")
    f.connect(plus.south(), total.north())
    f.connect(shared.south(), (shared.cx, total.cy), total.west())
    out = f.box(total.cx - 40, total.bottom + 20, 80, "y")
    f.connect(total.south(), out.north())
    f.text(
        out.x - 10,
        out.y - 2,
        f.say("w_{i} = scale · s_{i} / Σ chosen s", "w_{i} = scale · s_{i} / 所选 s 之和"),
        anchor="end",
        size=SMALL,
        kind="soft",
    )


def moe_dispatch(f: Figure) -> None:
    """Slots sorted by expert, one product for all experts, and the way back."""
    f.alt = f.say(
        "Three tokens choose two experts each. Their six copies are sorted by expert into runs of "
        "two, three and one rows, each run is multiplied by its expert's matrix, and every token "
        "sums its two rows. A line between experts 1 and 2 shows where two devices would part.",
        "三个词元各选两个专家。六个副本按专家排序，成为 2、3、1 行的三段，每段乘以本专家的矩阵，"
        "然后每个词元把自己的两行相加。专家 1 与 2 之间的虚线是两台设备的分界。",
    )
    colours = ("learned", "state", "memory")
    choices = ((0, 1), (1, 2), (0, 1))
    left = 8.0
    size = 30.0
    heading = {"size": SMALL, "kind": "soft", "anchor": "start", "width": 112.0}
    f.text(left, 4, f.say("tokens and their experts", "词元及其专家"), **heading)
    tokens = []
    for n, pair in enumerate(choices):
        y = 46 + n * 68
        box = f.box(left, y, size, f"t_{{{n + 1}}}", height=size, kind=colours[n])
        f.text(box.right + 8, y + 6, f"{pair[0]}, {pair[1]}", anchor="start")
        tokens.append(box)
    # The rows, sorted by expert and stable within each.
    slots = sorted((expert, n) for n, pair in enumerate(choices) for expert in pair)
    middle = 138.0
    f.text(middle - 8, 4, f.say("rows sorted by expert", "按专家排序的行"), **heading)
    rows = []
    y = 40.0
    for position, (expert, n) in enumerate(slots):
        if position and slots[position - 1][0] != expert:
            y += 20
        box = f.box(middle, y, size + 14, f"t_{{{n + 1}}}", height=size - 4, kind=colours[n])
        rows.append(box)
        y = box.bottom
    right = 240.0
    f.text(right, 4, f.say("one matrix for each run", "每段一个矩阵"), **heading)
    for expert in range(3):
        run = [box for box, slot in zip(rows, slots, strict=True) if slot[0] == expert]
        middle_y = (run[0].y + run[-1].bottom) / 2
        height = max(26.0, run[-1].bottom - run[0].y)
        matrix = f.box(
            right, middle_y - height / 2, 62, f"W_{{{expert}}}", height=height, kind="chosen"
        )
        f.connect((run[0].right + 6, middle_y), matrix.west())
        label = f.say(f"{len(run)} row{'s' if len(run) > 1 else ''}", f"{len(run)} 行")
        f.text(matrix.right + 8, middle_y - 7, label, size=SMALL, kind="soft", anchor="start")
        if expert == 1:
            first = slots.index((1, 0))
            border = (rows[first - 1].bottom + rows[first].y) / 2
            f.line((middle - 12, border), (374, border), dashed=True)
    bottom = max(rows[-1].bottom, tokens[-1].bottom) + 22
    sums = []
    for n in range(3):
        x = 8 + n * 126
        text = f.say(f"y_{{{n + 1}}} = Σ w · 2 rows", f"y_{{{n + 1}}} = 两行加权和")
        sums.append(f.box(x, bottom, 112, text, kind=colours[n], size=SMALL))
    f.text(
        190,
        sums[0].bottom + 6,
        f.say(
            "dashed: the border of two devices; rows cross it by all-to-all",
            "虚线：两台设备的分界，行通过 all-to-all 越过它",
        ),
        size=SMALL,
        kind="soft",
        width=360,
    )
