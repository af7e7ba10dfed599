"""The plan and its validation as text: what the tool prints and the configs carry as a comment."""

from dataclasses import asdict

from megat2i.model import cost
from megat2i.planner.layout import stages_of
from megat2i.planner.published import POINTS
from megat2i.planner.ranking import GB, Planned

BEST = 8  # layouts in the table, one for each pair of tensor and pipeline ranks
BROKEN = 7  # shares of the step on the first line


def report(planned: list[Planned]) -> str:
    """The best variant of each pair of tensor and pipeline ranks, the best of all in detail, and what does not fit."""
    job, gpu, gpus = planned[0].job, planned[0].gpu, planned[0].layout.gpus
    parameters = cost.model_parameters(job.shape, job.rows)
    lines = [
        f"{parameters / 1e9:.2f}B parameters, {job.global_batch:,} x {job.sequence_length:,} tokens a step, "
        f"{gpus} x {gpu.name}; layouts are pipeline.tensor.data, hours for 100B tokens"
    ]
    fitting = [p for p in planned if p.fits]
    if fitting:
        lines += ["", *_table(_best_of_each(fitting)), "", *_detail(fitting[0])]
        piped = next((p for p in fitting if p.layout.pipeline > 1), None)
        lines += ["", *_partition(piped)] if piped else []
    lines += ["", *_not_fitting(planned)]
    return "\n".join(lines) + "\n"


def _best_of_each(fitting: list[Planned]) -> list[Planned]:
    first: dict[tuple[int, int], Planned] = {}
    for p in fitting:
        first.setdefault((p.layout.tensor, p.layout.pipeline), p)
    return list(first.values())[:BEST]


def _table(planned: list[Planned]) -> list[str]:
    lines = [f"{'layout':66}{'GB':>6}{'tokens/s/GPU':>14}{'MFU':>7}{'bubble':>8}{'hours':>8}"]
    for p in planned:
        bubble = p.time.bubble / p.time.seconds
        lines.append(
            f"{p.layout.describe():66}{p.memory.total / GB:6.1f}{p.tokens_per_s_per_gpu:14,.0f}{p.mfu:7.1%}"
            f"{bubble:8.1%}{p.hours:8.1f}"
        )
    return lines


def _detail(p: Planned) -> list[str]:
    parts = [f"{name} {value / GB:.1f}" for name, value in asdict(p.memory).items() if value >= 0.05 * GB]
    shares = [f"{name} {share:.1%}" for name, share in p.shares.items() if share >= 0.001]
    sent = [f"{name} {value / GB:.1f}" for name, value in asdict(p.time.links).items() if value]
    return [
        f"best: {p.layout.describe()}",
        f"  memory, GB of {p.gpu.memory / GB:.0f}: {', '.join(parts)}",
        f"  step of {p.time.seconds:.2f} s, micro-batches: {p.layout.micro_batches(p.job)}",
        *(f"    {', '.join(line)}" for line in (shares[:BROKEN], shares[BROKEN:]) if line),
        f"  sent by a GPU in a step, GB: {', '.join(sent) or 'nothing'}",
    ]


def _partition(p: Planned) -> list[str]:
    stages = stages_of(p.job, p.layout.pipeline * p.layout.virtual_stages)
    layers = " ".join(str(stage.stop - stage.first) for stage in stages)
    head = cost.head_forward_flops(p.job.shape, p.job.columns)
    layer = cost.layer_forward_flops(p.job.shape, p.job.sequence_length)
    return [
        f"best with a pipeline: {p.layout.describe()}",
        f"  layers of its {len(stages)} stages: {layers}; the head is as much work as {head / layer:.2f} layers",
    ]


def _not_fitting(planned: list[Planned]) -> list[str]:
    others = [p for p in planned if not p.fits]
    lines = [f"{len(planned) - len(others):,} of {len(planned):,} variants fit"]
    groups: dict[tuple[int, int], list[Planned]] = {}
    for p in others:
        groups.setdefault((p.layout.tensor, p.layout.pipeline), []).append(p)
    fit = {(p.layout.tensor, p.layout.pipeline) for p in planned if p.fits}
    for (tensor, pipeline), group in sorted(groups.items()):
        if (tensor, pipeline) in fit:
            continue
        p = group[0]  # sorted by memory
        largest = sorted(asdict(p.memory).items(), key=lambda item: -item[1])[:2]
        parts = " and ".join(f"{value / GB:.0f} of {name}" for name, value in largest)
        name = f"{pipeline}.{tensor}.{p.layout.data}"
        lines.append(f"  {name}: none fits; the smallest needs {p.memory.total / GB:.0f} GB, {parts}")
    return lines


def validation() -> str:
    """Prediction, published value and error of every point."""
    lines = [f"{'tokens/s/GPU':48}{'published':>10}{'predicted':>10}{'error':>8}"]
    for point in POINTS:
        mark = "  fitted" if point.fitted else ""
        lines.append(f"{point.name:48}{point.tokens:10,.0f}{point.predicted():10,.0f}{point.error():+8.1%}{mark}")
    held_out = [abs(point.error()) for point in POINTS if not point.fitted]
    lines.append(
        f"{len(held_out)} points held out: mean error {sum(held_out) / len(held_out):.1%}, largest {max(held_out):.1%}"
    )
    return "\n".join(lines) + "\n"
