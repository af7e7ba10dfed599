"""The decoder-only transformer: token embedding, blocks, final norm and the loss head.

Architecture and initialisation are open_lm's. In training ``forward`` returns the loss of every token and holds a chunk
of logits at most; ``logits`` is for evaluation. Parameter names are open_lm's and count layers globally.
"""

import hashlib

import torch
from torch import Tensor, nn

from megat2i.config import ModelConfig
from megat2i.kernels import Ops, TokenLosses
from megat2i.model.layers import INIT_CUT, Block, LayerCache, Norm, Positions
from megat2i.vocab import IGNORE, VocabLayout


class Cache:
    """Keys and values of all layers: static storage for ``max_length`` positions, ``length`` of them written.

    ``first`` [B] is the position where each row's own tokens begin: what stands before is padding that nothing looks at
    (rows of unequal length are padded on the left).
    """

    def __init__(self, layers: list[LayerCache], first: Tensor | None):
        self.layers, self.first, self.length = layers, first, 0


class GPT(nn.Module):
    """open_lm's transformer over ``rows`` vocabulary rows.

    ``ranges``: the id ranges that receive probability in the loss. A freshly built model has uninitialised weights:
    call ``initialise`` or load a state.
    """

    def __init__(self, shape: ModelConfig, rows: int, ranges: tuple[tuple[int, int], ...], ops: Ops):
        super().__init__()
        self.shape, self.ranges, self.ops = shape, ranges, ops
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(rows, shape.hidden), freeze=False)
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(
                    shape.hidden, shape.heads, shape.ffn_hidden, shape.norm, shape.norm_eps, shape.qk_norm, ops
                )
                for layer in range(shape.layers)
            }
        )
        self.norm = Norm(shape.hidden, shape.norm, shape.norm_eps, ops)
        self.output = nn.Linear(shape.hidden, rows, bias=False)

    @staticmethod
    def empty(shape: ModelConfig, vocab: VocabLayout, ops: Ops, device: torch.device, dtype: torch.dtype) -> "GPT":
        """A model for ``vocab`` on ``device`` in ``dtype``, its weights still to be set."""
        with torch.device("meta"):
            model = GPT(shape, vocab.size, vocab.ranges, ops)
        return model.to(dtype).to_empty(device=device)

    def forward(
        self, tokens: Tensor, targets: Tensor, token_weight: Tensor | None = None, z_loss: float = 0.0
    ) -> TokenLosses:
        """Per-token losses [B * S] of ``targets`` [B, S] (IGNORE: none) after ``tokens`` [B, S], both int64.

        ``token_weight`` [B, S] float32 multiplies each token's loss.
        """
        return self.ops.linear_cross_entropy(
            self.hidden_states(tokens).flatten(0, 1),
            self.output.weight,
            targets.flatten(),
            ranges=self.ranges,
            z_loss=z_loss,
            token_weight=None if token_weight is None else token_weight.flatten(),
        )

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """States [B, S, D] after the final norm; with a cache, ``tokens`` continue what it holds."""
        positions = self._positions(tokens, cache)
        x = self.tok_embeddings(tokens)
        for index, block in enumerate(self.layers.values()):
            x = block(x, positions, cache.layers[index] if cache else None)
        if cache:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [B, S, V] in float32 of all rows of the vocabulary, never masked."""
        return self.output(self.hidden_states(tokens, cache)).float()

    def next_logits(self, tokens: Tensor, cache: Cache, columns: slice) -> Tensor:
        """Logits [B, columns] in float32 after the last of ``tokens`` [B, S]: only the rows that may be drawn."""
        last = self.hidden_states(tokens, cache)[:, -1]
        return (last @ self.output.weight[columns].T).float()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets [B, S] that are not IGNORE; a scalar."""
        return self(tokens, targets).loss.sum() / (targets != IGNORE).sum()

    def new_cache(self, batch: int, max_length: int, first: Tensor | None = None) -> Cache:
        """An empty cache for ``batch`` rows; ``first`` [B]: left padding of each row (None: none)."""
        weight = self.output.weight
        layers = [
            LayerCache(batch, self.shape.heads, max_length, self.shape.head_dim, weight.device, weight.dtype)
            for _ in self.layers
        ]
        return Cache(layers, first)

    def _positions(self, tokens: Tensor, cache: Cache | None) -> Positions:
        length, start = tokens.shape[1], cache.length if cache else 0
        index = torch.arange(start, start + length, device=tokens.device)
        first = cache.first if cache else None
        mask = None
        if cache and (start > 0 or first is not None):
            keys = torch.arange(start + length, device=tokens.device)
            visible = keys[None, :] <= index[:, None]  # [S, keys]
            if first is not None:
                own = keys[None, None, :] >= first[:, None, None]
                # a padding query looks at itself, so that its softmax is defined
                visible = visible & (own | (keys[None, :] == index[:, None]))
                mask = visible[:, None]  # [B, 1, S, keys]
            else:
                mask = visible[None, None]
        if self.shape.positions == "none":
            return Positions(mask=mask, start=start)
        if first is not None:
            index = (index[None, :] - first[:, None]).clamp(min=0)[:, None, :]  # [B, 1, S]
        half = torch.arange(0, self.shape.head_dim, 2, device=tokens.device, dtype=torch.float32)
        angles = index[..., None].float() * self.shape.rotary_base ** (-half / self.shape.head_dim)
        return Positions(angles.cos(), angles.sin(), mask, start)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """open_lm's initial weights, every tensor drawn by its own name: the same whatever part a rank holds."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = parameter.shape[1] ** -0.5
            if name.startswith("layers.") and name.endswith(("out_proj.weight", "w3.weight")):
                std /= (2 * (int(name.split(".")[1]) + 1)) ** 0.5
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.trunc_normal_(values, std=std, a=-INIT_CUT * std, b=INIT_CUT * std, generator=generator)
            parameter.copy_(values)

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs a token: 6 x (parameters that multiply) + causal attention, recomputation not counted.

        The embedding look-up multiplies nothing; unused vocabulary rows are not computed. Attention counts the causal
        half: 12 x layers x hidden x S / 2 (forward and backward).
        """
        columns = sum(end - start for start, end in self.ranges)
        matrices = sum(p.numel() for p in self.layers.parameters() if p.dim() == 2) + columns * self.shape.hidden
        return 6 * matrices + 6 * self.shape.layers * self.shape.hidden * sequence_length
