"""What a single number or word of the configuration may be."""

from collections.abc import Callable

CHOICES = {
    "data.mode": ("text_to_image", "image_only", "text_only"),
    "model.feed_forward": ("swiglu", "gelu"),
    "model.norm": ("layer_norm", "layer_norm_gain_only", "layer_norm_no_gain", "rms_norm"),
    "model.positions": ("none", "rotary", "rotary_interleaved"),
    "model.expansion": ("random", "mean", "gaussian", "file"),
    "training.trainable": (
        "all",
        "embeddings",
        "embeddings_norms",
        "embeddings_norms_first_half",
        "embeddings_norms_feed_forward",
    ),
    "training.on_spike": ("log", "skip", "rewind"),
    "optimizer.engine": (None, "deepspeed", "torch"),
    "optimizer.reduce_dtype": ("float32", "bfloat16"),
    "parallel.schedule": ("1f1b", "interleaved", "zero_bubble"),
    "parallel.recompute": ("none", "selective", "full"),
    "runtime.device": ("auto", "cpu", "cuda"),
    "runtime.dtype": ("auto", "float32", "bfloat16"),
}

# (key, smallest, largest) of every number that has limits
LIMITS = (
    ("vocab.text_tokens", 1, None),
    ("vocab.image_codes", 1, None),
    ("data.seed", 0, 2**62),
    ("data.sequence_length", 8, None),
    ("data.caption_dropout", 0.0, 1.0),
    ("model.hidden", 1, None),
    ("model.layers", 1, None),
    ("model.heads", 1, None),
    ("model.kv_heads", 1, None),
    ("model.head_width", 1, None),
    ("model.ffn", 1, None),
    ("model.norm_eps", 1e-12, 1.0),
    ("model.rotary_base", 1.0, 1e9),
    ("model.seed", 0, 2**62),
    ("training.steps", 1, None),
    ("training.stop_at", 1, None),
    ("training.global_batch_size", 1, None),
    ("training.micro_batch_size", 1, None),
    ("training.warmup_steps", 0, None),
    ("training.evaluate_every", 0, None),
    ("training.evaluate_samples", 1, None),
    ("training.checkpoint_every", 0, None),
    ("training.keep_checkpoints", 1, None),
    ("training.keep_every", 0, None),
    ("training.spike_sigma", 1.0, 1e6),
    ("training.sample_every", 0, None),
    ("optimizer.lr", 0.0, 1e3),
    ("optimizer.min_lr", 0.0, 1e3),
    ("optimizer.beta1", 0.0, 1 - 1e-9),
    ("optimizer.beta2", 0.0, 1 - 1e-9),
    ("optimizer.eps", 1e-30, 1.0),
    ("optimizer.weight_decay", 0.0, 1e3),
    ("optimizer.clip", 0.0, 1e9),
    ("loss.text", 0.0, 1e6),
    ("loss.image", 0.0, 1e6),
    ("loss.special", 0.0, 1e6),
    ("loss.z_loss", 0.0, 1.0),
    ("parallel.tensor", 1, None),
    ("parallel.pipeline", 1, None),
    ("parallel.virtual_stages", 1, None),
    ("runtime.watchdog_s", 0.0, None),
    ("sampling.temperature", 1e-6, 1e6),
    ("sampling.top_k", 0, None),
    ("sampling.top_p", 1e-6, 1.0),
    ("sampling.guidance", 0.0, 1e6),
)


def problem(get: Callable[[str], object]) -> str | None:
    """What is wrong with the first value out of its limits, or None; ``get`` gives the value of a key."""
    for key, choices in CHOICES.items():
        if get(key) not in choices:
            allowed = ", ".join(str(choice) for choice in choices if choice is not None)
            return f"{key} is '{get(key)}'; it must be one of: {allowed}"
    for key, low, high in LIMITS:
        value = get(key)
        if value is not None and not (low <= value <= (high if high is not None else float("inf"))):
            return f"{key} is {value}; it must be {f'between {low} and {high}' if high else f'at least {low}'}"
    return None
