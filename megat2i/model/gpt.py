"""The decoder-only transformer, or the part of it that a rank holds: token embedding, blocks, final norm, loss head.

Architecture and initialisation are open_lm's. In training the last stage returns the loss of every token and holds a
chunk of logits at most; ``logits`` is for evaluation. Parameter names are open_lm's and count layers globally, whatever
part of the model a rank holds.
"""

import hashlib

import torch
from torch import Tensor, nn

from megat2i.config import ModelConfig
from megat2i.kernels import LiveTokens, Ops, TokenLosses
from megat2i.model.layers import INIT_CUT, Block, BlockShape, HeadsNorm, LayerCache, Norm, Positions
from megat2i.model.part import WHOLE_MODEL, Part
from megat2i.model.partition import StageLayers
from megat2i.parallel.layers import ShardedModule, WeightGradients
from megat2i.parallel.shard import Shard
from megat2i.parallel.vocabulary import Blocks, VocabParallelEmbedding, VocabParallelHead
from megat2i.vocab import IGNORE, VocabLayout


class Cache:
    """Keys and values of a rank's layers for ``length`` positions.

    The next token goes to ``position`` [1] int64, which counts on the device: no shape or address depends on how far a
    row has come, so that one CUDA graph serves every token. ``first`` [B] int64 is the position where each row's own
    tokens begin: what stands before is padding that nothing looks at (rows of unequal length are padded on the left).
    """

    def __init__(self, layers: dict[str, LayerCache], first: Tensor, length: int):
        self.layers, self.first, self.length = layers, first, length
        self.position = torch.zeros(1, dtype=torch.int64, device=first.device)


class GPT(nn.Module):
    """open_lm's transformer over ``rows`` vocabulary rows.

    ``ranges``: the id ranges that receive probability in the loss; ``blocks``: the blocks of the tables that tensor
    parallelism stripes. A freshly built model has uninitialised weights: call ``initialise`` or load a state.
    """

    def __init__(
        self,
        shape: ModelConfig,
        rows: int,
        ranges: tuple[tuple[int, int], ...],
        ops: Ops,
        blocks: Blocks | None = None,
        part: Part = WHOLE_MODEL,
    ):
        super().__init__()
        self.shape, self.ranges, self.ops, self.parallel = shape, ranges, ops, part.parallel
        self.stages = part.stages or (StageLayers(0, shape.layers, embedding=True, head=True),)
        self.weight_gradients = WeightGradients()
        blocks, norm = blocks or ((0, rows),), (shape.hidden, shape.norm, shape.norm_eps)
        if any(stage.embedding for stage in self.stages):
            self.tok_embeddings = VocabParallelEmbedding(rows, shape.hidden, blocks, self.parallel)
            self.post_embed_norm = Norm(*norm, ops, self.parallel) if shape.embedding_norm else None
        block = _block_shape(shape)
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(block, ops, self.parallel, self.weight_gradients, part.recompute)
                for stage in self.stages
                for layer in range(stage.first, stage.stop)
            }
        )
        if any(stage.head for stage in self.stages):
            self.norm = Norm(*norm, ops, self.parallel)
            self.output = VocabParallelHead(rows, shape.hidden, blocks, self.parallel)
        self._tie()

    def _tie(self) -> None:
        if self.shape.tied_embeddings:  # needs both on one rank, hence no pipeline: the configuration sees to it
            self.output.weight = self.tok_embeddings.weight

    @staticmethod
    def empty(
        shape: ModelConfig,
        vocab: VocabLayout,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        part: Part = WHOLE_MODEL,
    ) -> "GPT":
        """A model for ``vocab`` on ``device`` in ``dtype``, its weights still to be set."""
        with torch.device("meta"):
            # image rows first: their shares begin at a multiple of 256 rows on every rank
            model = GPT(shape, vocab.size, vocab.ranges, ops, vocab.blocks[::-1], part)
        model = model.to(dtype).to_empty(device=device)
        model._tie()  # each name has got memory of its own
        return model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def shards(self) -> dict[str, Shard]:
        """What this rank holds of every one of its parameters, by global name."""
        shards = {name: Shard.whole(tuple(parameter.shape)) for name, parameter in self.named_parameters()}
        for prefix, module in self.named_modules():
            if isinstance(module, ShardedModule | HeadsNorm):
                shards |= {f"{prefix}.{name}": module.shard for name, _ in module.named_parameters()}
        if self.shape.tied_embeddings:
            del shards["output.weight"]  # the same parameter as the embedding's
        return shards

    def forward(
        self, tokens: Tensor, targets: Tensor, token_weight: Tensor | None = None, z_loss: float = 0.0
    ) -> TokenLosses:
        """Per-token losses [B * S] of ``targets`` [B, S] (IGNORE: none) after ``tokens`` [B, S], both int64.

        ``token_weight`` [B, S] float32 multiplies each token's loss. For a rank that holds the whole depth.
        """
        (stage,) = self.stages
        return self.losses(self.run_stage(stage, tokens, None), targets, token_weight, z_loss)

    def run_stage(self, stage: StageLayers, tokens: Tensor, x: Tensor | None, cache: Cache | None = None) -> Tensor:
        """One pipeline stage: what leaves its last layer [N or N / t, D] for ``x``, what left the stage before it.

        ``tokens`` [B, S] are the same on all stages; the first embeds them. With a cache they continue what it holds.
        """
        positions = self._positions(tokens, cache)
        if stage.embedding:
            x = self.tok_embeddings(tokens.flatten())
            x = x if self.post_embed_norm is None else self.post_embed_norm(x)
        for layer in range(stage.first, stage.stop):
            x = self.layers[str(layer)](x, positions, cache.layers[str(layer)] if cache else None)
        return x

    def losses(
        self,
        x: Tensor,
        targets: Tensor,
        token_weight: Tensor | None,
        z_loss: float,
        live: LiveTokens | None = None,
    ) -> TokenLosses:
        """The head of the last stage: losses [B * S] from what leaves the last layer; ``live``: see the head."""
        return self.ops.linear_cross_entropy(
            self.output.collect(self.norm(x)),
            self.output.weight,
            targets.flatten(),
            ranges=self.ranges,
            blocks=self.output.blocks,
            z_loss=z_loss,
            token_weight=None if token_weight is None else token_weight.flatten(),
            group=self.parallel.group,
            live=live,
        )

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """States [B, S, D] after the final norm; with a cache, ``tokens`` continue what it holds."""
        (stage,) = self.stages
        x = self.run_stage(stage, tokens, None, cache)
        if cache:
            cache.position += tokens.shape[1]
        return self.output.collect(self.norm(x)).view(*tokens.shape, -1)

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, S, V] in float32 of all rows of the vocabulary, never masked."""
        return self.output(self.hidden_states(tokens, cache)).float()

    def next_logits(self, tokens: Tensor, cache: Cache, columns: slice) -> Tensor:
        """Logits [B, columns] in float32 after the last of ``tokens`` [B, S]: only the rows that may be drawn."""
        (stage,) = self.stages
        x = self.run_stage(stage, tokens, None, cache)
        cache.position += tokens.shape[1]
        return self.last_logits(x, len(tokens), columns)

    def last_logits(self, x: Tensor, batch: int, columns: slice) -> Tensor:
        """Logits [B, columns] in float32 of the last position, from what leaves the last layer."""
        last = self.output.collect(self.norm(x)).view(batch, -1, x.shape[-1])[:, -1]
        return self.output(last, columns).float()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets [B, S] that are not IGNORE; a scalar."""
        return self(tokens, targets).loss.sum() / (targets != IGNORE).sum()

    def new_cache(self, batch: int, max_length: int, first: Tensor | None = None) -> Cache:
        """An empty cache for ``batch`` rows; ``first`` [B]: left padding of each row (None: none)."""
        heads, like = self.shape.key_value_heads // self.parallel.size, next(self.parameters())
        length = -(-max_length // 8) * 8  # PyTorch's masked attention would copy a mask of another width
        layers = {
            name: LayerCache(batch, heads, length, self.shape.head_dim, like.device, like.dtype) for name in self.layers
        }
        none = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return Cache(layers, none if first is None else first, length)

    def _positions(self, tokens: Tensor, cache: Cache | None) -> Positions:
        batch, length = tokens.shape
        index, mask, where = torch.arange(length, device=tokens.device), None, {}
        if cache:
            places = index + cache.position
            where = {"places": places, "first": cache.first}
            if length > 1 or self.ops.decode_attention is None:
                mask = _visible(places, cache)
            index = (places - cache.first[:, None]).clamp(min=0)[:, None]  # [B, 1, S]
        if self.shape.positions == "none":
            return Positions(batch, mask=mask, **where)
        half = torch.arange(0, self.shape.head_dim, 2, device=tokens.device, dtype=torch.float32)
        angles = index[..., None].float() * self.shape.rotary_base ** (-half / self.shape.head_dim)
        interleaved = self.shape.positions == "rotary_interleaved"
        return Positions(batch, angles.cos(), angles.sin(), mask, interleaved, **where)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """open_lm's initial weights; every tensor is drawn whole by its own name, and a rank keeps its part of it."""
        shards = self.shards()
        for name, parameter in self.named_parameters():
            parameter.copy_(shards[name].cut(initial_values(name, shards[name].shape, seed)))


def _visible(places: Tensor, cache: Cache) -> Tensor:
    """Which of the cache's positions the queries at ``places`` [S] may look at: [B, 1, S, length]."""
    keys = torch.arange(cache.length, device=places.device)
    own = keys >= cache.first[:, None, None]  # [B, 1, length]
    # a padding query looks at itself, so that its softmax is defined
    return ((keys <= places[:, None]) & (own | (keys == places[:, None])))[:, None]


def initial_values(name: str, shape: tuple[int, ...], seed: int, device: torch.device | None = None) -> Tensor:
    """open_lm's initial values of the whole tensor ``name``, float32, drawn on ``device`` (default: the CPU).

    Other kinds of device draw other values.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=device)
    std = shape[1] ** -0.5
    if name.startswith("layers.") and name.endswith(("out_proj.weight", "w3.weight", "_ff_w2.weight")):
        std /= (2 * (int(name.split(".")[1]) + 1)) ** 0.5
    values, cut = torch.empty(shape, dtype=torch.float32, device=device), INIT_CUT * std
    return nn.init.trunc_normal_(values, std=std, a=-cut, b=cut, generator=generator_of(name, seed, device))


def generator_of(name: str, seed: int, device: torch.device | None = None) -> torch.Generator:
    """The source of random values of the tensor ``name``, which depend on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _block_shape(shape: ModelConfig) -> BlockShape:
    return BlockShape(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn_hidden,
        feed_forward=shape.feed_forward,
        norm=shape.norm,
        eps=shape.norm_eps,
        qk_norm=None if not shape.qk_norm else "head" if shape.qk_norm_per_head else "heads",
    )
