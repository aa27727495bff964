"""The fused kernels against the definition in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and isinstance(triton.language.sum, triton.runtime.JITFunction):
    pytest.skip("there is no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from coeffdiff.method import chunked, triton_kernels, verified  # noqa: E402
from coeffdiff.method.attention import mixed_attention, reference_attention  # noqa: E402
from coeffdiff.method.triton_kernels import unsupported  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []

# The interpreter cuts bfloat16 off where a GPU rounds: two units in the last place instead of one.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}
NAMES = ("out", "dq", "dk", "dv", "dcoeff")


def inputs(batch, heads, queries, keys, width, dtype=torch.float32):
    """q, k, v, dOut and coeff, none contiguous: [B, tokens, H, D] seen as [B, H, tokens, D], and a transposed matrix."""
    generator = torch.Generator().manual_seed(0)

    def projected(tokens):
        return torch.randn(batch, tokens, heads, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)

    coeff = (torch.eye(heads) + 0.3 * torch.randn(heads, heads, generator=generator)).to(DEVICE).T
    return projected(queries), projected(keys), projected(keys), projected(queries), coeff


def fused(q, k, v, grad, coeff, mask=None, scale=0.5):
    """Output, four gradients, and the log-sum-exp."""
    assert not unsupported(q, k, mask)
    out, lse = triton_kernels.forward(q, k, v, coeff, mask, scale)
    return [out, *triton_kernels.backward(grad, q, k, v, coeff, mask, lse, scale)], lse


def definition(q, k, v, grad, coeff, mask=None, scale=0.5):
    """The same in float64, with autograd's gradients."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (q, k, v, coeff)]
    mask = None if mask is None else mask.double()
    out = reference_attention(*leaves, mask, scale)
    scores = q.double() @ k.double().mT * scale + (0 if mask is None else mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())], scores.logsumexp(-1)


def check(tensors, **options):
    """Every result within its dtype's tolerance of the largest number in the tensor that the definition gives."""
    (got, lse), (want, want_lse) = fused(*tensors, **options), definition(*tensors, **options)
    q, k, v, _, coeff = tensors
    for name, one, other, like in zip(NAMES, got, want, (q, q, k, v, coeff), strict=True):
        assert one.dtype == like.dtype and one.shape == like.shape and one.is_contiguous(), name
        error = ((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3)).item()
        assert error < TOLERANCE[one.dtype], f"{name} is {error:.1e} away"
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


# batch, heads, queries, keys, width. In the interpreter each program takes long, so tiles are few: two where one would do.
SDXLS_HEADS = [((1, 10, 35, 77, 64), torch.float16), ((1, 20, 9, 50, 64), torch.float16)]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 3, 17, 33, 8), torch.float32),  # all keys in one tile
        ((1, 2, 19, 131, 40), torch.float32),  # several tiles, log-sum-exp from a pass of its own
        ((1, 2, 32, 160, 16), torch.float32),  # tiles that fit exactly
        ((1, 1, 1, 1, 2), torch.float32),
        ((1, 7, 5, 9, 128), torch.float32),  # heads that do not share out evenly: 2 + 2 + 2 + 1
        ((2, 3, 37, 50, 64), torch.bfloat16),
        ((1, 3, 40, 135, 80), torch.bfloat16),
        ((1, 6, 35, 77, 64), torch.float16),  # two tiles of columns, and heads in two groups
        ((1, 17, 3, 5, 64), torch.float16),  # 5 + 5 + 5 + 2 heads, padded to 32
        *(SDXLS_HEADS if GPU else []),
    ],
    ids=str,
)
def test_output_and_gradients_follow_the_definition(sizes, dtype):
    """float32 to 1e-5; float16 and bfloat16 to the rounding of their results and of the operands of the products."""
    check(inputs(*sizes, dtype=dtype))


def test_long_sides_are_walked_without_splitting(monkeypatch):
    """With ENOUGH_PROGRAMS = 1 no program shares its columns: the loops run over several tiles in all kernels."""
    monkeypatch.setattr("coeffdiff.method.triton_kernels.ENOUGH_PROGRAMS", 1)
    check(inputs(1, 2, 33, 131, 8))


MASKS = {
    "one per key": lambda b, h, q, k: torch.sin(torch.arange(k)).view(1, 1, 1, k),
    "all different": lambda b, h, q, k: torch.sin(torch.arange(b * h * q * k)).view(b, h, q, k),
    "minus infinity": lambda b, h, q, k: torch.zeros(1, 1, q, k).masked_fill(
        torch.ones(q, k).triu(k - q + 1).bool(), -math.inf
    ),
}


@pytest.mark.parametrize(
    ("mask", "keys"), [("one per key", 18), ("all different", 131), ("minus infinity", 131)]
)
def test_masks_are_added(mask, keys):
    """A mask that is broadcast, a full one, and one that hides keys: other ones from query to query."""
    sizes = (2, 2, 33, keys)
    check(inputs(*sizes, 4, dtype=torch.float16), mask=MASKS[mask](*sizes).to(DEVICE))


def test_a_mask_may_hide_the_first_tiles():
    """Only the last of 150 keys is seen: out = (row sum of coeff) * its value, and nothing is NaN."""
    q, k, v, _, coeff = inputs(1, 2, 3, 150, 4)
    mask = torch.full((1, 1, 1, 150), -math.inf, device=DEVICE)
    mask[..., -1] = 0
    out, _ = triton_kernels.forward(q, k, v, coeff, mask, 0.5)
    torch.testing.assert_close(out, (coeff.sum(1).view(1, 2, 1, 1) * v[:, :, -1:]).expand_as(out))


def test_one_key_gets_all_attention():
    """The only map is 1: out = (row sum of coeff) * v, and q and k get no gradient."""
    tensors = inputs(2, 3, 5, 1, 8)
    (out, dq, dk, _, _), _ = fused(*tensors)
    _, _, v, _, coeff = tensors
    torch.testing.assert_close(out, (coeff.sum(1).view(1, 3, 1, 1) * v).expand_as(out))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@pytest.mark.parametrize("keys", [50, 131])
def test_the_identity_is_ordinary_attention(keys):
    """coeff = I gives F.scaled_dot_product_attention."""
    q, k, v, _, _ = inputs(2, 3, 37, keys, 8)
    out, _ = triton_kernels.forward(q, k, v, torch.eye(3, device=DEVICE), None, 8**-0.5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_coefficients_may_be_negative_and_large():
    """2*A0 - 2*A1 and 300 times a map, relative to what that makes of the output."""
    q, k, v, grad, _ = inputs(1, 2, 11, 50, 8)
    check((q, k, v, grad, torch.tensor([[2.0, -2.0], [-300.0, 0.0]], device=DEVICE)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [2, 256])
def test_a_small_alpha_on_the_diagonal_is_not_lost(dtype, keys):
    """Two equal heads subtracted leave alpha alone, where bfloat16's 1 + 0.0039 = 1 would leave zero.

    The maps are even, so with v = 8 for one half of the keys and 0 for the other out is 0.0039 * 4; the two diagonal
    entries of dcoeff are <dOut v^T, A> = 3 * 4.
    """
    q, k = torch.zeros(1, 2, 1, 3, dtype=dtype), torch.ones(1, 2, keys, 3, dtype=dtype)
    v = torch.zeros_like(k)
    v[:, :, ::2] = 8
    grad = torch.ones_like(q)
    grad[:, 1] = 0
    coeff = torch.tensor([[1.0039, -1.0], [0.0, 1.0]])
    (out, _, _, dv, dcoeff), _ = fused(*(x.to(DEVICE) for x in (q, k, v, grad, coeff)))
    assert out[0, 0].flatten().tolist() == pytest.approx([0.0156] * 3, rel=0.008)
    assert dv[0, 0].flatten().tolist() == pytest.approx([0.0039 / keys] * 3 * keys, rel=0.008)
    assert dcoeff.flatten().tolist() == pytest.approx([12, 12, 0, 0])


def test_large_scores_do_not_overflow():
    """Scores of +-1,000: each map is [1, 0], and a padded key, whose score would be 0, does not swamp the lower one."""
    q = torch.full((1, 1, 1, 1), 1000.0, device=DEVICE)
    k = torch.tensor([-1.0, -3.0], device=DEVICE).view(1, 1, 2, 1)
    for repeats in (1, 70):  # one tile; three
        keys = k.repeat(1, 1, repeats, 1)
        (out, *gradients), lse = fused(q, keys, keys + 5, q / 1000, torch.eye(1, device=DEVICE), scale=1.0)
        assert out.item() == pytest.approx(4.0, rel=1e-3)
        assert lse.item() == pytest.approx(-1000 + math.log(repeats))
        assert all(tensor.isfinite().all() for tensor in gradients)


def test_equal_calls_give_equal_bits():
    """No atomics: forward and all gradients repeat exactly."""
    q, k, v, grad, coeff = inputs(1, 2, 33, 131, 8, dtype=torch.float16)

    def call():
        out, lse = triton_kernels.forward(q, k, v, coeff, None, 0.5)
        return out, lse, *triton_kernels.backward(grad, q, k, v, coeff, None, lse, 0.5)

    assert all(torch.equal(one, other) for one, other in zip(call(), call(), strict=True))


def test_an_expanded_gradient_is_read_through_its_strides():
    """The gradient of out.sum() is a single 1 with strides 0."""
    q, k, v, _, coeff = inputs(1, 2, 5, 9, 4)
    check((q, k, v, torch.ones((), device=DEVICE).expand(q.shape), coeff))


def test_what_goes_elsewhere_is_said_in_plain_words():
    """unsupported names the reason; for inputs that fit it has none."""
    q, k, _, _, _ = inputs(1, 2, 5, 7, 4)
    mask = torch.zeros(1, 1, 5, 7, device=DEVICE)
    assert unsupported(q, k, mask) == ""
    assert "not float64" in unsupported(q.double(), k.double(), None)
    assert "not boolean" in unsupported(q, k, mask.bool())
    assert "float32 mask, not float64" in unsupported(q, k, mask.double())
    wide = torch.zeros(1, 2, 5, 160, device=DEVICE)
    assert "up to 128 wide, not 160" in unsupported(wide, wide, None)
    many = torch.zeros(1, 33, 5, 4, device=DEVICE)
    assert "up to 32 heads, not 33" in unsupported(many, many, None)
    assert "nothing to attend to" in unsupported(q, k[:, :, :0], None)


def test_a_triton_without_knobs_is_asked_through_the_environment(monkeypatch):
    """Triton 3.2 and 3.3 (torch 2.6 and 2.7) have no triton.knobs; the module imports there all the same."""
    monkeypatch.delattr(triton, "knobs")
    for value, interpreted in (("1", True), ("0", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        copy = importlib.util.module_from_spec(triton_kernels.__spec__)
        triton_kernels.__spec__.loader.exec_module(copy)
        assert copy.INTERPRETED.value == interpreted


def test_the_operator_runs_the_kernels():
    """mixed_attention(backend="fused") through autograd gives what the definition gives, and opcheck passes."""
    q, k, v, grad, coeff = inputs(1, 2, 3, 5, 4)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, coeff)]
    out = mixed_attention(*leaves, scale=0.5, backend="fused")
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for one, other in zip(got, definition(q, k, v, grad, coeff)[0], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert_registered("fused")


def assert_registered(backend):
    """opcheck passes for both operators."""
    q, k, v, grad, coeff = inputs(1, 1, 3, 5, 4)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, coeff)]
    forward, backward = torch.ops.coeffdiff.mixed_attention, torch.ops.coeffdiff.mixed_attention_backward
    torch.library.opcheck(forward.default, (*leaves, None, 0.5, backend))
    _, kept = forward(q, k, v, coeff, None, 0.5, backend)
    torch.library.opcheck(backward.default, (grad, q, k, v, coeff, None, kept, 0.5, backend))


# What "auto" makes of the kernels on a GPU


@pytest.fixture
def verdicts(monkeypatch):
    """None yet, as at the start of a process."""
    found = {}
    monkeypatch.setattr("coeffdiff.method.verified._verdicts", found)
    return found


def through(module, q, k, v, grad, coeff, mask=None, scale=0.5):
    """Output and gradients of a backend's two functions."""
    out, kept = module.forward(q, k, v, coeff, mask, scale)
    return [out, *module.backward(grad, q, k, v, coeff, mask, kept, scale)]


@pytest.mark.parametrize(
    ("keys", "dtype"), [*((9, dtype) for dtype in TOLERANCE), (131, torch.bfloat16)], ids=str
)
def test_kernels_that_are_right_are_used(verdicts, keys, dtype, recwarn):
    """Theirs bit for bit, compared once for each shape and way, without drawing from anybody's generator."""
    before = torch.get_rng_state()
    tensors, mask = inputs(1, 2, 5, keys, 4, dtype=dtype), torch.zeros(1, 1, 1, keys, device=DEVICE)
    masks = (None, mask) if keys == 9 else (mask,)
    for hidden in masks:
        want = through(triton_kernels, *tensors, mask=hidden)
        for _ in range(2):
            got = through(verified, *tensors, mask=hidden)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert list(verdicts.values()) == [True] * 2 * len(masks)
    assert torch.equal(torch.get_rng_state(), before)
    assert not [warning for warning in recwarn if "fused" in str(warning.message)]


def spoiled(results, at):
    """A backend's results, one number of one of them wrong by a twentieth of the largest."""
    results = [result.clone() for result in results]
    results[at].view(-1)[-1] += 0.05 * results[at].abs().max()
    return tuple(results)


def not_a_number(results):
    return tuple(torch.full_like(result, math.nan) for result in results)


def broken(results):
    raise RuntimeError("out of resource: shared memory\nRequired: 1")


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda results: spoiled(results, 0), r"their (out|dq) differs by \d"),
        (
            lambda results: spoiled(results, -1 if len(results) == 4 else 0),
            r"their (out|dcoeff) differs by \d",
        ),
        (not_a_number, r"their (out|dq) differs by nan"),
        (broken, r"failed with RuntimeError: out of resource: shared memory\."),
    ],
    ids=["wrong", "wrong at the end", "NaN", "failing"],
)
def test_kernels_that_are_wrong_are_replaced_by_chunks(verdicts, monkeypatch, way, spoil, sentence):
    """Bit for bit, with one warning that says why, however often they would have been used."""
    tensors = inputs(1, 2, 5, 9, 4, dtype=torch.bfloat16)
    right = through(triton_kernels, *tensors)
    good = getattr(triton_kernels, way)
    monkeypatch.setattr(triton_kernels, way, lambda *a: spoil(good(*a)))
    with pytest.warns(
        RuntimeWarning, match=rf"not used here \({way}, 2 heads, 5 x 9 .*: .*{sentence}"
    ) as said:
        got = through(verified, *tensors)
        again = through(verified, *tensors)
    assert len([one for one in said if "fused" in str(one.message)]) == 1
    chunks = through(chunked, *tensors)
    want = chunks if way == "forward" else [right[0], *chunks[1:]]
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, got, strict=True))


def test_too_little_memory_is_no_verdict(verdicts, monkeypatch):
    """It is the training's own trouble, and is told where all of it is told."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("coeffdiff.method.triton_kernels.forward", full)
    q, k, v, _, coeff = inputs(1, 2, 5, 9, 4)
    with pytest.raises(torch.OutOfMemoryError):
        verified.forward(q, k, v, coeff, None, 0.5)
    assert not verdicts


def test_auto_compares_before_it_trusts(verdicts, monkeypatch):
    """Where the choice falls on fused, auto goes by the comparison; who asks for fused by name gets just that."""
    monkeypatch.setattr("coeffdiff.method.attention._choice", lambda q, k, mask: ("fused", "spy"))
    q, k, v, grad, coeff = inputs(1, 2, 3, 5, 4)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, coeff)]
    named = mixed_attention(*leaves, backend="fused")
    torch.autograd.grad(named, leaves, grad)
    assert not verdicts
    out = mixed_attention(*leaves)
    torch.autograd.grad(out, leaves, grad)
    assert torch.equal(out, named) and len(verdicts) == 2
    assert_registered("checked")
