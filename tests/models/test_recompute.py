import copy

import pytest
import torch
from lab_runs import make_run
from models_helpers import CIFAR, images

from cnnlab.models.recompute import FrozenStatistics
from cnnlab.models.resnet import CifarResNet, ResNet


def trained(model, x, steps=2):
    """Losses, gradients, weights and buffers after some updates."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x)["logits"].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return losses, gradients, model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_with_checkpoints_is_bit_identical(momentum):
    options = {**CIFAR, "depth": 20, "stochastic_depth": 0.3, "dropout": 0.2}
    plain, saving = CifarResNet(**options), CifarResNet(**options, checkpoint=True)
    saving.load_state_dict(plain.state_dict(), strict=True)
    for model in (plain, saving):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = momentum
    expected, found = (trained(model, images(8, count=4)) for model in (plain, saving))
    assert all(map(torch.equal, expected[0], found[0]))
    for one, other in zip(expected[1:3], found[1:3], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(expected[3], found[3])


def test_checkpoints_keep_fewer_tensors():
    def saved_bytes(model):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(32))
        return total

    plain, saving = (CifarResNet(**CIFAR, depth=56, checkpoint=c) for c in (False, True))
    assert saved_bytes(saving) < saved_bytes(plain) / 4


def test_evaluation_and_no_grad_need_no_recomputation():
    model = ResNet(**CIFAR, depth=18, checkpoint=True).eval()
    plain = ResNet(**CIFAR, depth=18).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images(32))["logits"], plain(images(32))["logits"])


def test_frozen_statistics_restores_after_an_error():
    norm = torch.nn.BatchNorm2d(3)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(RuntimeError, match="stop"), FrozenStatistics([norm]):
        norm(images(4))
        raise RuntimeError("stop")
    assert norm.momentum == 0.1
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_a_loss_may_be_differentiated_twice():
    """Optimizers that need the curvature (Sophia, Newton-CG) go through the recomputed blocks again."""
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = CifarResNet(**CIFAR, depth=14, checkpoint=checkpoint)
        weights = list(model.parameters())
        loss = model(images(8, count=4))["logits"].square().mean()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        along = sum(g.square().sum() for g in gradients)
        found.append([*torch.autograd.grad(along, weights, allow_unused=True)])
        momenta = {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert momenta == {0.1}
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_compiles_whole():
    torch._dynamo.reset()
    model = CifarResNet(**CIFAR, depth=8, checkpoint=True)
    plain = CifarResNet(**CIFAR, depth=8)
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(8)
    compiled(x)["logits"].square().sum().backward()
    plain(x)["logits"].square().sum().backward()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_net_of_1202_layers_takes_the_same_step_in_a_fraction_of_the_memory():
    """One real update, as the command line's: losses, weights and running statistics bit for bit; the batch norms have
    counted one batch, not two. Both steps together take 5 s on one core."""
    seen = {}
    for checkpoint in (False, True):
        run = make_run(
            "data=shapes", "data.limit=null", "data.train=4", "data.val=7", "data.test=7", "data.size=32",
            "model=resnet1202", f"model.checkpoint={str(checkpoint).lower()}", "trainer.batch_size=2", "stats=off",
        )  # fmt: skip
        batch, count = next(run.batches())
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        run.model.train()
        with run.observer(0) as look, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run.step(batch, count, 0, look)
        seen[checkpoint] = result.sample_loss, run.model.state_dict(), kept
    (loss, state, whole), (same_loss, same_state, part) = seen[False], seen[True]
    assert torch.equal(loss, same_loss)
    assert state.keys() == same_state.keys()
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    assert same_state["layer3.199.bn2.num_batches_tracked"] == 1
    assert part < whole / 10
