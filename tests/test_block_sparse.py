"""Attention under a block mask, and dense, on every backend against an fp64 oracle.

The kernel's tests run on a GPU where there is one and else, with the same small cases, in Triton's interpreter.
"""

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from keysift.ops import fa4
from keysift.ops.block_sparse import block_sparse_attention, block_sparse_attention_varlen
from keysift.ops.dense import dense_attention, dense_attention_lse
from keysift.types import KV, BlockMask
from tests.devices import CUDA, DEVICES, ON_GPU
from tests.helpers import close, generator, oracle

triton = pytest.importorskip("triton", reason="triton is not installed")
kernels = importlib.import_module("keysift.ops.block_sparse_triton")

BF16, FP16 = torch.bfloat16, torch.float16


class Case(NamedTuple):
    tokens: int
    keys: int
    group: int = 1
    dim: int = 64
    v_dim: int = 64
    block: int = 64
    dtype: torch.dtype = BF16
    tma: bool = True
    block_n: int | None = None
    kv_heads: int = 1
    batch: int = 1


SMALL = [
    Case(1, 1, block=16, kv_heads=2, batch=2),
    Case(63, 63, group=4, block=32, dtype=FP16),
    Case(63, 63, block=32, tma=False, kv_heads=2, batch=2),
    Case(100, 100, group=7, block=64),
    Case(37, 130, group=4, block=32, dim=96, v_dim=64, dtype=FP16),
    Case(37, 130, block=32, dim=96, v_dim=96, tma=False, kv_heads=2),
    Case(1, 130, group=4, block=128, dim=128, v_dim=128),
    Case(130, 130, block=128, dim=128, v_dim=128, tma=False),
    Case(100, 130, block=64, dim=256, v_dim=256, block_n=32, dtype=FP16),
    Case(100, 130, block=64, dim=256, v_dim=128, block_n=16, tma=False),
    Case(70, 101, block=16, dim=24, v_dim=20, kv_heads=2, tma=False),
    Case(70, 101, block=16, dim=40, v_dim=48, kv_heads=2, batch=2),
]
LARGE = [
    Case(t, n, g, d, dv, block, dtype, tma, None, 2, 2)
    for t, n, g in ((1025, 1025, 4), (1000, 3001, 7), (513, 2048, 1))
    for d, dv in ((64, 64), (128, 128), (96, 64), (256, 256))
    for block in (128, 64, 32, 16)
    for dtype, tma in ((BF16, True), (FP16, False))
]
HOPPER = [case for case in LARGE if case.tma and case.block >= 64 and max(case.dim, case.block) <= 128]


def case_id(case):
    return "-".join(str(x).removeprefix("torch.") for x in case)


@pytest.fixture(autouse=True)
def _every_element_must_be_written():
    """New buffers are full of NaN."""
    with torch.no_grad():
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


def inputs(case, device="cpu", seed=0):
    g = generator(seed)
    q = torch.randn(case.batch, case.tokens, case.kv_heads * case.group, case.dim, generator=g)
    k = torch.randn(case.batch, case.keys, case.kv_heads, case.dim, generator=g)
    v = torch.randn(case.batch, case.keys, case.kv_heads, case.v_dim, generator=g)
    return [x.to(case.dtype).to(device) for x in (q, k, v)]


def poisoned(x, before=5, after=70):
    """``x`` as a view into a buffer of NaN."""
    batch, rows = x.shape[:2]
    buffer = x.new_full((batch, before + rows + after, *x.shape[2:]), math.nan)
    buffer[:, before : before + rows] = x
    return buffer[:, before : before + rows]


def behind_poison(k, v, before=8):
    """Keys and values between rows of NaN, as a view that starts at row ``before``."""
    parts = []
    for x in (k, v):
        x = poisoned(x, before)
        parts.append(x.as_strided((x.shape[0], before + x.shape[1] + 70, *x.shape[2:]), x.stride(), 0))
    return KV.on(*parts, [(before, before + k.shape[1])] * k.shape[0])


def chosen_blocks(case, seed=1, density=0.5):
    """Which blocks the query blocks read, bool ``[B, H, Q, C]``, and the position of query block 0."""
    blocks, first = math.ceil(case.keys / case.block), (case.keys - case.tokens) // case.block
    shape = (case.batch, case.kv_heads * case.group, blocks - first, blocks)
    active = torch.rand(shape, generator=generator(seed)) < density
    active[:, 0, -1] = True
    if case.keys > 1:
        active[0, -1, 0] = False  # rows without any block
    return active, first


def token_mask(case, active, first):
    position = torch.arange(case.keys)
    block = position // case.block
    return active[:, :, block[case.keys - case.tokens :] - first][..., block]


def expected(case, q, k, v, active, first):
    return oracle(q.cpu(), k.cpu(), v.cpu(), token_mask(case, active, first), case.dim**-0.5)


def config(case):
    default = kernels.default_config(case.block, case.dim, case.v_dim, 99 << 10, case.tma)
    return default if case.block_n is None else default._replace(block_n=case.block_n)


def agree(got, want, dtype):
    out, lse = (x.cpu() for x in got)
    assert close(out, want[0], dtype)
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)
    finite = want[1] != -math.inf
    assert not finite.any() or float((lse - want[1])[finite].abs().max()) < 2e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL + [pytest.param(c, marks=ON_GPU) for c in LARGE], ids=case_id)
def test_kernel_reads_exactly_the_masked_blocks(case, device):
    if device == "cpu" and case in LARGE:
        pytest.skip("too large for the interpreter")
    q, k, v = inputs(case, device)
    active, first = chosen_blocks(case)
    mask, kv, scale = BlockMask.of(active.to(device), case.block, first), behind_poison(k, v), case.dim**-0.5
    got = kernels.block_sparse(poisoned(q), kv, mask, scale, True, config(case))
    agree(got, expected(case, q, k, v, active, first), case.dtype)
    again, nothing = kernels.block_sparse(poisoned(q), kv, mask, scale, False, config(case))
    assert torch.equal(again, got[0])
    assert nothing is None


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_the_masks_query_blocks_make_up_the_whole(device):
    case = Case(100, 170, group=2, block=32)
    q, k, v = inputs(case, device)
    active, first = chosen_blocks(case)
    kv = KV.of(k, v)
    whole = block_sparse_attention(q, kv, BlockMask.of(active.to(device), 32, first), 0.1, True, "triton")
    parts = [
        block_sparse_attention(
            q, kv, BlockMask.of(active[:, :, i : i + 2].to(device), 32, first + i), 0.1, True, "triton"
        )
        for i in range(0, active.shape[2], 2)
    ]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts], 1), whole[i])


@pytest.mark.parametrize("device", DEVICES)
def test_mask_without_any_block_gives_zeros(device):
    case = Case(40, 70, block=32)
    q, k, v = inputs(case, device)
    mask = BlockMask.of(torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=device), 32, 1)
    out, lse = block_sparse_attention(q, KV.of(k, v), mask, 0.1, True, "triton")
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_query_blocks_without_computed_rows_read_nothing(device):
    """The mask goes on after the last token, and its lists name blocks that have no keys."""
    case = Case(40, 70, block=32)
    q, k, v = inputs(case, device)
    mask = BlockMask.of(torch.ones(1, 1, 60, 60, dtype=torch.bool, device=device), 32, 0)
    out, _ = block_sparse_attention(q, behind_poison(k, v), mask, 0.1, False, "triton")
    assert close(out.cpu(), oracle(q.cpu(), k.cpu(), v.cpu(), scale=0.1)[0], BF16)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tma", [True, False])
def test_strided_inputs_give_what_contiguous_ones_give(device, tma):
    case = Case(40, 70, group=2, kv_heads=2, batch=2, block=32, dim=64)
    q, k, v = inputs(case, device)
    active, first = chosen_blocks(case)
    mask = BlockMask.of(active.to(device), 32, first)
    setting = config(case)._replace(tma=tma)
    want = kernels.block_sparse(q, KV.of(k, v), mask, 0.1, True, setting)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.cat([k, v, k], 2)
    odd = [torch.cat([x, x[..., :1]], -1)[..., :64] for x in (q, k, v)]  # rows off any 16-byte boundary
    dim_first = [x.mT.contiguous().mT for x in (q, k, v)]
    for q_, k_, v_ in (heads_first, (q, fused[:, :, :2], fused[:, :, 2:4]), odd, dim_first):
        got = kernels.block_sparse(q_, KV.of(k_, v_), mask, 0.1, True, setting)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


RAGGED = [(63, 63), (1, 100), (37, 130), (0, 40), (32, 64)]  # queries and keys of the sequences


def ragged(block, device, dtype=BF16, scale_up=1):
    """Packed queries and keys with gaps of NaN between sequences, masks, and what is expected."""
    cases = [Case(t * scale_up, n * scale_up, 2, block=block, kv_heads=2, dtype=dtype) for t, n in RAGGED]
    qs, ks, vs, masks, spans, outs, lses, row = [], [], [], [], [], [], [], 0
    for b, case in enumerate(cases):
        q, k, v = inputs(case, seed=b)
        active, first = chosen_blocks(case, seed=b)
        out, lse = expected(case, q, k, v, active, first)
        gap = torch.full_like(k[0, :3], math.nan)
        qs.append(q[0])
        ks += [gap, k[0]]
        vs += [gap, v[0]]
        masks.append(BlockMask.of(active.to(device), block, first))
        spans.append((row + 3, row + 3 + case.keys))
        row = spans[-1][1]
        outs.append(out[0])
        lses.append(lse[0])
    gap = torch.full_like(ks[0][:1].expand(block, -1, -1), math.nan)
    packed = [torch.cat([*x, gap])[None].to(device).expand(len(cases), -1, -1, -1) for x in (ks, vs)]
    cu = [0, *torch.tensor([case.tokens for case in cases]).cumsum(0).tolist()]
    return torch.cat(qs).to(device), cu, KV.on(*packed, spans), masks, (torch.cat(outs), torch.cat(lses))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [32, 128])
def test_ragged_batch_gives_each_sequence_what_it_gets_alone(device, block):
    q, cu, kv, masks, want = ragged(block, device)
    agree(block_sparse_attention_varlen(q, cu, kv, masks, 64**-0.5, True, "triton"), want, BF16)


def test_ragged_batch_on_a_cpu():
    q, cu, kv, masks, want = ragged(32, "cpu", torch.float32)
    agree(block_sparse_attention_varlen(q, cu, kv, masks, 64**-0.5, True), want, torch.float32)
    out, nothing = block_sparse_attention_varlen(q, cu, kv, masks, 64**-0.5)
    assert close(out, want[0])
    assert nothing is None


def paged(k, v, page, starts, device):
    """Keys in shuffled pages between NaN, each sequence from another row of its first page."""
    batch, keys = k.shape[:2]
    per_sequence = math.ceil((max(starts) + keys) / page)
    pages = torch.randperm(batch * per_sequence + 3, generator=generator(7))[: batch * per_sequence]
    table = pages.view(batch, per_sequence)
    pools = [x.new_full((batch * per_sequence + 3, page, *x.shape[2:]), math.nan) for x in (k, v)]
    for pool, x in zip(pools, (k, v), strict=True):
        for b, start in enumerate(starts):
            row = torch.arange(start, start + keys)
            pool[table[b, row // page], row % page] = x[b].cpu().to(pool.device)
    unused = torch.full((batch, 2), 10**6)  # entries that nothing may follow
    table = torch.cat([table, unused], 1).int().to(device)
    return KV.on(*(x.to(device) for x in pools), [(s, s + keys) for s in starts], table)


PAGED = [(16, 32, (0, 0)), (64, 32, (0, 0)), (64, 64, (0, 0)), (64, 32, (5, 40)), (16, 64, (3, 3)), (24, 32, (0, 7))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("page", "block", "starts"),
    [PAGED[2], *(pytest.param(*case, marks=pytest.mark.slow) for case in PAGED if case != PAGED[2])],
)
def test_paged_keys_are_read_where_they_lie(device, page, block, starts):
    case = Case(37, 130, group=2, kv_heads=2, batch=2, block=block)
    q, k, v = inputs(case)
    active, first = chosen_blocks(case)
    want = expected(case, q, k, v, active, first)
    kv, mask = paged(k, v, page, starts, device), BlockMask.of(active.to(device), block, first)
    q = q.to(device)
    agree(block_sparse_attention(q, kv, mask, case.dim**-0.5, True, "triton"), want, BF16)
    setting = config(case)._replace(tma=False)
    agree(kernels.block_sparse(q, kv, mask, case.dim**-0.5, True, setting), want, BF16)
    masks = [BlockMask(*(x[b : b + 1] for x in mask[:4]), block, first) for b in range(2)]
    out, lse = block_sparse_attention_varlen(q.flatten(0, 1), [0, 37, 74], kv, masks, case.dim**-0.5, True, "triton")
    agree((out.unflatten(0, (2, 37)), lse.unflatten(0, (2, 37))), want, BF16)
    if starts[0] == starts[1]:
        agree(block_sparse_attention(q, kv, mask, case.dim**-0.5, True, "sdpa"), want, BF16)


DENSE = [Case(1, 1), Case(63, 63, group=4), Case(37, 130, group=7, dim=96), Case(130, 130, dim=128, v_dim=64, batch=2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("case", DENSE + [pytest.param(c, marks=ON_GPU) for c in LARGE[::8]], ids=case_id)
def test_dense_mode_is_causal_attention_bottom_right(case, device, tma):
    if device == "cpu" and case in LARGE:
        pytest.skip("too large for the interpreter")
    q, k, v = inputs(case, device)
    got = kernels.dense(poisoned(q), behind_poison(k, v), 0.1, True, case.block, config(case)._replace(tma=tma))
    agree(got, oracle(q.cpu(), k.cpu(), v.cpu(), scale=0.1), case.dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("case", [*DENSE, Case(150, 300, 2, 64, 64, batch=2), Case(40, 40, 2, 20, 24)], ids=case_id)
def test_dense_attention_with_and_without_lse(case, device):
    q, k, v = inputs(case, device)
    want = oracle(q.cpu(), k.cpu(), v.cpu(), scale=0.1)
    kv = behind_poison(k, v)
    agree(dense_attention_lse(q, kv, 0.1), want, case.dtype)
    assert close(dense_attention(q, kv, 0.1).cpu(), want[0], case.dtype)
    pages = paged(k, v, 16, (5,) * case.batch, device)
    agree(dense_attention_lse(q, pages, 0.1), want, case.dtype)
    assert close(dense_attention(q, pages, 0.1).cpu(), want[0], case.dtype)


def test_default_config_fits_into_shared_memory():
    for block in kernels.BLOCKS:
        for dim in (64, 96, 128, 256):
            for shared in (99 << 10, 163 << 10, 227 << 10):
                choice = kernels.default_config(block, dim, dim, shared)
                width = triton.next_power_of_2(dim)
                assert 16 <= choice.block_n <= block
                assert 2 * width * (block + 2 * choice.block_n * choice.num_stages) < shared or choice.num_stages == 1


def test_backend_that_cannot_take_the_case_says_why():
    case = Case(40, 70, block=32)
    q, k, v = inputs(case)
    kv, mask = KV.of(k, v), BlockMask.of(torch.ones(1, 1, 2, 3, dtype=torch.bool), 32, 1)
    with pytest.raises(ValueError, match="backend=flash: choose auto, fa4, triton, cpu or sdpa"):
        block_sparse_attention(q, kv, mask, 0.1, backend="flash")
    with pytest.raises(ValueError, match="backend=fa4: needs "):
        block_sparse_attention(q, kv, mask, 0.1, backend="fa4")
    if not fa4.available():
        with pytest.raises(ValueError, match=r"pip install 'keysift\[hopper\]'"):
            block_sparse_attention(q, kv, mask, 0.1, backend="fa4")
    with pytest.raises(ValueError, match="backend=triton: needs q, k and v all in bfloat16 or float16, not"):
        block_sparse_attention(q.float(), kv, mask, 0.1, backend="triton")
    with pytest.raises(ValueError, match="block 16, 32, 64 or 128, not 48"):
        block_sparse_attention(q, kv, mask._replace(block=48), 0.1, backend="triton")
    with pytest.raises(ValueError, match="block_n=64: choose 16, 32"):
        kernels.block_sparse(q, kv, mask, 0.1, config=kernels.Config(64, 4, 2, False))


def test_ragged_inputs_that_do_not_fit_together_are_named():
    q, cu, kv, masks, _ = ragged(32, "cpu", torch.float32)
    with pytest.raises(ValueError, match="of 5, 5 and 4 sequences"):
        block_sparse_attention_varlen(q, cu, kv, masks[:-1], 0.1)
    with pytest.raises(ValueError, match=f"number of queries, {len(q) - 1}"):
        block_sparse_attention_varlen(q[1:], cu, kv, masks, 0.1)
    with pytest.raises(ValueError, match="sequence 0: its mask has to cover query blocks 0 to 1"):
        block_sparse_attention_varlen(q, cu, kv, [masks[1], *masks[1:]], 0.1)
    with pytest.raises(ValueError, match="sequence 0: 64 queries and 63 keys"):
        block_sparse_attention_varlen(q, [0, 64, *cu[2:]], kv, masks, 0.1)
    with pytest.raises(ValueError, match="masks of block 32 and 16"):
        block_sparse_attention_varlen(q, cu, kv, [*masks[:-1], masks[-1]._replace(block=16)], 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or not fa4.available(), reason="no CUDA device, or no flash-attn-4, on this machine")
class TestFlashAttention4:
    """What it takes, it computes; the rest it refuses."""

    @pytest.mark.parametrize("case", HOPPER, ids=case_id)
    def test_reads_exactly_the_masked_blocks(self, case):
        q, k, v = inputs(case, "cuda")
        active, first = chosen_blocks(case)
        kv, mask = behind_poison(k, v), BlockMask.of(active.cuda(), case.block, first)
        got = block_sparse_attention(q, kv, mask, case.dim**-0.5, True, "fa4")
        agree(got, expected(case, q, k, v, active, first), case.dtype)

    def test_mask_without_any_block_gives_zeros(self):
        q, k, v = inputs(Case(300, 500, dim=128, v_dim=128), "cuda")
        mask = BlockMask.of(torch.zeros(1, 1, 3, 4, dtype=torch.bool, device="cuda"), 128, 1)
        out, lse = block_sparse_attention(q, KV.of(k, v), mask, 0.1, True, "fa4")
        assert not out.any()
        assert (lse == -math.inf).all()

    def test_chunk_of_the_masks_query_blocks(self):
        case = Case(700, 1500, 4, 128, 128, 128, kv_heads=2)
        q, k, v = inputs(case, "cuda")
        active, first = chosen_blocks(case)
        out, lse = expected(case, q, k, v, active, first)
        mask = BlockMask.of(active[:, :, 2:4].cuda(), 128, first + 2)
        rows = slice(mask.rows().start - 800, mask.rows().stop - 800)
        got = block_sparse_attention(q, KV.of(k, v), mask, case.dim**-0.5, True, "fa4")
        agree(got, (out[:, rows], lse[:, rows]), BF16)

    def test_ragged_batch(self):
        q, cu, kv, masks, want = ragged(128, "cuda", scale_up=8)
        agree(block_sparse_attention_varlen(q, cu, kv, masks, 64**-0.5, True, "fa4"), want, BF16)

    def test_refuses_pages_and_small_blocks(self):
        q, k, v = inputs(Case(40, 70), "cuda")
        kv, mask = paged(k, v, 16, (0,), "cuda"), BlockMask.of(torch.ones(1, 1, 1, 1, dtype=torch.bool).cuda(), 128, 0)
        with pytest.raises(ValueError, match="keys in one piece"):
            block_sparse_attention(q, kv, mask, 0.1, backend="fa4")
        with pytest.raises(ValueError, match="needs a mask of block 64"):
            block_sparse_attention(q, KV.of(k, v), mask._replace(block=32), 0.1, backend="fa4")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_gpu_paths_never_wait_for_the_device(backend):
    if backend == "fa4" and not fa4.available():
        pytest.skip("flash-attn-4 is not installed")
    case = Case(300, 700, 4, 128, 128, 128, kv_heads=2)
    q, k, v = inputs(case, "cuda")
    active, first = chosen_blocks(case)
    kv, mask = KV.of(k, v), BlockMask.of(active.cuda(), 128, first)

    def run():
        block_sparse_attention(q, kv, mask, 0.1, True, backend)
        block_sparse_attention_varlen(q[0], [0, 300], kv, [mask], 0.1, True, backend)
        dense_attention_lse(q, kv, 0.1)
        dense_attention(q, kv, 0.1)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
