"""mixed_attention: values by hand, every backend against the definition, precision, compilation, memory."""

from __future__ import annotations

import builtins
import functools
import math
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from coeffdiff.errors import ConfigError, KernelsUnused, ShapeError
from coeffdiff.method import chunked
from coeffdiff.method.attention import BACKENDS, choose_backend, mixed_attention, mixed_values, unusable
from coeffdiff.method.numerics import exact_products

ANYWHERE = [name for name in BACKENDS if name != "fused"]  # the fused one has tests of its own
every_backend = pytest.mark.parametrize("backend", ANYWHERE)

# For the values by hand: two heads, two keys, and scores that make A0 = [3/4, 1/4] and A1 = [1/2, 1/2]
Q = torch.tensor([[[[math.log(3)]], [[0.0]]]])
K = torch.tensor([[[[1.0], [0.0]], [[1.0], [0.0]]]])


def by_hand(coeff, backend, v0=(4.0, 0.0), v1=(0.0, 12.0)):
    v = torch.tensor([[v0, v1]])[..., None]
    return mixed_attention(Q, K, v, torch.tensor(coeff), backend=backend).flatten()


def close(values):
    return pytest.approx(values, abs=1e-5)


@every_backend
def test_mixing_reaches_what_softmax_cannot(backend):
    """2*A0 - 2*A1 = [1/2, -1/2]: a negative weight, outside the convex hull."""
    assert by_hand([[0.0, 1.0], [2.0, -2.0]], backend, v1=(0.0, 8.0)).tolist() == close([2.0, -4.0])


@every_backend
def test_rows_receive_and_columns_are_used(backend):
    """One entry in row 0, column 1: head 0 gains A1 v0 = 2 on its A0 v0 = 3; head 1 keeps A1 v1 = 6."""
    assert by_hand([[1.0, 1.0], [0.0, 1.0]], backend).tolist() == close([5.0, 6.0])
    assert by_hand([[1.0, 0.0], [1.0, 1.0]], backend).tolist() == close([3.0, 9.0])  # 6 + A0 v1


@every_backend
def test_maps_are_mixed_and_values_are_not(backend):
    """Swapped maps: A1 v0 = 2 and A0 v1 = 3. Swapped values, the function it is not, would give 3 and 2."""
    swap = [[0.0, 1.0], [1.0, 0.0]]
    assert by_hand(swap, backend).tolist() == close([2.0, 3.0])
    v = torch.tensor([[[4.0, 0.0], [0.0, 12.0]]])[..., None]
    swapped = mixed_values(v, torch.tensor(swap))
    assert F.scaled_dot_product_attention(Q, K, swapped).flatten().tolist() == close([3.0, 2.0])


@every_backend
def test_scale_and_mask_by_hand(backend):
    """Doubled scores make 3 : 1 into 9 : 1; adding log 9 to the second key makes it even; True means seen."""
    v, identity = torch.tensor([[[10.0, 0.0], [10.0, 0.0]]])[..., None], torch.eye(2)

    def first_head(**options):
        return mixed_attention(Q, K, v, identity, backend=backend, **options)[0, 0].item()

    assert first_head(scale=2.0) == close(9.0)
    assert first_head(scale=2.0, mask=torch.tensor([0.0, math.log(9)])) == close(5.0)
    assert first_head(mask=torch.tensor([False, True])) == close(0.0)


def inputs(batch, heads, queries, keys, width, dtype=torch.float64, requires_grad=False):
    """q, k, v in the strides that the processor gives them, and a coeff far from the identity, transposed too."""
    generator = torch.Generator().manual_seed(0)

    def projected(tokens):
        drawn = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).transpose(1, 2)

    wide = torch.promote_types(dtype, torch.float32)
    coeff = torch.randn(heads, heads, generator=generator, dtype=torch.float64).to(wide).T
    tensors = projected(queries), projected(keys), projected(keys), coeff
    assert heads == 1 or queries == 1 or not any(tensor.is_contiguous() for tensor in tensors)
    return tuple(tensor.requires_grad_(requires_grad) for tensor in tensors)


def definition(q, k, v, coeff, mask=None, scale=None):
    """Head by head, as the paper writes it."""
    heads, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    full = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    if mask is not None:
        full = full.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else full + mask
    maps = [(q[:, g] @ k[:, g].transpose(-1, -2) * scale + full[:, g]).softmax(-1) for g in range(heads)]
    mixed = [sum(coeff[h, g] * maps[g] for g in range(heads)) for h in range(heads)]
    return torch.stack([mixed[h] @ v[:, h] for h in range(heads)], 1)


def with_gradients(function, tensors):
    """Output and gradients, for an upstream gradient that has no symmetry."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    upstream = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


SIZES = {  # batch, heads, queries, keys, width
    "self": (2, 3, 7, 7, 5),
    "cross": (3, 5, 4, 77, 2),
    "one head": (1, 1, 5, 3, 2),
    "one query": (2, 4, 1, 9, 3),
}
MASKS = {
    "none": lambda b, h, q, k: None,
    "bool, per key": lambda b, h, q, k: (torch.arange(b * k) % 3 != 1).view(b, 1, 1, k),
    "bool, causal": lambda b, h, q, k: torch.ones(q, k, dtype=torch.bool).tril(),
    "bool, per head": lambda b, h, q, k: (torch.arange(h * k) % 4 != 2).view(h, 1, k),
    "added, full": lambda b, h, q, k: torch.sin(torch.arange(b * h * q * k)).view(b, h, q, k),
    "added, per batch": lambda b, h, q, k: torch.cos(torch.arange(b * q * k)).view(b, 1, q, k),
    "added, minus infinity": lambda b, h, q, k: torch.zeros(q, k).index_fill(
        1, torch.tensor([k - 1]), -math.inf
    ),
}


@every_backend
@pytest.mark.parametrize("rows", [None, 1, 3], ids=["one chunk", "chunks of a row", "chunks of 3 rows"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree_with_the_definition(backend, sizes, mask, rows, monkeypatch):
    """Output and the gradients of q, k, v and coeff in float64, to 1e-10."""
    batch, heads, queries, keys, _ = SIZES[sizes]
    tensors, mask = inputs(*SIZES[sizes]), MASKS[mask](batch, heads, queries, keys)
    if rows:
        monkeypatch.setattr(chunked, "chunk_bytes", lambda device, a_row: rows * a_row)
        chunks = list(chunked._chunks(tensors[0], tensors[1]))
        assert len(chunks) == (
            batch * math.ceil(queries / rows) if rows < queries else math.ceil(batch / rows)
        )

    got = with_gradients(lambda *t: mixed_attention(*t, mask=mask, scale=0.7, backend=backend), tensors)
    want = with_gradients(lambda *t: definition(*t, mask=mask, scale=0.7), tensors)
    for name, one, other in zip(("out", "dq", "dk", "dv", "dcoeff"), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("short_row", [1, 1000], ids=["by rows", "flattened"])
@pytest.mark.parametrize("rows", [2, 100], ids=["chunks of 2 rows", "one chunk"])
@pytest.mark.parametrize("heads", [3, 23])
def test_products_of_large_layers_agree_with_the_definition(heads, rows, short_row, monkeypatch):
    """The ways for many queries, long maps and many heads (10 + 10 + 3), at small sizes; float64, to 1e-10."""
    tensors = inputs(2, heads, 7, 5, 4)
    monkeypatch.setattr(chunked, "chunk_bytes", lambda device, a_row: rows * a_row)
    for name, value in (("LONG_SUM", 1), ("LONG_PRODUCT", 1), ("SHORT_ROW", short_row)):
        monkeypatch.setattr(chunked, name, value)
    got = with_gradients(lambda *t: mixed_attention(*t, backend="chunked"), tensors)
    want = with_gradients(definition, tensors)
    for name, one, other in zip(("out", "dq", "dk", "dv", "dcoeff"), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@every_backend
def test_the_identity_is_ordinary_attention(backend):
    """coeff = I gives F.scaled_dot_product_attention, its default scale included."""
    q, k, v, _ = inputs(2, 3, 7, 5, 4)
    mixed = mixed_attention(q, k, v, torch.eye(3, dtype=q.dtype), backend=backend)
    torch.testing.assert_close(mixed, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_the_backward_equations_pass_gradcheck(monkeypatch):
    """Finite differences, without autograd's help: the chunked backward, several chunks, with and without mask."""
    tensors = inputs(2, 3, 5, 4, 2, requires_grad=True)
    monkeypatch.setattr(chunked, "chunk_bytes", lambda device, a_row: 2 * a_row)
    for mask in (None, MASKS["added, full"](2, 3, 5, 4)):
        assert torch.autograd.gradcheck(
            lambda *t, m=mask: mixed_attention(*t, mask=m, backend="chunked"), tensors
        )


def test_large_scores_do_not_overflow():
    """Scores of 2,000 apart leave one map at [1, 0]: out is the first value, and nothing is NaN."""
    q, k = torch.full((1, 1, 1, 1), 1000.0), torch.tensor([[[[1.0], [-1.0]]]])
    for backend in ANYWHERE:
        got = with_gradients(
            lambda *t, b=backend: mixed_attention(*t, backend=b), (q, k, k + 3, torch.eye(1))
        )
        assert got[0].item() == 4.0
        assert all(tensor.isfinite().all() for tensor in got)


# Mixed values, the control


def value_definition(q, k, v, coeff, mask=None):
    """Head by head: its own map, over the values that it mixes."""
    heads = q.shape[1]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    maps = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    mixed = [sum(coeff[h, g] * v[:, g] for g in range(heads)) for h in range(heads)]
    return torch.stack([maps[:, h] @ mixed[h] for h in range(heads)], 1)


@pytest.mark.parametrize("mask", ["none", "bool, per key"])
@pytest.mark.parametrize("sizes", SIZES)
def test_ordinary_attention_over_mixed_values_is_the_control(sizes, mask):
    """Output and the gradients of q, k, v and coeff in float64, to 1e-10; with one head alone that is mixing maps."""
    batch, heads, queries, keys, _ = SIZES[sizes]
    tensors, mask = inputs(*SIZES[sizes]), MASKS[mask](batch, heads, queries, keys)

    def control(q, k, v, coeff):
        return F.scaled_dot_product_attention(q, k, mixed_values(v, coeff), attn_mask=mask)

    got = with_gradients(control, tensors)
    want = with_gradients(lambda *t: value_definition(*t, mask=mask), tensors)
    for name, one, other in zip(("out", "dq", "dk", "dv", "dcoeff"), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    maps = mixed_attention(*tensors, mask=mask)
    assert (maps - got[0]).abs().max() > 0.1 or heads == 1


def test_mixed_values_stay_in_the_hull_that_mixed_maps_leave():
    """2 A0 - 2 A1 over the values [4, 8] is 2 * 5 - 2 * 6, outside them; 2 v0 - 2 v1 is [0, 0], where every map ends."""
    v, coeff = torch.tensor([[[4.0, 8.0], [4.0, 8.0]]])[..., None], torch.tensor([[2.0, -2.0], [0.5, 0.5]])
    assert mixed_attention(Q, K, v, coeff)[0, 0].item() == close(2 * 5.0 - 2 * 6.0)
    assert mixed_values(v, coeff).flatten().tolist() == [0.0, 0.0, 4.0, 8.0]
    assert F.scaled_dot_product_attention(Q, K, mixed_values(v, coeff)).flatten().tolist() == close(
        [0.0, 6.0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_values_are_mixed_in_float32(autocast, dtype):
    """(1.003 - 1) * 8 = 0.024, where coeff in bfloat16 would give 0; what comes out has the values' own dtype."""
    v, coeff = torch.full((1, 2, 1, 3), 8.0, dtype=dtype), torch.tensor([[1.003, -1.0], [0.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = mixed_values(v, coeff)
    assert mixed.dtype == dtype
    assert mixed.flatten().tolist() == pytest.approx([0.024] * 3 + [8.0] * 3, rel=0.004)


def test_the_identity_changes_no_bit_of_the_values():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        _, _, v, _ = inputs(2, 3, 7, 5, 4, dtype=dtype)
        assert torch.equal(mixed_values(v, torch.eye(3)), v)


# Precision


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_inputs_cost_only_their_own_rounding(backend, dtype):
    """Against float64 on the same inputs, output and gradients are wrong by one rounding to their dtype."""
    tensors = inputs(2, 3, 11, 77, 5, dtype=dtype)
    got = with_gradients(lambda *t: mixed_attention(*t, backend=backend), tensors)
    assert [tensor.dtype for tensor in got] == [dtype] * 4 + [torch.float32]
    upstream = torch.sin(torch.arange(got[0].numel(), dtype=dtype)).view_as(got[0]).double()
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = definition(*leaves)
    want = [out, *torch.autograd.grad(out, leaves, upstream)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(one.dtype).eps, atol=2e-5)


@every_backend
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_small_alpha_on_the_diagonal_is_not_lost(backend, dtype, autocast):
    """Two equal heads subtracted leave alpha alone: out = 0.003 A v, where bf16's 1 + 0.003 = 1 leaves zero.

    The map is even, so with v = [8, 0] out is 0.003 * 4, and dv = 0.003 / 2 on each of head 0's values.
    """
    q, k = torch.zeros(1, 2, 1, 3, dtype=dtype), torch.ones(1, 2, 2, 3, dtype=dtype)
    v = torch.tensor([8.0, 0.0], dtype=dtype).view(1, 1, 2, 1).expand(1, 2, 2, 3).clone().requires_grad_()
    coeff = torch.tensor([[1.003, -1.0], [0.0, 1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = mixed_attention(q, k, v, coeff, backend=backend)
        out[0, 0].float().sum().backward()
    assert out.dtype == dtype
    assert out[0, 0].tolist()[0] == pytest.approx([0.012] * 3, rel=0.004)
    assert v.grad[0, 0].flatten().tolist() == pytest.approx([0.0015] * 6, rel=0.004)
    assert coeff.grad.tolist() == [[12.0, 12.0], [0.0, 0.0]]  # <dOut v^T, A> = 3 * 8 / 2


def test_learning_changes_no_bit_of_the_output():
    """The same with and without gradients: matmul takes another path for a coeff that requires them, and must not."""
    q, k, v, coeff = inputs(2, 3, 7, 5, 4, dtype=torch.float32)
    learning = mixed_attention(q, k, v, coeff.clone().requires_grad_(), backend="chunked")
    assert torch.equal(learning, mixed_attention(q, k, v, coeff, backend="chunked"))


# Compilation, checkpointing, what is kept


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_backend
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_it_compiles_into_one_graph(backend, masked, monkeypatch, fresh_compiler):
    """fullgraph, through autograd: equal output and gradients."""
    sizes = (2, 3, 7, 5, 4)
    tensors, mask = inputs(*sizes), MASKS["added, per batch"](2, 3, 7, 5).double() if masked else None
    monkeypatch.setattr(chunked, "chunk_bytes", lambda device, a_row: 2 * a_row)

    def function(*t):
        return mixed_attention(*t, mask=mask, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(with_gradients(compiled, tensors), with_gradients(function, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@every_backend
def test_checkpointing_repeats_the_gradients_bit_for_bit(backend):
    """Non-reentrant checkpointing computes everything twice and changes nothing."""
    tensors = inputs(2, 3, 7, 5, 4, dtype=torch.float32)
    calls = []

    def function(*t):
        calls.append(1)
        return mixed_attention(*t, backend=backend)

    plain = with_gradients(function, tensors)
    again = with_gradients(lambda *t: checkpoint(function, *t, use_reentrant=False), tensors)
    assert len(calls) == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_operators_keep_what_they_tell_the_compiler(dtype, masked):
    """torch.library.opcheck on both: schema, autograd, and shapes and strides of the fakes."""
    q, k, v, coeff = inputs(2, 3, 7, 5, 4, dtype=dtype, requires_grad=True)
    mask = MASKS["added, full"](2, 3, 7, 5).to(coeff.dtype) if masked else None
    forward, backward = torch.ops.coeffdiff.mixed_attention, torch.ops.coeffdiff.mixed_attention_backward
    torch.library.opcheck(forward.default, (q, k, v, coeff, mask, 0.5, "chunked"))
    q, k, v, coeff = (tensor.detach() for tensor in (q, k, v, coeff))
    out, kept = forward(q, k, v, coeff, mask, 0.5, "chunked")
    torch.library.opcheck(
        backward.default, (torch.ones_like(out), q, k, v, coeff, mask, kept, 0.5, "chunked")
    )


def kept_for_backward(backend):
    """Sizes of the tensors that autograd stores in one forward pass with 3 x 50 x 60 maps."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixed_attention(*inputs(1, 3, 50, 60, 2, requires_grad=True), backend=backend)
    return sizes


def test_training_stores_no_map():
    """chunked keeps its inputs and nothing else; the reference keeps maps of all heads."""
    assert max(kept_for_backward("reference")) == 3 * 50 * 60
    assert sorted(kept_for_backward("chunked")) == [0, 3 * 3, 3 * 50 * 2, 3 * 60 * 2, 3 * 60 * 2]


def test_heads_come_out_side_by_side():
    """As projections give them, output and gradients: [B, H, T, D] seen as [B, T, H * D] is no copy."""
    chunks = functools.partial(mixed_attention, backend="chunked")
    found = with_gradients(chunks, inputs(2, 3, 7, 5, 4))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in found[:4])


def test_a_second_derivative_is_refused():
    """Nothing here has one; an error, not zeros."""
    leaves = inputs(1, 3, 7, 5, 4, requires_grad=True)
    out = mixed_attention(*leaves, backend="chunked")
    (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_a_call_in_inference_mode_leaves_later_ones_as_they_were(monkeypatch):
    """As when a model is validated before its first step: what is kept from call to call can still be written to."""
    monkeypatch.setattr(chunked, "_scratch", threading.local())
    tensors = inputs(1, 3, 7, 5, 4)
    with torch.inference_mode():
        inside = mixed_attention(*tensors, backend="chunked").clone()
    assert not chunked._scratch.buffer.is_inference()
    out, *gradients = with_gradients(lambda *t: mixed_attention(*t, backend="chunked"), tensors)
    assert torch.equal(out, inside)
    assert len(gradients) == 4


PRODUCTS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # of a GPU, of a CPU
SWITCHES = {
    "none": lambda: None,
    "oldest": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "older": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),  # transformers' tf32=True
    "newer, of cuDNN": lambda: setattr(
        torch.backends.cudnn, "fp32_precision", "tf32"
    ),  # a GPU's products inherit it
    "newer, of a CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.fixture
def switches():
    """All as in a new process, before and afterwards."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        for switch in (torch.backends, torch.backends.cudnn, *PRODUCTS):
            switch.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.mark.parametrize("switch", SWITCHES)
def test_products_are_not_narrowed_by_whichever_switch(switch, switches):
    """As asked on a GPU; here nothing is computed. Afterwards all switches are as before, what they inherit too."""
    like = SimpleNamespace(is_cuda=True, is_meta=False, device=Q.device)
    SWITCHES[switch]()
    before = [one.fp32_precision for one in PRODUCTS]
    with exact_products(like):
        assert [one.fp32_precision for one in PRODUCTS] == ["ieee", "ieee"]
        assert not torch.backends.cuda.matmul.allow_tf32  # the older switch agrees, or this raises
    assert [one.fp32_precision for one in PRODUCTS] == before
    if switch in ("none", "newer, of all", "newer, of cuDNN"):
        torch.backends.cudnn.fp32_precision = torch.backends.fp32_precision = "ieee"
        assert [one.fp32_precision for one in PRODUCTS] == ["ieee", "ieee"]


@pytest.mark.parametrize("switch", ["older, medium", "newer, of a CPU"])
def test_a_cpu_computes_in_float32_whatever_the_switch(switch, switches):
    """CPUs with bfloat16 products would be off by 5e-3."""
    q, k, v, coeff = inputs(2, 4, 64, 64, 32, dtype=torch.float32)
    SWITCHES[switch]()
    with exact_products(q):
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    exact = mixed_attention(*(t.double() for t in (q, k, v, coeff)), backend="reference")
    for backend in ANYWHERE:
        found = mixed_attention(q, k, v, coeff, backend=backend)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward and backward"])
def test_the_largest_temporary_is_a_chunk(training, monkeypatch):
    """With chunks of 2 rows nothing inside, forward or backward, is larger than three chunks of 3 x 2 x 60 maps."""
    monkeypatch.setattr(chunked, "chunk_bytes", lambda device, a_row: 2 * a_row)
    monkeypatch.setattr(chunked, "_scratch", threading.local())
    sizes = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor))
            return out

    q, k, v, coeff = inputs(1, 3, 50, 60, 2)
    with Watching():
        out, kept = chunked.forward(q, k, v, coeff, None, 0.5)
        if training:
            chunked.backward(torch.ones_like(out), q, k, v, coeff, None, kept, 0.5)
    assert max(sizes) == 3 * (3 * 2 * 60) * 8
    assert len(sizes) > 25


def test_buffers_are_kept_from_call_to_call_and_change_no_result():
    """A larger layer in between, and another dtype, leave the smaller one's output as it was."""
    small, large = inputs(1, 2, 5, 7, 3), inputs(2, 4, 40, 60, 8, dtype=torch.float32)
    first = with_gradients(mixed_attention, small)
    with_gradients(mixed_attention, large)
    for one, other in zip(with_gradients(mixed_attention, small), first, strict=True):
        assert torch.equal(one, other)


# What is refused, and what is chosen


def test_shapes_that_do_not_fit_are_named():
    """Each refusal says what was found and what is expected."""
    q, k, v, coeff = inputs(2, 3, 7, 5, 4)
    with pytest.raises(ShapeError, match=r"coeff must be 3 x 3 for 3 heads, not \(3, 2\)"):
        mixed_attention(q, k, v, coeff[:, :2])
    expected = r"Expected q \[B, H, Q, D\] and k, v \[B, H, K, D\]; got q \(2, 3, 7, 4\), k "
    for other_k, other_v in [(k, v[:, :, :3]), (k[:, :2], v[:, :2]), (k[..., :3], v[..., :3]), (k[0], v[0])]:
        with pytest.raises(ShapeError, match=expected):
            mixed_attention(q, other_k, other_v, coeff)
    with pytest.raises(ShapeError, match=r"must share dtype and device"):
        mixed_attention(q, k.float(), v, coeff)
    for shape in [(2, 5), (3, 7, 4), (1, 2, 3, 7, 5), (2, 2, 1, 1)]:
        with pytest.raises(ShapeError, match=r"A mask of shape .* does not broadcast to \(2, 3, 7, 5\)"):
            mixed_attention(q, k, v, coeff, mask=torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"coeff must be 3 x 3 for 3 heads, not \(2, 3\)"):
        mixed_values(v, coeff[:2])
    for call in (lambda c: mixed_attention(q, k, v, c), lambda c: mixed_values(v, c)):
        with pytest.raises(ShapeError, match="coeff must be on the device of the values, cpu, not on meta"):
            call(coeff.to("meta"))


def test_an_unknown_backend_is_refused_with_the_known_ones():
    """The sentence lists what there is."""
    with pytest.raises(
        ConfigError, match=r"no attention backend 'flash'; there are auto, reference, eager, chunked, fused"
    ):
        mixed_attention(*inputs(1, 3, 5, 7, 2), backend="flash")


def test_the_choice_comes_with_its_reason():
    """choose_backend names a backend and says why, with device and size: 2 * 3 * 512 * 1024 maps are 12 MiB."""
    q, k, _, _ = inputs(2, 3, 512, 1024, 4, dtype=torch.float32)
    name, reason = choose_backend(q, k)
    assert name in BACKENDS
    assert reason.startswith("cpu:") and "12.0 MiB" in reason


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_small_maps_are_stored_and_large_ones_are_not(device):
    """Up to 512 KiB an entry, whatever the batch: 2 * 256 * 256 * 4 bytes are that; one query more is too many."""

    def chosen(batch, queries):
        q, k = (torch.empty(batch, 2, tokens, 4, device=device) for tokens in (queries, 256))
        return choose_backend(q, k)[0]

    assert chosen(1, 256) == chosen(64, 256) == "eager"
    assert chosen(1, 257) == chosen(64, 257) == "chunked"


def test_the_fused_backend_says_where_it_cannot_run(monkeypatch):
    """Without Triton, and on a CPU with it."""
    q, k, v, coeff = inputs(1, 3, 5, 7, 2, dtype=torch.float32)
    monkeypatch.setattr("coeffdiff.method.attention._TRITON", False)
    assert "needs Triton, which is not installed" in unusable("fused", q, k)
    monkeypatch.setattr("coeffdiff.method.attention._TRITON", True)
    monkeypatch.setattr("coeffdiff.method.attention._INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"The fused backend runs on CUDA GPUs, not on cpu\."):
        mixed_attention(q, k, v, coeff, backend="fused")


def test_a_triton_that_fails_at_its_import_leaves_the_chunks_and_its_reason(monkeypatch):
    """As one that does not fit this torch: said once and not tried again; q and k only look like those of a GPU."""
    tried = []

    def fails(name, *rest):
        if name == "coeffdiff.method.triton_kernels":
            tried.append(name)
            raise AttributeError("module 'triton' has no attribute 'knobs'\nand more")
        return imported(name, *rest)

    imported = builtins.__import__
    monkeypatch.setattr("coeffdiff.method.attention._TRITON", True)
    monkeypatch.setattr("coeffdiff.method.attention._unimportable", "")
    monkeypatch.setattr(builtins, "__import__", fails)
    q = SimpleNamespace(device=torch.device("cuda"), shape=(1, 3, 5, 2))
    with pytest.warns(KernelsUnused, match=r"Slower chunks do the attention\. .* whose import failed with"):
        name, reason = choose_backend(q, q)
    assert name == "chunked"
    assert "import failed with AttributeError: module 'triton' has no attribute 'knobs'." in reason
    assert choose_backend(q, q) == (name, reason) and len(tried) == 1


def test_a_chunk_fits_a_cache_and_has_rows_enough(monkeypatch):
    """Maps of 3 heads and 341 keys take 4 KiB a query, so 1.5 MiB hold 384 and 256 take less: of 512 two times 256. Of
    10,000 keys 256 take 31 MB, which half of 64 MiB holds, and half of 8 MiB does not: that has room for 34, so 16
    times 32."""
    q, few, many = (torch.empty(2, 3, tokens, 4) for tokens in (512, 341, 10_000))
    monkeypatch.setattr(chunked, "cache_bytes", lambda: 64 * 2**20)
    assert chunked.chunk_shape(q, few) == (1, 256)
    assert chunked.chunk_shape(q, many) == (1, 256)
    monkeypatch.setattr(chunked, "cache_bytes", lambda: 8 * 2**20)
    assert chunked.chunk_shape(q, many) == (1, 32)
    some, keys = (torch.empty(13, 3, tokens, 4) for tokens in (24, 455))  # 131,040 bytes of maps an entry
    assert chunked.chunk_shape(some, keys) == (12, 24)


@pytest.mark.parametrize(
    ("files", "size"),
    [({"index0": "48K", "index3": "32M"}, 32 * 2**20), ({"index2": "512"}, 512), ({}, 2**23)],
)
def test_the_last_cache_is_read_from_the_system(files, size, tmp_path, monkeypatch):
    """The largest of what Linux lists; 8 MiB where it lists nothing."""
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(text + "\n")
    monkeypatch.setattr(chunked, "_LINUX_CACHES", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert chunked.cache_bytes.__wrapped__() == size


def test_auto_runs_what_was_chosen(monkeypatch):
    """backend="auto" is the default and takes what choose_backend says."""
    asked = []
    monkeypatch.setattr(
        "coeffdiff.method.attention._choice", lambda q, k, mask: asked.append(1) or ("spy", "because")
    )
    monkeypatch.setitem(BACKENDS, "spy", lambda q, *rest: q + 1)
    tensors = inputs(1, 3, 5, 7, 2)
    assert torch.equal(mixed_attention(*tensors), tensors[0] + 1)
    assert asked == [1]
    assert choose_backend(*tensors[:2])[0] == "spy"
