"""The configuration of a run: frozen dataclasses, read from YAML plus ``section.key=value`` overrides.

Every key of every YAML file is a field here; an unknown key, a wrong type or an impossible combination is one
``ConfigError`` before anything starts. Rules that join two fields are in config_rules.py: they refuse, never repair.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megat2i import config_file, config_limits
from megat2i.printable import printable
from megat2i.vocab import VocabLayout


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/run"  # everything that the run writes


@dataclass(frozen=True)
class VocabConfig:
    text_tokens: int | None = None  # entries of the text tokenizer; None: as the first dataset's manifest says
    image_codes: int | None = None  # entries of the image codebook; likewise


@dataclass(frozen=True)
class DatasetConfig:
    prefix: str = ""  # PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json
    weight: float = 1.0  # share of the blend


@dataclass(frozen=True)
class DataConfig:
    train: list[DatasetConfig] = field(default_factory=list)
    valid: str | None = None  # prefix of the held-out files
    valid_text: str | None = None  # of held-out text, which every validation measures too (split "valid_text")
    mode: str = "text_to_image"  # text_to_image | image_only | text_only
    sequence_length: int | None = None  # None: what the longest caption needs with its image, see data/sizes.py
    caption_dropout: float = 0.0  # share of captions left empty, for guidance
    seed: int = 0  # order of the samples and dropped captions


@dataclass(frozen=True)
class ModelConfig:
    hidden: int = 2048
    layers: int = 24
    heads: int = 16
    kv_heads: int | None = None  # heads of keys and values, shared by groups of query heads; None: as heads
    head_width: int | None = None  # None: hidden / heads
    ffn: int | None = None  # None: open_lm's rule, 8/3 of hidden rounded up to 256; 4 x hidden with gelu
    feed_forward: str = "swiglu"  # swiglu | gelu
    norm: str = "layer_norm"  # layer_norm | layer_norm_gain_only | layer_norm_no_gain | rms_norm
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qk_norm_per_head: bool = False  # over each head alone (Qwen3), not over all heads together (open_lm)
    embedding_norm: bool = False  # a norm behind the token embedding
    tied_embeddings: bool = False  # one table for token embedding and output
    positions: str = "none"  # none | rotary (pairs half a head apart) | rotary_interleaved (neighbours)
    rotary_base: float = 10_000.0
    seed: int = 0  # initial weights
    pretrained: str | None = None  # folder of initial weights: convert_checkpoint.py's, or Hugging Face's
    expansion: str = "random"  # random | mean | gaussian | file: special and image rows of a pre-trained model
    expansion_file: str | None = None  # safetensors of image rows, for expansion=file

    @property
    def head_dim(self) -> int:
        return self.head_width or self.hidden // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_hidden(self) -> int:
        if self.feed_forward == "gelu":
            return self.ffn or 4 * self.hidden
        return self.ffn or 256 * ((int(8 * self.hidden / 3) + 255) // 256)


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 1000  # length of the schedule
    stop_at: int | None = None  # leave after this step, with a checkpoint
    global_batch_size: int = 64  # sequences
    micro_batch_size: int = 8  # sequences of one rank in one forward pass
    warmup_steps: int = 100  # a shorter run ends within its warm-up
    evaluate_every: int = 0  # steps; 0: only at the end
    evaluate_samples: int = 256
    checkpoint_every: int = 0  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # steps; checkpoints at multiples of it are never removed; 0: none
    asynchronous_checkpoints: bool = False  # write in the background, beside the following steps
    sample_every: int = 0  # steps between images of sampling.prompts, in RUN/drawn and on TensorBoard; 0: never
    on_spike: str = "log"  # log | skip | rewind: what follows on a loss spike, see spikes.py; skip: no update
    spike_sigma: float = 6.0  # standard deviations above the running mean from which on a loss is a spike
    trainable: str = "all"  # which parameters learn; the paper's selective tuning: see model/freezing.py


@dataclass(frozen=True)
class OptimizerConfig:
    engine: str | None = None  # deepspeed | torch; None: deepspeed when its launcher started the run
    lr: float = 3e-4
    min_lr: float = 3e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on every parameter, as open_lm
    clip: float = 1.0  # gradient norm
    reduce_dtype: str = "float32"  # float32 | bfloat16: in which gradients are summed over data-parallel ranks


@dataclass(frozen=True)
class LossConfig:
    text: float = 1.0  # weight of a text position in the objective
    image: float = 1.0
    special: float = 1.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1  # ranks that share every layer; a power of two
    pipeline: int = 1  # ranks that share the depth
    sequence: bool = False  # tensor-parallel ranks also share the tokens between the layers
    schedule: str = "1f1b"  # 1f1b | interleaved | zero_bubble
    virtual_stages: int = 1  # stages of a pipeline rank; above 1 with interleaved or zero_bubble
    recompute: str = "none"  # none | selective | full: what the backward pass computes again


@dataclass(frozen=True)
class RuntimeConfig:
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # float32 | bfloat16, of weights and activations; auto: bfloat16 where it is fast
    self_test: bool = True  # with more than one rank: prove this launch on a tiny model before training
    watchdog_s: float = 300.0  # seconds without progress of any rank after which the run ends; 0: never


@dataclass(frozen=True)
class SamplingConfig:
    prompts: list[str] = field(default_factory=list)
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    guidance: float = 1.0  # 1: off

    def check(self) -> None:
        """Raises ConfigError for a number outside its limits."""
        Config(sampling=self).check()


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def vocab_layout(self) -> VocabLayout:
        """Raises ConfigError where the sizes were not given and no manifest supplied them."""
        for key in ("text_tokens", "image_codes"):
            if getattr(self.vocab, key) is None:
                raise ConfigError(f"vocab.{key} is not set, and no manifest of data.train says it")
        return VocabLayout(self.vocab.text_tokens, self.vocab.image_codes)

    def check(self) -> None:
        """Raises ConfigError for a value that is wrong by itself."""
        problem = config_limits.problem(lambda key: getattr(getattr(self, key.split(".")[0]), key.split(".")[1]))
        if problem:
            raise ConfigError(problem)
        for index, dataset in enumerate(self.data.train):
            if not dataset.prefix or not 0 < dataset.weight < float("inf"):
                raise ConfigError(f"data.train[{index}] needs a prefix and a weight above 0, got {dataset}")


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read ``path`` (YAML), apply ``section.key=value`` overrides and check every field; raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        loaded = config_file.read(path)
    except Exception as error:  # YAML's and OmegaConf's errors share no base class
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"override '{override}': expected section.key=value")
    merged = _merge(OmegaConf.structured(Config), loaded, str(path))
    merged = _merge(merged, OmegaConf.from_dotlist(list(overrides)), "command line")
    config = OmegaConf.to_object(merged)
    config.check()
    return config


def _merge(base, loaded, where: str):
    OmegaConf.set_readonly(base, False)  # OmegaConf makes frozen dataclasses read-only; merging is how they are filled
    for key in base:
        OmegaConf.set_readonly(base[key], False)
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{where}: expected sections with keys, such as training: {{steps: 100}}")
    if key := config_file.resolver(loaded):
        raise ConfigError(f"{where}: {key}: resolvers such as ${{oc.env:...}} are not allowed; write the value itself")
    for section in loaded:  # one at a time: OmegaConf's errors do not always say where they are
        try:
            part = OmegaConf.masked_copy(loaded, section)
            OmegaConf.resolve(part)
            if missing := sorted(OmegaConf.missing_keys(part)):
                raise ConfigError(f"{where}: {missing[0]}: the value is missing")
            base = OmegaConf.merge(base, part)
        except ConfigError:
            raise
        except ConfigKeyError as error:
            raise ConfigError(f"{where}: {_unknown_key(str(section), str(error.full_key or error.key))}") from error
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            key = str(getattr(error, "full_key", None) or section)
            key = key if key.startswith(str(section)) else f"{section}.train: {key}"  # the only list of sections
            problem = str(error).splitlines()[0]
            if key.startswith("data.train"):
                problem = "expected a list such as [{prefix: data/photos/train}], got " + repr(part.data.train)
            raise ConfigError(f"{where}: {key}: {problem}") from error
    return base


def _unknown_key(section: str, key: str) -> str:
    """The sentence on a key that does not exist, with the nearest one that does."""
    last = key.split(".")[-1]
    known = [f.name for f in dataclasses.fields(Config)]
    if section in known and last != section:
        kind = next(f.default_factory for f in dataclasses.fields(Config) if f.name == section)
        inside = DatasetConfig if section == "data" and not key.startswith("data.") else kind
        known = [f.name for f in dataclasses.fields(inside)]
    key = key if key.startswith(section) else f"{section}.train.{key}"
    near = difflib.get_close_matches(last, known, 1)
    return f"unknown key '{key}'" + (f"; did you mean '{key.removesuffix(last)}{near[0]}'?" if near else "")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``load`` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
