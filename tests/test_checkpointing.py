"""Activation checkpointing: the same bits as without, and whatever a forward moves moves once a step.

Two layers in a row, each in its own checkpoint, so that there is more than one recomputation in a backward pass.
"""

import copy

import pytest
import torch
from torch import library, nn
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, FlashMoEConfig

LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2}
EVERYTHING = {**LOSSES, "track_expert_usage": True}
both_modes = pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])


class Block(nn.Module):
    """What a decoder has around the layer: something before it, in the same checkpoint, and a residual."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.moe = FlashMoE(config)

    def forward(self, x, attention_mask=None):
        return x + self.moe(self.norm(x), attention_mask)[0]


class Stack(nn.Module):
    def __init__(self, use_reentrant=None, compiler=None, **changes):
        super().__init__()
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
        self.blocks = nn.ModuleList(Block(FlashMoEConfig(**{**sizes, **changes})) for _ in range(2))
        self.use_reentrant = use_reentrant
        self.calls = [
            torch.compile(block, fullgraph=True, backend=compiler) if compiler else block for block in self.blocks
        ]

    def forward(self, x, attention_mask=None):
        for call in self.calls:
            if self.use_reentrant is None:
                x = call(x, attention_mask)
            else:
                x = checkpoint(call, x, attention_mask, use_reentrant=self.use_reentrant)
        return x

    def router_loss(self):
        return sum(block.moe.router_loss for block in self.blocks)


def make_twins(device, use_reentrant, compiler=None, **changes):
    """The same stack without and with checkpointing."""
    stacks = []
    for mode in (None, use_reentrant):
        torch.manual_seed(0)
        stacks.append(Stack(mode, compiler, **changes).to(device))
    return stacks


def make_data(device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 12, generator=generator).to(device).requires_grad_()
    mask = torch.rand(2, 5, generator=generator).to(device) < 0.7
    return x, mask


def step(stack, device, masked=False, seed=1, scale=1.0):
    """One forward and backward; the input's gradient. Parameters accumulate theirs."""
    x, mask = make_data(device, seed)
    loss = stack(x, mask if masked else None).square().mean()
    if stack.blocks[0].moe.config.router_z_loss_coef > 0:
        loss = loss + stack.router_loss()
    (scale * loss).backward()
    return x.grad


def state_of(stack):
    gradients = {f"grad of {name}": parameter.grad for name, parameter in stack.named_parameters()}
    return {**gradients, **dict(stack.named_buffers())}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@both_modes
@masked_or_not
@pytest.mark.parametrize("router_norm", ["batch", "rms", "none"])
def test_two_steps_leave_the_same_gradients_and_buffers(router_norm, masked, use_reentrant, device):
    plain, checkpointed = make_twins(device, use_reentrant, router_norm=router_norm, **EVERYTHING)
    for seed in (1, 2):
        expected, actual = (step(stack, device, masked, seed) for stack in (plain, checkpointed))
        assert torch.equal(actual, expected)
        assert torch.equal(checkpointed.router_loss(), plain.router_loss())
    assert_same_bits(state_of(checkpointed), state_of(plain))
    assert checkpointed.blocks[0].moe.expert_usage().counts.sum() > 0
    if router_norm == "batch":
        assert checkpointed.blocks[0].moe.router_norm.num_batches_tracked == 2


@both_modes
def test_statistics_have_moved_before_the_backward(use_reentrant, device):
    """Not put off until the recomputation, which an evaluation in between would miss."""
    plain, checkpointed = make_twins(device, use_reentrant, **EVERYTHING)
    for stack in (plain, checkpointed):
        stack(make_data(device)[0])
    assert_same_bits(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))
    assert checkpointed.blocks[0].moe.router_norm.num_batches_tracked == 1


@both_modes
@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_router_loss_gives_its_gradient_once_at_any_scale(scale, use_reentrant, device):
    """Multiplied as a ``GradScaler`` or gradient accumulation does."""
    plain, checkpointed = make_twins(device, use_reentrant, **LOSSES)
    expected, actual = (step(stack, device, scale=scale) for stack in (plain, checkpointed))
    assert torch.equal(actual, expected)
    assert_same_bits(state_of(checkpointed), state_of(plain))


@both_modes
def test_router_loss_left_out_gives_no_gradient(use_reentrant, device):
    """Not even in the step after one that used it."""
    plain, checkpointed = make_twins(device, use_reentrant, **LOSSES)
    step(checkpointed, device)
    checkpointed.zero_grad()
    for stack in (plain, checkpointed):
        stack(make_data(device)[0]).square().mean().backward()
    gradients = [[parameter.grad for parameter in stack.parameters()] for stack in (plain, checkpointed)]
    assert all(torch.equal(actual, expected) for expected, actual in zip(*gradients, strict=True))


@both_modes
def test_two_forwards_before_their_backwards(use_reentrant, device):
    plain, checkpointed = make_twins(device, use_reentrant, **LOSSES)
    for stack in (plain, checkpointed):
        losses = []
        for seed, scale in ((1, 0.5), (2, 3.0)):
            y = stack(make_data(device, seed)[0])
            losses.append(scale * (y.square().mean() + stack.router_loss()))
        for loss in losses:
            loss.backward()
    assert_same_bits(state_of(checkpointed), state_of(plain))


@both_modes
def test_router_loss_may_be_returned_from_the_checkpoint(use_reentrant, device):
    plain, checkpointed = make_twins(device, use_reentrant, **LOSSES)
    expected = step(plain, device)
    x, _ = make_data(device)
    y, total = x, 0.0
    for block in checkpointed.blocks:
        y, loss = checkpoint(lambda x, block=block: (block(x), block.moe.router_loss), y, use_reentrant=use_reentrant)
        total = total + loss
    (y.square().mean() + total).backward()
    assert torch.equal(x.grad, expected)
    assert_same_bits(state_of(checkpointed), state_of(plain))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # under the outer no_grad
@pytest.mark.parametrize("inner", [False, True], ids=["inner not reentrant", "inner reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["outer not reentrant", "outer reentrant"])
def test_checkpoints_within_checkpoints(outer, inner, device):
    plain, checkpointed = make_twins(device, inner, **EVERYTHING)
    expected = step(plain, device)
    x, _ = make_data(device)
    y = checkpoint(checkpointed, x, use_reentrant=outer)
    (y.square().mean() + checkpointed.router_loss()).backward()
    assert torch.equal(x.grad, expected)
    assert_same_bits(state_of(checkpointed), state_of(plain))


def test_router_loss_keeps_no_recomputed_tensor_alive(device):
    """Else checkpointing would save no memory: every block's activations would stay until its next forward."""
    stack = make_twins(device, False, **LOSSES)[1]
    loss = stack(make_data(device)[0]).square().mean()
    first = [block.moe.router_loss for block in stack.blocks]
    (loss + sum(first)).backward()
    assert all(block.moe.router_loss is value for block, value in zip(stack.blocks, first, strict=True))


@both_modes
def test_copies_after_a_checkpointed_step(use_reentrant, device):
    stack = make_twins(device, use_reentrant, **EVERYTHING)[1]
    step(stack, device)
    twin = copy.deepcopy(stack.blocks[0].moe)
    assert twin.router_loss is None
    x = torch.randn(4, 12, device=device)
    assert torch.equal(twin(x)[0], stack.blocks[0].moe(x)[0])


def test_opcheck_of_the_question(device):
    library.opcheck(torch.ops.flash_moe.is_first_forward, (torch.zeros(3, device=device),))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@both_modes
@masked_or_not
def test_checkpoint_around_compiled_blocks(masked, use_reentrant, device):
    # A compiled forward under no_grad gives a loss without a graph, as the documents say.
    changes = {"track_expert_usage": True} if use_reentrant else EVERYTHING
    torch._dynamo.reset()
    plain, checkpointed = make_twins(device, use_reentrant, "aot_eager", **changes)
    expected, actual = (step(stack, device, masked) for stack in (plain, checkpointed))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(state_of(checkpointed), state_of(plain))
    assert checkpointed.blocks[0].moe.router_norm.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.parametrize("is_returned", [False, True], ids=["read afterwards", "returned"])
def test_loss_of_a_compiled_block_in_a_reentrant_checkpoint(is_returned, device):
    """Has no gradient, unless the checkpoint returns it; ``use_reentrant=False`` needs nothing, as tested above."""
    torch._dynamo.reset()
    plain, compiled = make_twins(device, True, "aot_eager", **LOSSES)
    block, twin, call = plain.blocks[0], compiled.blocks[0], compiled.calls[0]
    (x, _), (other, _) = make_data(device), make_data(device)

    def region(x):
        y = call(x)
        return (y, twin.moe.router_loss) if is_returned else (y,)

    y, *returned = checkpoint(region, x, use_reentrant=True)
    (loss,) = returned or (twin.moe.router_loss,)
    assert loss.requires_grad == is_returned
    (y.square().mean() + loss).backward()
    expected = block(other).square().mean()
    torch.testing.assert_close(loss, block.moe.router_loss)
    (expected + block.moe.router_loss if is_returned else expected).backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(state_of(twin), state_of(block))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@both_modes
@pytest.mark.parametrize("losses", [False, True], ids=["no losses", "losses"])
def test_compiled_model_with_checkpoints_in_it(losses, use_reentrant, compiler, device):
    torch._dynamo.reset()
    plain, checkpointed = make_twins(device, use_reentrant, **(EVERYTHING if losses else {"track_expert_usage": True}))
    expected = step(plain, device)
    x, _ = make_data(device)
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager" if losses else compiler)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=losses):
        loss = compiled(x).square().mean()
    (loss + checkpointed.router_loss() if losses else loss).backward()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(state_of(checkpointed), state_of(plain))
    assert checkpointed.blocks[0].moe.router_norm.num_batches_tracked == 1
