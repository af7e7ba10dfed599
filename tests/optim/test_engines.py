"""What every engine promises: norm, clipping, one AdamW update, refusal of non-finite gradients, its fragments."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import RankError, run_ranks

from megat2i.loss import ModalityLoss
from megat2i.model import freezing
from megat2i.model.freezing import freeze, is_trainable
from megat2i.model.weights import TABLES
from megat2i.optim.engine import EXP_AVG, EXP_AVG_SQ, KINDS, WEIGHT
from megat2i.optim.torch_engine import TorchEngine
from megat2i.trainer import train_step

ENGINES = [("torch", 1), ("torch", 2), ("deepspeed", 1), ("deepspeed", 2)]
LOSS = ModalityLoss((1.0, 1.0, 1.0))


@pytest.fixture
def configure(tiny_config):
    def make(dtype="float32", **optimizer):
        return replace(
            tiny_config,
            optimizer=replace(tiny_config.optimizer, **optimizer),
            runtime=replace(tiny_config.runtime, dtype=dtype),
        )

    return make


def state(engine) -> dict:
    """{(kind, name): (shape, [(start, values)])} of this rank."""
    found = {}
    for part in engine.fragments():
        if not part.written:
            continue
        entry = found.setdefault((part.kind, part.name), (part.shard.shape, []))
        entry[1].append((part.start, part.values.numpy().copy()))
    return found


def whole(states: list[dict]) -> dict[tuple[str, str], np.ndarray]:
    """The full tensors of the ranks' states; every element must come from exactly one fragment."""
    tensors, filled = {}, {}
    for rank_state in states:
        for key, (shape, parts) in rank_state.items():
            tensor = tensors.setdefault(key, np.zeros(int(np.prod(shape)), np.float32))
            count = filled.setdefault(key, np.zeros(tensor.size, int))
            for start, values in parts:
                assert values.dtype == np.float32
                tensor[start : start + len(values)] = values
                count[start : start + len(values)] += 1
    for key, count in filled.items():
        assert (count == 1).all(), f"{key}: elements are written {sorted(set(count))} times"
    return tensors


def one_step(make_training, make_batches, config, engine_name, lr=1e-2, steps=1):
    pipeline, engine, groups = make_training(engine_name, config)
    model = pipeline.model
    before = {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}
    norms = []
    for step in range(steps):
        batches = make_batches(config, step, groups.data_rank, groups.data_size)
        norms.append(train_step(pipeline, engine, batches, LOSS, groups, lr)[1])
    after = {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}
    return {"before": before, "after": after, "norms": norms, "state": state(engine), "updates": engine.updates}


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
@pytest.mark.parametrize("clip", [0.0, 0.1, 1e6])
def test_one_update_by_hand(make_training, make_batches, configure, engine, ranks, clip):
    """AdamW's first update, from the gradient that its first moment holds: (1 - beta1) g."""
    config = configure(clip=clip, weight_decay=0.3, eps=1e-4, beta1=0.8, beta2=0.9)
    results = run_ranks(ranks, one_step, make_training, make_batches, config, engine)
    tensors = whole([result["state"] for result in results])
    gradients = {name: values / 0.2 for (kind, name), values in tensors.items() if kind == EXP_AVG}
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    reported = results[0]["norms"][0]
    assert reported > 0.2
    assert norm == pytest.approx(0.1 if clip == 0.1 else reported, rel=1e-4)
    for name, g in gradients.items():
        before = results[0]["before"][name].flatten()
        np.testing.assert_allclose(tensors[EXP_AVG_SQ, name], 0.1 * g**2, rtol=1e-4, atol=1e-12)
        expected = before * (1 - 1e-2 * 0.3) - 1e-2 * g / (np.abs(g) + 1e-4)
        np.testing.assert_allclose(tensors[WEIGHT, name], expected, rtol=1e-5, atol=1e-6)
        for result in results:
            assert np.array_equal(result["after"][name].flatten(), tensors[WEIGHT, name])
    assert [result["updates"] for result in results] == [1] * ranks


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fragments_cover_every_element_once(make_training, make_batches, configure, engine, ranks, dtype):
    def run(steps):
        return one_step(make_training, make_batches, configure(dtype), engine, steps=steps)

    for steps in (0, 2):
        results = run_ranks(ranks, run, steps)
        tensors = whole([result["state"] for result in results])
        parameters = results[0]["after"]
        assert tensors.keys() == {(kind, name) for kind in KINDS for name in parameters}
        for name, values in parameters.items():
            master = torch.from_numpy(tensors[WEIGHT, name])
            rounded = master.bfloat16().float() if dtype == "bfloat16" else master
            assert torch.equal(rounded, torch.from_numpy(values).flatten()), name
            assert (tensors[EXP_AVG, name] == 0).all() == (steps == 0)


def test_the_cover_check_notices_overlaps():
    part = {("weight", "x"): ((4,), [(0, np.zeros(3, np.float32))])}
    rest = {("weight", "x"): ((4,), [(2, np.zeros(2, np.float32))])}
    with pytest.raises(AssertionError, match="written"):
        whole([part, rest])
    with pytest.raises(AssertionError, match="written"):
        whole([part])


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    make_training, make_batches, configure, engine, ranks, dtype, poison
):
    """... on any rank, though only the last one has it; and the next good step counts as if it had not been."""

    def run(poisoned):
        config = configure(dtype)
        pipeline, trained, groups = make_training(engine, config)
        model = pipeline.model
        for step in range(3):
            if step == 1 and not poisoned:
                continue
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            bad = step == 1 and groups.data_rank == groups.data_size - 1
            loss = replace(LOSS, z_loss=poison) if bad else LOSS
            _, norm = train_step(pipeline, trained, batches, loss, groups, 1e-2)
            if step == 1:
                assert not np.isfinite(norm)
        return state(trained), trained.updates, {n: p.detach().float().numpy() for n, p in model.named_parameters()}

    found, expected = run_ranks(ranks, run, True), run_ranks(ranks, run, False)
    assert [updates for _, updates, _ in found] == [2] * ranks
    a, b = (whole([state for state, _, _ in results]) for results in (found, expected))
    assert all(np.array_equal(a[key], b[key]) for key in b)
    assert all(np.array_equal(found[0][2][name], values) for name, values in expected[0][2].items())


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_refreshes_the_weights_and_the_step_count(make_training, make_batches, configure, engine, ranks, dtype):
    """State written into the fragments of a fresh engine trains on exactly as the engine that it came from."""

    def run(mistake):
        config = configure(dtype)
        pipeline, old, groups = make_training(engine, config)
        for step in range(4):
            if step == 2:
                saved = [(part.values.clone(), part) for part in old.fragments()]
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            train_step(pipeline, old, batches, LOSS, groups, 1e-2)
        other, new, groups = make_training(engine, replace(config, model=replace(config.model, seed=5)))
        for part, (values, _) in zip(new.fragments(), saved, strict=True):
            part.values.copy_(values)
        if mistake != "not told":
            new.loaded(0 if mistake == "step count" else 2)
        for step in (2, 3):
            batches = make_batches(config, step, groups.data_rank, groups.data_size)
            train_step(other, new, batches, LOSS, groups, 1e-2)
        a, b = (dict(m.named_parameters()) for m in (pipeline.model, other.model))
        return all(torch.equal(a[name], b[name]) for name in a), new.updates

    assert run_ranks(ranks, run, None) == [(True, 4)] * ranks
    assert not any(same for same, _ in run_ranks(ranks, run, "step count"))
    if ranks == 2 or dtype == "bfloat16":  # in one float32 process of torch's engine the masters are the weights
        assert not all(same for same, _ in run_ranks(ranks, run, "not told"))


def train_selectively(make_training, make_batches, config, engine_name, late=False):
    """Two steps of this rank: names of what changed, of what has state, and the sizes of state.

    ``late``: the mistake of freezing when the engine has taken everything already.
    """
    policy, everything = config.training.trainable, replace(config.training, trainable="all")
    pipeline, engine, groups = make_training(engine_name, replace(config, training=everything) if late else config)
    freeze(pipeline.model, policy)
    parameters = dict(pipeline.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(2):
        batches = make_batches(config, step, groups.data_rank, groups.data_size)
        train_step(pipeline, engine, batches, LOSS, groups, 1e-2)
    moments = [t for state in engine.adam.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    masters = engine.masters.values() if isinstance(engine, TorchEngine) else engine.masters
    return {
        "sizes": {name: p.numel() for name, p in parameters.items()},
        "changed": {name for name, p in parameters.items() if not torch.equal(p, before[name])},
        "moments": {part.name for part in engine.fragments() if part.kind == EXP_AVG},
        "weights": {part.name for part in engine.fragments() if part.kind == WEIGHT},
        "elements": (sum(t.numel() for t in moments), sum(t.numel() for t in masters)),
    }


def assert_selective(results: list[dict], policy: str, copies: int) -> None:
    """``copies`` of the state of exactly what learns, apart from a little padding; every weight in the checkpoint."""
    sizes = results[0]["sizes"]
    learn = {name for name in sizes if is_trainable(name, policy, 2)}
    assert all(result["changed"] == learn for result in results)
    assert set().union(*(result["moments"] for result in results)) == learn < set(sizes)
    assert set().union(*(result["weights"] for result in results)) == set(sizes)
    expected = copies * sum(sizes[name] for name in learn)
    moments, masters = (sum(result["elements"][n] for result in results) for n in range(2))
    assert 2 * expected <= moments <= 2 * expected + 16 * len(results)
    assert expected <= masters <= expected + 8 * len(results)


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["embeddings", "embeddings_norms_feed_forward"])
def test_what_does_not_learn_has_no_state_and_keeps_its_bits(
    make_training, make_batches, configure, engine, ranks, dtype, policy
):
    """... under weight decay too."""
    config = configure(dtype, weight_decay=0.5)
    config = replace(config, training=replace(config.training, trainable=policy))
    results = run_ranks(ranks, train_selectively, make_training, make_batches, config, engine)
    assert_selective(results, policy, copies=ranks if engine == "torch" else 1)  # ZeRO shares the state


@pytest.mark.parametrize("mistake", ["one learns", "late"])
def test_what_learns_against_the_policy_is_noticed(make_training, make_batches, configure, monkeypatch, mistake):
    config = configure(weight_decay=0.5)
    config = replace(config, training=replace(config.training, trainable="embeddings"))
    if mistake == "one learns":
        monkeypatch.setattr(freezing, "is_trainable", lambda name, *_: name in (*TABLES, "norm.bias"))
    results = run_ranks(1, train_selectively, make_training, make_batches, config, "torch", mistake == "late")
    with pytest.raises(AssertionError):
        assert_selective(results, "embeddings", 1)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_norm_is_of_what_learns(make_training, make_batches, configure, engine, clip):
    config = configure(clip=clip, weight_decay=0.0, beta1=0.8)
    config = replace(config, training=replace(config.training, trainable="embeddings_norms"))
    (result,) = run_ranks(1, one_step, make_training, make_batches, config, engine)
    gradients = [part for (kind, _), (_, part) in result["state"].items() if kind == EXP_AVG]
    norm = np.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for part in gradients for _, values in part)) / 0.2
    reported = result["norms"][0]
    assert reported > 0.2 and norm == pytest.approx(clip or reported, rel=1e-4)
    (whole,) = run_ranks(1, one_step, make_training, make_batches, configure(clip=clip), engine)
    assert whole["norms"][0] > 1.01 * reported


def test_a_failing_rank_is_reported_with_its_traceback_and_nobody_hangs():
    """The helper of all these tests: negative control."""

    def run():
        import torch.distributed as dist

        if dist.get_rank() == 1:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(RankError, match=r"rank 1:[\s\S]*KeyError: 'lost'"):
        run_ranks(2, run, timeout=30)


def test_a_rank_that_dies_is_reported():
    def run():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, run, timeout=30)
