"""Golden runs of the real open_lm under tensor parallelism: logits, losses, gradients, the key-value cache."""

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.kernels import choose_ops
from megat2i.model import open_lm
from megat2i.model.gpt import GPT, Part
from megat2i.parallel import layers
from megat2i.parallel.collectives import TensorParallel
from megat2i.parallel.layers import WeightGradients
from megat2i.parallel.shard import Shard
from megat2i.vocab import IGNORE

CASES = ("a_ln_headrotary_swiglu", "c_gainlp_qknorm_rotary_swiglutorch")


@pytest.fixture(params=CASES)
def case(request, golden):
    """(the whole model, the golden content) of each case."""
    path = golden / "open_lm" / f"{request.param}.pt"
    content = torch.load(path, weights_only=True)
    return open_lm.load(path, content["params"]), content


def share_of(whole: GPT, sequence: bool) -> GPT:
    """This rank's part of ``whole``."""
    parallel = TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sequence)
    rows = whole.output.weight.shape[0]
    ops = choose_ops(torch.device("cpu"), torch.float32)
    model = GPT(whole.shape, rows, whole.ranges, ops, ((0, rows),), Part(parallel))
    shards, weights = model.shards(), dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shards[name].cut(weights[name]))
    return model


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def check(whole: GPT, golden: dict, sequence: bool) -> None:
    model, tokens = share_of(whole, sequence), golden["input_ids"]
    with torch.no_grad():
        assert largest(model.logits(tokens), golden["logits"]) < 5e-5, "logits"
        assert largest(model.hidden_states(tokens), golden["hidden"]) < 5e-5, "hidden states"
        for suffix, targets in (("", golden["targets"]), ("_masked", golden["targets_masked"])):
            mean = model(tokens, targets).nll.sum() / (targets != IGNORE).sum()
            assert largest(mean, golden["ce_loss" + suffix]) < 1e-5, "loss" + suffix
        both = model(tokens, golden["targets"], z_loss=1e-4).loss.mean()
        assert largest(both, golden["ce_plus_zloss_1e4"]) < 1e-5, "z-loss"
    model.loss(tokens, golden["targets"]).backward()
    shards = model.shards()
    for name, parameter in model.named_parameters():
        expected = shards[name].cut(golden["grads"][name])
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), f"gradient of {name}"


def check_cache(whole: GPT, golden: dict) -> None:
    """Prompt, then token by token. Without sequence parallelism: one token does not divide over ranks."""
    model, tokens = share_of(whole, sequence=False), golden["input_ids"]
    with torch.no_grad():
        cache = model.new_cache(len(tokens), 40)
        steps = [model.logits(tokens[:, :32], cache)[:, -1:]]
        steps += [model.logits(tokens[:, at : at + 1], cache) for at in range(32, 40)]
    assert largest(torch.cat(steps, dim=1), golden["kvcache_logits_pos31_39"]) < 5e-5, "cache"


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_are_open_lm(case, ranks):
    def on_rank():
        for sequence in (False, True) if ranks == 2 else (True,):
            check(*case, sequence)
        check_cache(*case)

    run_ranks(ranks, on_rank)


def test_the_golden_files_notice_matrices_cut_as_one(case):
    """Gate and up, or q, k and v, cut through the middle of them all."""

    def on_rank(count: int):
        cut = layers._shard_of_parts
        layers._shard_of_parts = lambda inputs, parts, parallel: cut(
            inputs, (sum(parts),) if len(parts) == count else parts, parallel
        )
        check(*case, False)

    for count in (2, 3):
        with pytest.raises(RankError, match="AssertionError: logits"):
            run_ranks(2, on_rank, count)


def test_the_shares_are_shares(case):
    """No rank holds more of a matrix than its part, so the whole model is not at work in disguise."""
    whole, _ = case

    def on_rank():
        return sum(p.numel() for p in share_of(whole, False).parameters() if p.dim() == 2)

    everything = sum(p.numel() for p in whole.parameters() if p.dim() == 2)
    assert run_ranks(4, on_rank) == [everything // 4] * 4
    layer = layers.ColumnParallelLinear(8, (4, 4), TensorParallel(None, 1, 2), WeightGradients())
    assert layer.shard == Shard((8, 8), 0, ((2, 4), (6, 8)))
