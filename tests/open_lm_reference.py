"""open_lm's forward pass once more, as plain functions of a state dictionary: written from the facts, in any dtype.

It shares no code with the product and follows open_lm's own order of operations, one head and one rotation at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def make_state(params: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights under open_lm's names, with what its state dictionaries repeat and its buffers."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads = params["dim"], params["n_heads"]
    width, rows = heads * (hidden // heads), params["vocab_size"]
    gain = params["norm_type"] != "no_wb_layer_norm"
    bias = params["norm_type"] in ("default_layer_norm", "lp_layer_norm")
    state: dict[str, Tensor] = {}

    def matrix(name, *shape):
        state[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5

    def norm(name, size):
        if gain:
            state[f"{name}.weight"] = 1 + 0.25 * torch.randn(size, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.15 * torch.randn(size, generator=generator)

    matrix("tok_embeddings.weight", rows, hidden)
    if params["post_embed_norm"]:
        norm("post_embed_norm", hidden)
    for number in range(params["n_layers"]):
        layer = f"layers.{number}"
        matrix(f"{layer}.attention.in_proj.weight", 3 * width, hidden)
        matrix(f"{layer}.attention.out_proj.weight", hidden, width)
        state[f"{layer}.attention.pos_embed.inv_freq"] = torch.zeros(hidden // heads // 2)
        if params["apply_qk_norm"]:
            norm(f"{layer}.attention.q_norm", width)
            norm(f"{layer}.attention.k_norm", width)
        if params["ffn_type"] == "gelu":
            matrix(f"{layer}._ff_w1.weight", 4 * hidden, hidden)
            matrix(f"{layer}._ff_w2.weight", hidden, 4 * hidden)
            state[f"{layer}.feed_forward.0.weight"] = state[f"{layer}._ff_w1.weight"]
            state[f"{layer}.feed_forward.2.weight"] = state[f"{layer}._ff_w2.weight"]
        else:
            ffn = 256 * ((int(8 * hidden / 3) + 255) // 256)
            matrix(f"{layer}.feed_forward.w12.weight", 2 * ffn, hidden)
            matrix(f"{layer}.feed_forward.w3.weight", hidden, ffn)
        norm(f"{layer}.attention_norm", hidden)
        norm(f"{layer}.ffn_norm", hidden)
    norm("norm", hidden)
    if params["weight_tying"]:
        state["output.weight"] = state["tok_embeddings.weight"]
    else:
        matrix("output.weight", rows, hidden)
    return state


def logits(params: dict, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [B, S, rows] of ``tokens`` [B, S], in the dtype of ``state``."""
    x = F.embedding(tokens, state["tok_embeddings.weight"])
    if params["post_embed_norm"]:
        x = _norm(params, state, "post_embed_norm", x)
    for number in range(params["n_layers"]):
        layer = f"layers.{number}"
        x = x + _attention(params, state, layer, _norm(params, state, f"{layer}.attention_norm", x))
        x = x + _feed_forward(params, state, layer, _norm(params, state, f"{layer}.ffn_norm", x))
    return _norm(params, state, "norm", x) @ state["output.weight"].T


def _norm(params: dict, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if params["norm_type"] == "rms_norm":
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight
    return F.layer_norm(x, x.shape[-1:], weight, bias, params["norm_eps"])


def _attention(params: dict, state: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    heads, length = params["n_heads"], x.shape[1]
    q, k, v = (x @ state[f"{layer}.attention.in_proj.weight"].T).chunk(3, dim=-1)
    if params["apply_qk_norm"]:
        q = _norm(params, state, f"{layer}.attention.q_norm", q)
        k = _norm(params, state, f"{layer}.attention.k_norm", k)
    outputs = []
    for number, (query, key, value) in enumerate(zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)):
        place = torch.arange(length, dtype=x.dtype)
        kind = params["positional_embedding_type"]
        if kind == "head_rotary":  # open_lm's mistake: the head's number in place of the position
            place, kind = torch.full_like(place, number), "rotary"
        query, key = (_rotated(t, place, kind) for t in (query, key))
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        later = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        outputs.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1) @ state[f"{layer}.attention.out_proj.weight"].T


def _rotated(x: Tensor, place: Tensor, kind: str) -> Tensor:
    """x [B, S, W] turned as complex numbers: of halves (rotary), of neighbours (llama_rotary)."""
    if kind == "none":
        return x
    width = x.shape[-1]
    angles = place[:, None] / 10_000 ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    turn = torch.polar(torch.ones_like(angles), angles)
    if kind == "rotary":
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def _feed_forward(params: dict, state: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    if params["ffn_type"] == "gelu":
        return F.gelu(x @ state[f"{layer}._ff_w1.weight"].T) @ state[f"{layer}._ff_w2.weight"].T
    gate, up = (x @ state[f"{layer}.feed_forward.w12.weight"].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ state[f"{layer}.feed_forward.w3.weight"].T
