"""The decoder: against golden runs of the real open_lm, causality, the cache, the initial weights."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megat2i.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megat2i.kernels import choose_ops, reference
from megat2i.model import open_lm
from megat2i.model.gpt import GPT
from megat2i.optim.schedule import learning_rate
from megat2i.optim.torch_engine import TorchEngine
from megat2i.topology import ParallelGroups
from megat2i.vocab import IGNORE

CASES = ("a_ln_headrotary_swiglu", "c_gainlp_qknorm_rotary_swiglutorch")


@pytest.fixture(scope="session")
def read_case(golden):
    """Function of the name of a golden case -> (path, its content)."""

    def read(name):
        path = golden / "open_lm" / f"{name}.pt"
        return path, torch.load(path, weights_only=True)

    return read


@pytest.fixture(params=CASES)
def case(request, read_case):
    """(model, content) of each golden case."""
    path, content = read_case(request.param)
    return open_lm.load(path, content["params"]), content


def largest(found, expected) -> float:
    return (found - expected).abs().max().item()


def test_logits_and_hidden_states(case):
    model, golden = case
    with torch.no_grad():
        assert largest(model.logits(golden["input_ids"]), golden["logits"]) < 5e-5
        assert largest(model.hidden_states(golden["input_ids"]), golden["hidden"]) < 5e-5


def test_losses(case):
    model, golden = case
    tokens = golden["input_ids"]
    with torch.no_grad():
        for suffix, targets in (("", golden["targets"]), ("_masked", golden["targets_masked"])):
            losses = model(tokens, targets)
            mean = losses.nll.sum() / (targets != IGNORE).sum()
            assert mean.item() == pytest.approx(golden["ce_loss" + suffix].item(), abs=1e-5)
        # open_lm's z-loss counts ignored positions too, so only the unmasked case is the same quantity
        both = model(tokens, golden["targets"], z_loss=1e-4).loss.mean()
        assert both.item() == pytest.approx(golden["ce_plus_zloss_1e4"].item(), abs=1e-5)


def gradient_errors(model, golden):
    model.zero_grad()
    model.loss(golden["input_ids"], golden["targets"]).backward()
    expected = golden["grads"]
    assert {name for name, _ in model.named_parameters()} == {n for n in expected if not n.endswith("inv_freq")}
    return {n: ((p.grad - expected[n]).norm() / expected[n].norm()).item() for n, p in model.named_parameters()}


def test_gradients(case):
    assert max(gradient_errors(*case).values()) < 1e-4


def test_the_key_value_cache(case):
    model, golden = case
    tokens = golden["input_ids"]
    with torch.no_grad():
        cache = model.new_cache(len(tokens), 40)
        steps = [model.logits(tokens[:, :32], cache)[:, -1:]]
        steps += [model.logits(tokens[:, at : at + 1], cache) for at in range(32, 40)]
    assert largest(torch.cat(steps, dim=1), golden["kvcache_logits_pos31_39"]) < 5e-5
    with torch.no_grad():
        cache = model.new_cache(len(tokens), 40)
        model.logits(tokens[:, :32], cache)
        cache.position -= 1  # the next token overwrites the last one
        wrong = model.logits(tokens[:, 32:33], cache)
    assert largest(wrong, golden["kvcache_logits_pos31_39"][:, 1:2]) > 1e-2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a_ln_headrotary_swiglu", {"positional_embedding_type": "rotary"}),
        ("c_gainlp_qknorm_rotary_swiglutorch", {"positional_embedding_type": "none"}),
        ("a_ln_headrotary_swiglu", {"norm_eps": 1e-2}),
    ],
)
def test_the_golden_files_notice_another_architecture(read_case, name, change):
    path, golden = read_case(name)
    model = open_lm.load(path, golden["params"] | change)
    with torch.no_grad():
        assert largest(model.logits(golden["input_ids"]), golden["logits"]) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_the_golden_files_notice_swapped_matrices(read_case, name):
    path, golden = read_case(name)
    for weight in ("feed_forward.w12", "attention.in_proj"):
        model = open_lm.load(path, golden["params"])
        for parameter_name, parameter in model.named_parameters():
            if weight in parameter_name:
                parameter.data = parameter.data.roll(golden["params"]["dim"] if "in_proj" in weight else 512, 0)
        with torch.no_grad():
            assert largest(model.logits(golden["input_ids"]), golden["logits"]) > 1e-2
        assert max(gradient_errors(model, golden).values()) > 1e-2


def trajectory(path, golden, **changes):
    """Six AdamW steps on one batch by our engine and schedule: (lr, loss and gradient norm of each, final weights)."""
    hp = golden["train_traj"]["hp"]
    keys = {
        "lr": hp["lr"],
        "min_lr": hp["lr_cooldown_end"],
        "beta1": hp["betas"][0],
        "beta2": hp["betas"][1],
        "eps": hp["eps"],
        "weight_decay": hp["wd"],
        "clip": hp["clip"],
    }
    optimizer = OptimizerConfig(**(keys | changes))
    training = TrainingConfig(
        steps=hp["total_steps"], warmup_steps=hp["warmup"], global_batch_size=1, micro_batch_size=1
    )

    def train():
        model = open_lm.load(path, golden["params"])
        engine = TorchEngine(model, optimizer, training, ParallelGroups.create(ParallelConfig()))
        lrs, losses, norms = [], [], []
        tokens, targets = golden["input_ids"], golden["targets"]
        weight = torch.full(targets.shape, 1 / targets.numel())
        for step in range(hp["total_steps"]):
            lrs.append(learning_rate(step, optimizer, training))
            loss = model(tokens, targets, weight, z_loss=hp["z"]).loss.sum() * engine.loss_scale
            loss.backward()
            losses.append(loss.item())
            norms.append(engine.step(lrs[-1]))
        return lrs, losses, norms, {name: p.detach().numpy() for name, p in model.named_parameters()}

    return run_ranks(1, train)[0]


def assert_golden_trajectory(found, golden) -> None:
    lrs, losses, norms, final = found
    expected = golden["train_traj"]
    assert lrs == pytest.approx([float(lr) for lr in expected["lr"]], rel=1e-6)
    assert losses == pytest.approx([float(loss) for loss in expected["loss"]], abs=1e-4)
    assert norms == pytest.approx([float(norm) for norm in expected["grad_norm"]], abs=5e-4)
    for name, values in final.items():
        assert largest(torch.from_numpy(values), expected["final_state_dict"][name]) < 2e-3, name


@pytest.mark.parametrize("name", CASES)
def test_six_steps_of_adamw(read_case, name):
    path, golden = read_case(name)
    assert_golden_trajectory(trajectory(path, golden), golden)


@pytest.mark.parametrize("change", [{"beta2": 0.98}, {"weight_decay": 0.0}, {"clip": 0.0}, {"min_lr": 3e-4}], ids=str)
def test_the_trajectory_notices_other_settings(read_case, change):
    path, golden = read_case(CASES[0])
    found = trajectory(path, golden, **change)
    with pytest.raises(AssertionError):
        assert_golden_trajectory(found, golden)


SHAPE = ModelConfig(hidden=32, layers=2, heads=4, ffn=48)
RANGES = ((0, 60), (70, 110))


def make_model(dtype=torch.float32, seed=0, **changes) -> GPT:
    model = GPT(replace(SHAPE, **changes), 128, RANGES, choose_ops(torch.device("cpu"), dtype)).to(dtype)
    model.initialise(seed)
    return model


VARIANTS = [
    {},
    {"positions": "rotary"},
    {"positions": "rotary", "qk_norm": True, "norm": "rms_norm"},
    {"norm": "layer_norm_gain_only", "qk_norm": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_do_not_reach_earlier_logits(changes, dtype):
    model = make_model(dtype, **changes)
    tokens = torch.randint(0, 110, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 110
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7]) and not torch.equal(before[:, 8:], after[:, 8:])


def test_the_causality_check_notices_a_look_ahead():
    ops = replace(
        choose_ops(torch.device("cpu"), torch.float32),
        attention=lambda q, k, v, mask: reference.attention(q, k, v, torch.ones(1, 1, 12, 12, dtype=torch.bool)),
    )
    model = GPT(SHAPE, 128, RANGES, ops)
    model.initialise(0)
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with torch.no_grad():
        before = model.logits(tokens)
        tokens[:, 7] = 1
        assert not torch.equal(before[:, :7], model.logits(tokens)[:, :7])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_left_padding_changes_nothing(changes):
    model = make_model(**changes)
    lengths, width, extra = [9, 1, 4, 6], 9, 5
    tokens = torch.randint(0, 110, (4, width + extra), generator=torch.Generator().manual_seed(0))
    first = torch.tensor([width - length for length in lengths])
    padded = tokens.clone()
    for row, length in enumerate(lengths):
        padded[row, : width - length] = 59

    def cached(start):
        with torch.no_grad():
            cache = model.new_cache(4, width + extra, start)
            steps = [model.logits(padded[:, :width], cache)]
            steps += [model.logits(padded[:, at : at + 1], cache) for at in range(width, width + extra)]
        return torch.cat(steps, dim=1)

    found, unaware = cached(first), cached(None)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model.logits(tokens[row : row + 1, width - length :])[0]
        torch.testing.assert_close(found[row, width - length :], expected, atol=2e-5, rtol=1e-5)
        if length < width:
            assert largest(unaware[row, width - length :], expected) > 1e-3
    assert torch.isfinite(found).all()


def test_next_logits_are_columns_of_the_last_logits():
    model = make_model(positions="rotary")
    tokens = torch.randint(0, 110, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.next_logits(tokens, model.new_cache(3, 8), slice(70, 110))
        torch.testing.assert_close(found, model.logits(tokens)[:, -1, 70:110])


def test_forward_equals_the_loss_of_the_logits():
    model = make_model(torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (2, 9), generator=generator)
    targets = torch.randint(70, 110, (2, 9), generator=generator)
    targets[0, :3] = IGNORE
    weight = torch.rand(2, 9, generator=generator)
    with torch.no_grad():
        logits = model.output(model.hidden_states(tokens))
        unused = [c for c in range(128) if not any(start <= c < end for start, end in RANGES)]
        logits[..., unused] = float("-inf")
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weight
        torch.testing.assert_close(model(tokens, targets, weight).loss, expected.flatten())


def test_initial_weights_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = make_model(seed=3).state_dict()
    torch.manual_seed(2)
    torch.rand(5)
    again, deeper = make_model(seed=3).state_dict(), make_model(seed=3, layers=3).state_dict()
    for name, values in first.items():
        assert torch.equal(values, again[name]) and torch.equal(values, deeper[name]), name
    other = make_model(seed=4).state_dict()
    matrices = [name for name, values in first.items() if values.dim() == 2]
    assert matrices and not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({first[name].flatten()[0].item() for name in matrices}) == len(matrices)


def test_initial_weights_have_open_lms_spread():
    model = make_model(hidden=128, layers=3, ffn=256, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        nominal = (256 if "w3" in name else 128) ** -0.5
        if "out_proj" in name or "w3" in name:
            nominal /= (2 * (int(name.split(".")[1]) + 1)) ** 0.5
        assert parameter.abs().max() <= 3 * nominal, name
        assert parameter.std().item() == pytest.approx(0.9866 * nominal, rel=0.03), name  # normal, cut at 3


def test_no_process_group_is_left():
    assert not dist.is_initialized()
