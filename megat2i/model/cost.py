"""What the model costs, by arithmetic alone: parameters and FLOPs of the embedding, a layer and the head.

The one convention for FLOPs of the whole project: a matrix product of [m, k] and [k, n] is 2mkn; attention counts the
causal half of its keys; the embedding's look-up multiplies nothing; unused vocabulary rows are not computed; the
backward pass is twice the forward pass, and what is computed again (recomputed layers, the loss head's logits) does not
count. Model FLOPs of Korthikanti et al. 2022 (arXiv 2205.05198), section 6, but for the causal half.
"""

from megat2i.config import ModelConfig

BACKWARD = 2  # FLOPs of the backward pass for one of the forward pass: gradients of both operands of every product


def norm_parameters(shape: ModelConfig) -> int:
    """Parameters of one norm of width ``hidden``."""
    return shape.hidden * _norm_vectors(shape)


def attention_width(shape: ModelConfig) -> int:
    """Outputs of the query projection: all heads."""
    return shape.heads * shape.head_dim


def joined_width(shape: ModelConfig) -> int:
    """Outputs of the query, key and value projections together."""
    return (shape.heads + 2 * shape.key_value_heads) * shape.head_dim


def layer_matrices(shape: ModelConfig) -> int:
    """Parameters of one layer that multiply: query, key, value, output; gate (SwiGLU's alone), up, down."""
    attention = (joined_width(shape) + attention_width(shape)) * shape.hidden
    return attention + (3 if shape.feed_forward == "swiglu" else 2) * shape.hidden * shape.ffn_hidden


def layer_parameters(shape: ModelConfig) -> int:
    """All parameters of one layer: its matrices, its two norms and, with qk-norm, those of query and key."""
    normed = 0
    if shape.qk_norm:
        heads = 2 if shape.qk_norm_per_head else shape.heads + shape.key_value_heads
        normed = heads * shape.head_dim * _norm_vectors(shape)
    return layer_matrices(shape) + 2 * norm_parameters(shape) + normed


def embedding_parameters(shape: ModelConfig, rows: int) -> int:
    """Parameters of the token embedding with ``rows`` vocabulary rows, and of the norm behind it."""
    return rows * shape.hidden + (norm_parameters(shape) if shape.embedding_norm else 0)


def head_parameters(shape: ModelConfig, rows: int) -> int:
    """Parameters of the final norm and of the output table with ``rows`` vocabulary rows, unless it is tied."""
    return norm_parameters(shape) + (0 if shape.tied_embeddings else rows * shape.hidden)


def model_parameters(shape: ModelConfig, rows: int) -> int:
    """All parameters."""
    ends = embedding_parameters(shape, rows) + head_parameters(shape, rows)
    return ends + shape.layers * layer_parameters(shape)


def layer_forward_flops(shape: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one layer's forward pass for one token, causal attention over ``sequence_length`` included."""
    return 2 * layer_matrices(shape) + attention_forward_flops(shape, sequence_length)


def attention_forward_flops(shape: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one layer's scores and weighted values for one token: half of S keys on average."""
    return 2 * attention_width(shape) * sequence_length


def head_forward_flops(shape: ModelConfig, columns: int) -> int:
    """FLOPs of the logits of one token; ``columns``: vocabulary rows that may receive probability."""
    return 2 * columns * shape.hidden


def flops_per_token(shape: ModelConfig, columns: int, sequence_length: int) -> int:
    """Training FLOPs of one token: 6 x (matrices that multiply) + 6 x layers x hidden x S of causal attention."""
    forward = shape.layers * layer_forward_flops(shape, sequence_length) + head_forward_flops(shape, columns)
    return (1 + BACKWARD) * forward


def _norm_vectors(shape: ModelConfig) -> int:
    """Vectors of a norm: gain and bias, the gain alone, none."""
    return {"layer_norm": 2, "layer_norm_no_gain": 0}.get(shape.norm, 1)
