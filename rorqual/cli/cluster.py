"""Implements `rorqual plan MODEL`: what training on many devices holds, sends and takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rorqual.cli.parse import changed, emit, read
from rorqual.model_config import ModelConfig
from rorqual.plan_costs import Cluster, Layout, Memory, Step, bytes_sent, memory, step_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterPlan:
    """Prints the memory of a rank, the bytes that it sends and the seconds of a training step.

    They are formulas (docs/scale.md); with --simulate all ranks are simulated besides, with routing
    and n-grams recorded from a trained model. The network's figures are assumptions.

    rorqual plan engram-27b model.moe.routed=56 --devices 64 --expert 8
    rorqual plan engram-27b model.moe.routed=56 --devices 1024 --expert 8 --simulate
    """

    # the model; flags change it
    model: ModelConfig = field(default_factory=ModelConfig)
    device: str = "h100"  # whose figures the cluster's devices have
    # the devices and what connects them
    cluster: Cluster = field(default_factory=Cluster)
    # how batch and model are spread over them
    layout: Layout = field(default_factory=Layout)
    simulate: bool = False  # replays recorded routing and n-grams over all ranks
    traffic: str | None = None  # a recording of scripts/record_traffic.py; None: the one that ships
    steps: int = 3  # to simulate
    jitter: float = 0.02  # deviation of the seconds of products between ranks; simulated alone
    seed: int = 0


SHORT = {
    each.name: f"{section}.{each.name}"
    for section, cls in (("cluster", Cluster), ("layout", Layout))
    for each in fields(cls)
}


def cluster_command(name: str, model: ModelConfig, argv: list[str], as_json: bool) -> int:
    """Plans the training of a model on the devices that the flags describe."""
    from rorqual.experiments.cluster import as_json as simulated_json
    from rorqual.experiments.cluster import read_traffic, recorded_ids, simulate
    from rorqual.experiments.devices import device_of
    from rorqual.hints import choose

    changes = read(ClusterPlan(model=model), argv, "plan MODEL", short=SHORT)
    device = str(dict(changes).get("device", "h100"))
    choose("device", device, _devices())
    figures = device_of(device)
    cluster = Cluster(flops=figures.flops, memory=figures.memory, bandwidth=figures.bandwidth)
    options = changed(ClusterPlan(model=model, cluster=cluster), changes)
    traffic = read_traffic(options.traffic) if options.traffic else read_traffic()
    ids = recorded_ids(options.model, options.layout, traffic)
    planned = options.model, options.cluster, options.layout, ids
    footprint = memory(*planned)
    sent = bytes_sent(*planned)
    step = step_seconds(*planned)
    exposed = step_seconds(
        *planned[:2], replace(options.layout, overlap_rows=False, overlap_mapping=False), ids
    )
    simulated: dict[str, Any] = {}
    if options.simulate:
        for what, layout in (
            ("overlapped", options.layout),
            ("rows in line", replace(options.layout, overlap_rows=False)),
            ("mapping in line", replace(options.layout, overlap_mapping=False)),
            ("both in line", replace(options.layout, overlap_rows=False, overlap_mapping=False)),
        ):
            result = simulate(
                options.model,
                options.cluster,
                layout,
                traffic,
                steps=options.steps,
                seed=options.seed,
                jitter=options.jitter,
            )
            by_formula = step_seconds(options.model, options.cluster, layout, ids).total
            simulated[what] = simulated_json(result) | {"formula": by_formula}
    if as_json:
        emit(
            {
                "model": name,
                "cluster": options.cluster,
                "layout": options.layout,
                "memory": footprint._asdict() | {"roles": _roles(footprint)},
                "bytes": sent,
                "distinct_ids": ids,
                "seconds": step._asdict(),
                "seconds_in_line": exposed._asdict(),
                "simulated": simulated,
            }
        )
        return 0
    _show(name, options, footprint, sent, step)
    if simulated:
        _show_simulated(simulated, traffic.about)
    return 0


def _devices() -> Sequence[str]:
    """Returns the names of devices with known figures, and `cpu`."""
    from rorqual.hardware import DEVICES

    return (*DEVICES, "cpu")


def _roles(footprint: Memory) -> dict[str, dict[str, int]]:
    """Returns the bytes of each role as JSON values."""
    return {role: one._asdict() for role, one in footprint.roles.items()}


def _show(
    name: str, options: ClusterPlan, footprint: Memory, sent: dict[str, int], step: Step
) -> None:
    """Prints what the formulas say: memory of a rank, bytes sent, seconds of a step."""
    tokens = options.layout.tokens * options.layout.micro_batches * options.cluster.devices
    print(
        f"{name} on {options.cluster.devices:,} x {options.device}, {options.layout.expert} expert "
        f"ranks, {tokens:,} tokens a step; formulas, not measurements"
    )
    rows = [("memory of a rank", "")]
    rows += [
        (f"  {role}: weights + gradients + state", " + ".join(map(size, one)))
        for role, one in footprint.roles.items()
        if sum(one)
    ]
    rows += [("  gathered blocks", size(footprint.gathered))]
    rows += [("  activations, an estimate", size(footprint.activations))]
    if footprint.host:
        rows += [("  of it in the memory of the host", size(footprint.host))]
    fits = "" if footprint.fits(options.cluster) else f", more than {size(options.cluster.memory)}"
    rows += [("  on the device", size(footprint.device) + fits)]
    rows += [("bytes that a rank sends in a step", "")]
    rows += [(f"  {kind}", size(count)) for kind, count in sent.items() if count]
    rows += [("seconds of a step", "")]
    waits = {
        "compute": f"products, at {options.cluster.utilisation:.0%} of the peak",
        "exchange": "all-to-alls of tokens",
        "mapping": "mapping of the streams, not hidden",
        "gather": "parameters and gradients, not hidden",
        "rows": "rows and their gradients, not hidden",
        "update": "update",
    }
    rows += [(f"  {words}", f"{getattr(step, name):.4g} s") for name, words in waits.items()]
    rows += [("  together", f"{step.total:.4g} s, {tokens / step.total:,.0f} tokens a second")]
    _print_rows(rows)


def _show_simulated(simulated: dict[str, Any], about: str) -> None:
    """Prints the seconds of simulated steps beside those of the formulas."""
    print(f"simulated, with {about}")
    rows = []
    for what, result in simulated.items():
        against = result["seconds"] / result["formula"]
        rows.append(
            (
                f"  {what}",
                f"{result['seconds']:.4g} s a step, {against:.3f} of the formula's "
                f"{result['formula']:.4g} s",
            )
        )
    first = next(iter(simulated.values()))
    rows.append(("  the fullest expert rank's load", f"{first['fullest_rank']:.3f} of the mean"))
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    """Prints pairs in two columns, the first as wide as needed; headings have no value."""
    width = max(len(words) for words, value in rows if value)
    for words, value in rows:
        print(f"{words:{width}}  {value}".rstrip())


def size(count: float) -> str:
    """Formats bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
