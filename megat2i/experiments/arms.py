"""The runs of the paper's experiments (Zhang et al., EMNLP 2024): settings on top of one shared configuration.

A run differs from the shared configuration of its scale by what its experiment asks for and by nothing else. Names are
those of the run folders; ``EXPERIMENTS`` says which runs a figure or table is made from.
"""

from dataclasses import dataclass, field, replace

from megat2i import config

LANGUAGE_MODEL = "language-model"  # its run; the weights that others begin with are the job "pretrained"
ALIGNMENT = "alignment"
POLICIES = (
    "embeddings",
    "embeddings_norms",
    "embeddings_norms_first_half",
    "embeddings_norms_feed_forward",
)  # section 3.1, Fig. 6: what is tuned, from little to more
PRETRAINED = "model.pretrained={pretrained}"


@dataclass(frozen=True)
class Arm:
    """One training run: ``settings`` are overrides, in which {pretrained} and {alignment-SEED} are made before it.

    ``share``: its length as a share of the scale's text-to-image run.
    """

    name: str
    settings: tuple[str, ...]
    share: float = 1.0
    tool: str = "pretrain_t2i.py"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """How large the experiments are. ``seeds`` of the twins; ``sweep_lr`` and ``sweep_batch``: section 2.1.

    ``text_settings``: of the run that pre-trains the language model; None where its weights are a user's file.
    ``image_share`` and ``sweep_share``: lengths of the runs of Fig. 6 and of the sweep.
    """

    name: str
    config: str
    steps: int
    batch: int
    peak_lr: float
    seeds: tuple[int, ...] = (0,)
    text_settings: tuple[str, ...] | None = None
    sweep_lr: tuple[float, ...] = ()
    sweep_batch: tuple[int, ...] = ()
    image_share: float = 1.0
    sweep_share: float = 1.0
    settings: tuple[str, ...] = field(default=())


PAPER = Scale(
    name="paper",
    config="configs/open_lm_1b_t2i.yaml",
    steps=96_882,  # 100B tokens
    batch=896,  # 1M tokens
    peak_lr=3e-4,
    sweep_lr=(5e-5, 1e-4, 3e-4),
    sweep_batch=(448, 896, 1792),  # 0.5M to 2M tokens
    sweep_share=0.05,
)
NANO = Scale(
    name="nano",
    config="configs/paper/nano.yaml",
    steps=1000,  # 8.6 passes over the pictures: with 17, held-out image loss rises again
    batch=32,
    peak_lr=2e-3,
    seeds=(0, 1, 2, 3, 4),  # of three, one that trains slowly leaves nothing decided
    text_settings=("training.steps=5000", "training.warmup_steps=200", "training.evaluate_every=500"),
    sweep_lr=(3.3e-4, 6.7e-4, 2e-3),  # the paper's range, times the ratio of the peaks
    sweep_batch=(16, 32, 64),
    image_share=0.8,
    sweep_share=0.6,
)
SMOKE = Scale(
    name="smoke",
    config="configs/paper/nano.yaml",
    steps=10,
    batch=4,
    peak_lr=2e-3,
    text_settings=("training.steps=10",),
    sweep_lr=(3.3e-4, 2e-3),
    sweep_batch=(4, 8),
    settings=(
        "vocab.text_tokens=512", "vocab.image_codes=64", "model.hidden=32", "model.layers=4", "model.heads=2",
        "model.ffn=64", "data.sequence_length=128", "training.micro_batch_size=4", "training.global_batch_size=4",
        "training.warmup_steps=2", "training.evaluate_every=5", "training.evaluate_samples=8",
        "training.checkpoint_every=5", "training.steps=10",
    ),
)  # fmt: skip
SCALES = {scale.name: scale for scale in (PAPER, NANO, SMOKE)}


def adapted(scale: Scale, file: str) -> Scale:
    """``scale`` with another configuration: its steps, batch and learning rate, and the sweep in proportion."""
    settings = config.load(file, list(scale.settings))
    batch, peak = settings.training.global_batch_size, settings.optimizer.lr
    return replace(
        scale,
        config=file,
        steps=settings.training.steps,
        batch=batch,
        peak_lr=peak,
        sweep_lr=tuple(float(f"{rate * peak / scale.peak_lr:.2g}") for rate in scale.sweep_lr),
        sweep_batch=tuple(max(1, one * batch // scale.batch) for one in scale.sweep_batch),
    )


def twins(scale: Scale) -> list[Arm]:
    """Section 2.2: pre-trained and random models that see the same data in the same order, and share all else."""
    return [
        Arm(f"{start}-{seed}", (f"data.seed={seed}", f"model.seed={seed}", *settings), needs=needs)
        for seed in scale.seeds
        for start, settings, needs in (("pretrained", (PRETRAINED,), (LANGUAGE_MODEL,)), ("random", (), ()))
    ]


def image_only(scale: Scale) -> list[Arm]:
    """Section 3.1: unconditional image generation, wholly tuned from either start, and selectively."""
    common = ("data.mode=image_only", "data.valid_text=null")
    arms = [
        Arm(f"image-{arm.name}", (*common, *arm.settings), scale.image_share, needs=arm.needs) for arm in twins(scale)
    ]
    for policy in POLICIES:
        settings = (*arms[0].settings, f"training.trainable={policy}")  # of the first seed alone
        arms.append(Arm(selective_name(policy), settings, scale.image_share, needs=(LANGUAGE_MODEL,)))
    return arms


def selective_name(policy: str) -> str:
    return f"image-{policy.replace('_', '-')}"


def aligned(scale: Scale) -> list[Arm]:
    """Section 3.2: contrastive alignment of image embeddings, and training that begins with them; for every seed."""
    arms = []
    for seed in scale.seeds:
        seeds = (f"data.seed={seed}", f"model.seed={seed}", PRETRAINED)
        # the lengths of the rows take no part in that loss, hence no weight decay
        alone = ("runtime.dtype=float32", "optimizer.engine=torch", "optimizer.weight_decay=0.0")
        expansion = ("model.expansion=file", f"model.expansion_file={{{ALIGNMENT}-{seed}}}")
        tool, needs = "tools/align_embeddings.py", (LANGUAGE_MODEL,)
        arms.append(Arm(f"{ALIGNMENT}-{seed}", (*seeds, *alone), tool=tool, needs=needs))
        arms.append(Arm(f"aligned-{seed}", (*seeds, *expansion), needs=(LANGUAGE_MODEL, f"{ALIGNMENT}-{seed}")))
    return arms


def sweep(scale: Scale) -> list[Arm]:
    """Section 2.1: learning rates at the usual batch, then batches at the usual peak, over the same tokens."""
    points = [(lr, scale.batch) for lr in scale.sweep_lr]
    points += [(scale.peak_lr, batch) for batch in scale.sweep_batch if (scale.peak_lr, batch) not in points]
    return [
        Arm(
            f"sweep-lr{lr:g}-batch{batch}",
            (f"optimizer.lr={lr:g}", f"optimizer.min_lr={lr / 10:g}", f"training.global_batch_size={batch}"),
            scale.sweep_share * scale.batch / batch,
        )
        for lr, batch in points
    ]


EXPERIMENTS = {  # what is made -> the runs it is made from
    "fig3": twins,
    "fig4": twins,
    "table1": twins,
    "fig5": twins,
    "fig6": image_only,
    "fig7": lambda scale: twins(scale) + aligned(scale),
    "sweep": sweep,
}


def is_alignment(arm: Arm) -> bool:
    return arm.name.startswith(ALIGNMENT)


def length(arm: Arm, steps: int, warmup_steps: int) -> dict[str, str]:
    """Steps and warm-up of a run whose share is taken of ``steps`` and ``warmup_steps``."""
    shared = {"training.steps": steps, "training.warmup_steps": warmup_steps}
    return {key: str(max(1, round(value * arm.share))) for key, value in shared.items()}


def arms_of(scale: Scale, experiments: list[str]) -> list[Arm]:
    """The runs that ``experiments`` need, each once, and the language model's first where this scale trains one."""
    chosen = {arm.name: arm for experiment in experiments for arm in EXPERIMENTS[experiment](scale)}
    arms = list(chosen.values())
    if scale.text_settings is None:
        return arms
    needed = any(LANGUAGE_MODEL in arm.needs for arm in arms) or "table1" in experiments
    text = Arm(LANGUAGE_MODEL, ("data.mode=text_only", *scale.text_settings))
    return [text, *arms] if needed else arms
