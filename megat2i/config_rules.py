"""Rules between fields of the configuration: what can be trained with so many processes, and what cannot."""

from megat2i.config import Config, ConfigError, ModelConfig, TrainingConfig


def validate(config: Config, world_size: int) -> None:
    """Refuse combinations that cannot be trained with ``world_size`` processes; raises ConfigError."""
    model, training = config.model, config.training
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one dataset: data.train: [{prefix: data/openmoji/train}]")
    _validate_model(model)
    if training.stop_at is not None and training.stop_at > training.steps:
        raise ConfigError(f"training.stop_at={training.stop_at} is beyond training.steps={training.steps}")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(f"optimizer.min_lr={config.optimizer.min_lr} is above optimizer.lr={config.optimizer.lr}")
    _validate_checkpoints(training)
    _validate_parallel(config, world_size)
    _validate_data(config)


def _validate_model(model: ModelConfig) -> None:
    if model.head_width is None and model.hidden % model.heads:
        raise ConfigError(f"model.hidden={model.hidden} is not divisible by model.heads={model.heads}")
    if model.positions != "none" and model.head_dim % 2:
        raise ConfigError(f"model.positions={model.positions} needs an even head width, got {model.head_dim}")
    if model.heads % model.key_value_heads:
        raise ConfigError(f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}")
    if model.qk_norm_per_head and not model.qk_norm:
        raise ConfigError("model.qk_norm_per_head=true needs model.qk_norm=true")
    if (model.expansion == "file") != (model.expansion_file is not None):
        raise ConfigError("model.expansion=file and model.expansion_file belong together: give both or neither")


def _validate_checkpoints(training: TrainingConfig) -> None:
    every = training.checkpoint_every
    if training.keep_every and (not every or training.keep_every % every):
        raise ConfigError(
            f"training.keep_every={training.keep_every} is not a multiple of training.checkpoint_every={every}: "
            "no checkpoint would be written at some of the steps to keep"
        )
    if training.on_spike == "rewind" and not every:
        raise ConfigError(
            "training.on_spike=rewind with training.checkpoint_every=0 has no checkpoint to go back to; set it above 0"
        )


def _validate_parallel(config: Config, world_size: int) -> None:
    model, training, parallel = config.model, config.training, config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if tensor & (tensor - 1):
        raise ConfigError(f"parallel.tensor={tensor} is not a power of two, by which the vocabulary is striped")
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} processes do not divide into parallel.tensor x parallel.pipeline = {tensor} x {pipeline}; "
            f"start a multiple of {tensor * pipeline}"
        )
    if model.tied_embeddings and pipeline > 1:
        raise ConfigError(
            f"model.tied_embeddings=true with parallel.pipeline={pipeline}: the embedding and the output would be on "
            "different ranks; set parallel.pipeline=1"
        )
    for name, size in (("heads", model.heads), ("kv_heads", model.key_value_heads), ("ffn", model.ffn_hidden)):
        if size % tensor:
            raise ConfigError(f"model.{name}={size} is not divisible by parallel.tensor={tensor}")
    data = world_size // (tensor * pipeline)
    sequences = training.micro_batch_size * data
    if training.global_batch_size % sequences:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"micro_batch_size x data-parallel ranks = {training.micro_batch_size} x {data} = {sequences}"
        )
    tokens = training.micro_batch_size * (config.data.sequence_length or 0)
    if parallel.sequence and tokens % tensor:
        raise ConfigError(
            f"parallel.sequence=true: micro_batch_size x sequence_length = {tokens} tokens do not divide into "
            f"parallel.tensor={tensor}"
        )
    _validate_pipeline(config, training.global_batch_size // sequences)


def _validate_pipeline(config: Config, micro_batches: int) -> None:
    parallel, layers = config.parallel, config.model.layers
    if parallel.virtual_stages > 1 and (parallel.schedule == "1f1b" or parallel.pipeline == 1):
        raise ConfigError(
            f"parallel.virtual_stages={parallel.virtual_stages} needs parallel.pipeline above 1 and "
            "parallel.schedule=interleaved or zero_bubble"
        )
    if parallel.schedule == "interleaved" and parallel.pipeline > 1 and parallel.virtual_stages == 1:
        raise ConfigError("parallel.schedule=interleaved needs parallel.virtual_stages of 2 or more")
    stages = parallel.pipeline * parallel.virtual_stages
    if stages > layers:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual_stages = {stages} stages for model.layers={layers}: "
            "every stage needs a layer"
        )
    if parallel.virtual_stages > 1 and micro_batches % parallel.pipeline:
        raise ConfigError(
            f"{micro_batches} micro-batches a step are not a multiple of parallel.pipeline={parallel.pipeline}, as "
            "virtual stages need; change training.global_batch_size or micro_batch_size"
        )


def _validate_data(config: Config) -> None:
    data, loss, sampling = config.data, config.loss, config.sampling
    total = sum(dataset.weight for dataset in data.train)
    for index, dataset in enumerate(data.train):
        if dataset.weight < total / 1000:
            raise ConfigError(f"data.train[{index}].weight={dataset.weight} is below a thousandth of all, {total}")
    trained = {"text_to_image": loss.text + loss.image, "text_only": loss.text, "image_only": loss.image}[data.mode]
    if trained + loss.special == 0:
        raise ConfigError(f"loss.text, loss.image and loss.special are 0 for all that data.mode={data.mode} trains on")
    if data.caption_dropout and data.mode != "text_to_image":
        raise ConfigError(f"data.caption_dropout={data.caption_dropout} needs data.mode=text_to_image, not {data.mode}")
    if not config.training.sample_every:
        return
    if data.mode == "text_only" or not sampling.prompts or (data.mode == "image_only" and any(sampling.prompts)):
        raise ConfigError(
            f"training.sample_every with data.mode={data.mode} and sampling.prompts={list(sampling.prompts)}: "
            "text_to_image needs prompts, image_only takes empty ones, text_only draws no images"
        )
    if sampling.guidance != 1 and data.caption_dropout == 0:
        raise ConfigError(
            f"sampling.guidance={sampling.guidance} needs a model that saw empty captions: "
            "set data.caption_dropout above 0 or sampling.guidance=1"
        )
