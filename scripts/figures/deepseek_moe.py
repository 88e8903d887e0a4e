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
