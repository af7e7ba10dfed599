"""Negative controls of the parity grid: mistakes that parallel training is prone to, each made on purpose and found."""

import itertools

import pytest
from parity import Layout, assert_same
from test_parity import bounds
from torch import Tensor

from megat2i import pipeline
from megat2i.model import layers as model_layers
from megat2i.optim.gradients import GradientSums
from megat2i.optim.torch_engine import TorchEngine
from megat2i.parallel import collectives, vocabulary
from megat2i.parallel import layers as parallel_layers
from megat2i.parallel.collectives import TensorParallel
from megat2i.parallel.layers import WeightGradients
from megat2i.parallel.shard import Shard


def drop_one_all_reduce(number: int):
    """Of a step's all-reduces in the layers, the ``number``-th leaves every rank with its own partial sum."""

    def mistake() -> None:
        calls, start_reduce = itertools.count(), TensorParallel.start_reduce

        def start(parallel: TensorParallel, x: Tensor):
            return (x, None) if next(calls) == number else start_reduce(parallel, x)

        TensorParallel.start_reduce = start

    return mistake


def drop_one_reduce_scatter(number: int):
    """... and the ``number``-th reduce-scatter leaves every rank with its own partial sum of its tokens."""

    def mistake() -> None:
        calls, start_reduce_scatter = itertools.count(), TensorParallel.start_reduce_scatter

        def start(parallel: TensorParallel, x: Tensor):
            if next(calls) != number:
                return start_reduce_scatter(parallel, x)
            first, last = parallel.share(x.shape[0])
            return x[first:last].contiguous(), None

        TensorParallel.start_reduce_scatter = start

    return mistake


def swap_gate_and_up() -> None:
    cut = parallel_layers._shard_of_parts

    def swapped(inputs: int, parts: tuple[int, ...], parallel: TensorParallel) -> Shard:
        shard = cut(inputs, parts, parallel)
        return Shard(shard.shape, 0, shard.pieces[::-1]) if len(parts) == 2 else shard

    parallel_layers._shard_of_parts = swapped


def cut_query_key_value_as_one() -> None:
    cut = parallel_layers._shard_of_parts
    parallel_layers._shard_of_parts = lambda inputs, parts, parallel: cut(
        inputs, (sum(parts),) if len(parts) == 3 else parts, parallel
    )


def normalise_over_own_heads() -> None:
    model_layers.gather_statistics = lambda x, parallel: x[None]


def forget_the_sum_of_norm_gradients() -> None:
    model_layers.shared_parameter = lambda parameter, parallel: parameter


def sum_the_gradient_before_the_head_again() -> None:
    def backward(ctx, grad: Tensor):
        return collectives.finished(ctx.parallel.start_reduce_scatter(grad)), None

    collectives._GatherTokens.backward = staticmethod(backward)


def order_the_blocks_of_the_head_otherwise() -> None:
    build = vocabulary.VocabParallelTable.__init__

    def reversed_blocks(self, *arguments) -> None:
        build(self, *arguments)
        self.blocks = self.blocks[::-1]

    vocabulary.VocabParallelTable.__init__ = reversed_blocks


def look_up_rows_in_the_other_block_order() -> None:
    look_up = vocabulary.VocabParallelEmbedding.forward

    def forward(self, ids: Tensor) -> Tensor:
        shard, self.shard = self.shard, Shard(self.shard.shape, 0, self.shard.pieces[::-1])
        out = look_up(self, ids)
        self.shard = shard
        return out

    vocabulary.VocabParallelEmbedding.forward = forward


def scale_the_loss_by(factor: float):
    def mistake() -> None:
        run_schedule = pipeline.Pipeline.run_schedule
        pipeline.Pipeline.run_schedule = lambda self, batches, loss, counts, scale: run_schedule(
            self, batches, loss, counts, scale * factor
        )

    return mistake


def count_copies_in_the_norm() -> None:
    """Norm gains, which every tensor-parallel rank holds, are counted by each of them."""
    norm = TorchEngine._norm

    def counting(self):
        shards, self.shards = self.shards, {name: Shard((2,), 0, ((0, 1),)) for name in self.shards}  # none is whole
        result = norm(self)
        self.shards = shards
        return result

    TorchEngine._norm = counting


def count_copies_in_deepspeeds_norm() -> None:
    from megat2i.optim import deepspeed_engine

    initialize = deepspeed_engine.deepspeed.initialize

    def marking(model, **arguments):
        for parameter in model.parameters():
            parameter.tensor_model_parallel = True
        return initialize(model=model, **arguments)

    deepspeed_engine.deepspeed.initialize = marking


def do_not_sum_over_data_parallel_ranks() -> None:
    GradientSums._start_reduction = lambda self, bucket: None


def lose_the_deferred_gradients_of_one_micro_batch() -> None:
    later = pipeline._Step._weights

    def losing(self, stage: int, micro_batch: int) -> None:
        if micro_batch == 2:
            self.deferred.pop((stage, micro_batch))
        else:
            later(self, stage, micro_batch)

    pipeline._Step._weights = losing


def defer_a_gradient_and_compute_it_too() -> None:
    leave = WeightGradients.leave

    def twice(self, weight, compute) -> None:
        leave(self, weight, compute)
        leave(self, weight, compute)

    WeightGradients.leave = twice


def compare_with_the_labels_of_another_micro_batch() -> None:
    forward = pipeline._Step._forward

    def mixed(self, stage: int, micro_batch: int) -> None:
        batches, last = self.batches, self.pipeline.stages[stage].head
        if last:
            self.batches = batches[1:] + batches[:1]
        forward(self, stage, micro_batch)
        self.batches = batches

    pipeline._Step._forward = mixed


# name: (mistake, layout, what must differ)
MISTAKES = {
    "the embedding's sum is missing once": (drop_one_all_reduce(0), "1.2.1", "gradient of a tensor"),
    "an all-reduce is missing in a forward pass": (drop_one_all_reduce(6), "1.2.1", "loss"),
    "an all-reduce is missing in a backward pass": (drop_one_all_reduce(20), "1.2.1", "gradient of a tensor"),
    "an all-reduce is missing in the last micro-batch": (drop_one_all_reduce(2 * 33 - 1), "1.2.1", "gradient"),
    "a reduce-scatter is missing in a forward pass": (drop_one_reduce_scatter(6), "1.2.1 sequence", "loss"),
    "a reduce-scatter is missing in a backward pass": (drop_one_reduce_scatter(20), "1.2.1 sequence", "gradient"),
    "gate and up are swapped": (swap_gate_and_up, "1.2.1", "loss"),
    "q, k and v are cut as one matrix": (cut_query_key_value_as_one, "1.2.1", "loss"),
    "qk-norm over a rank's own heads": (normalise_over_own_heads, "1.2.1", "loss"),
    "qk-norm over a rank's own heads, root mean square": (normalise_over_own_heads, "1.2.1 rms_norm", "loss"),
    "norm gradients are not summed": (
        forget_the_sum_of_norm_gradients,
        "1.2.1 sequence",
        "gradient of a tensor",
    ),
    "the head's input gradient is summed twice": (sum_the_gradient_before_the_head_again, "1.2.1 sequence", "gradient"),
    "the head's blocks in another order": (order_the_blocks_of_the_head_otherwise, "1.2.1", "loss"),
    "the embedding's blocks in another order": (look_up_rows_in_the_other_block_order, "1.2.1", "loss"),
    "micro-batches are averaged": (scale_the_loss_by(0.5), "1.1.1", "norm"),
    "ZeRO's average is taken for a sum": (scale_the_loss_by(0.5), "1.1.2 deepspeed", "norm"),
    "copies are counted in the norm": (count_copies_in_the_norm, "1.2.1", "norm"),
    "copies are counted in DeepSpeed's norm": (count_copies_in_deepspeeds_norm, "1.2.1 deepspeed", "norm"),
    "data-parallel ranks go their own ways": (do_not_sum_over_data_parallel_ranks, "1.1.2", "gradient"),
    "weight gradients of a micro-batch are lost": (
        lose_the_deferred_gradients_of_one_micro_batch,
        "2.1.1 zero_bubble-1",
        "gradient",
    ),
    "weight gradients are counted twice": (defer_a_gradient_and_compute_it_too, "2.1.1 zero_bubble-1", "gradient"),
    "labels of another micro-batch": (compare_with_the_labels_of_another_micro_batch, "2.1.1", "loss"),
    "an all-reduce is missing, in bfloat16": (drop_one_all_reduce(6), "1.2.1 bfloat16", "gradient"),
    "gate and up are swapped, in bfloat16": (swap_gate_and_up, "1.2.1 bfloat16", "gradient"),
    "copies are counted in the norm, in bfloat16": (count_copies_in_the_norm, "1.2.1 bfloat16 released", "norm"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(train, one_process, name):
    mistake, text, evidence = MISTAKES[name]
    layout = Layout.parse(text)
    with pytest.raises(AssertionError, match=evidence):
        assert_same(train(layout, mistake, ("sgd",)), one_process(layout.variant), bounds(layout))
