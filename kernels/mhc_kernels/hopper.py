"""The backward of the boundary on Hopper, in Gluon: what ``post_pre.boundary_grad_kernel`` does.

Plain Triton spends more than half of that kernel's instructions on moving tiles (a barrier, an
election and a wait for each of 18 loads and 5 stores a step) and issue, not memory, is its bound.
Here one mbarrier covers a stage, the results are written over the stage's own g and du, each
element by the thread that read it, and leave from there; a step has one barrier.

For bfloat16 streams, n <= 4 and y without a bias; ``launch`` keeps the plain kernels for the rest.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .relaunch import relaunched


@gluon.jit
def load_columns(ptr, rows, stride: gl.constexpr, count: gl.constexpr, mask):
    """``count`` columns of a row-major [T, stride] array as a tuple of [BT] vectors."""
    columns = ()
    for k in gl.static_range(count):
        columns = columns + (gl.load(ptr + rows * stride + k, mask=mask, other=0.0),)
    return columns


@gluon.jit
def pieces(x, BT: gl.constexpr, BC: gl.constexpr, WN: gl.constexpr):
    """[BT, BC] as a tuple of [BT, WN, 4]: the elements of a row that one thread holds, one by one.

    In the matrix units' output four neighbouring lanes share a row and hold two adjacent columns of
    every eight, and WN warps side by side take turns. Nothing moves.
    """
    groups: gl.constexpr = BC // (8 * WN)
    view = gl.permute(gl.reshape(x, [BT, groups, WN, 4, 2]), [0, 2, 1, 3, 4])
    halves = gl.split(view)
    out = ()
    for h in gl.static_range(2):
        out = out + unstack(gl.permute(halves[h], [0, 1, 3, 2]), groups)
    return out


@gluon.jit
def unstack(x, size: gl.constexpr):
    """The slices of x [..., size] along its last axis, a power of two, in any fixed order."""
    if size == 1:
        out = (gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2]]),)
    else:
        view = gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], size // 2, 2])
        a, b = gl.split(view)
        out = unstack(a, size // 2) + unstack(b, size // 2)
    return out


@gluon.jit
def add_products(total, a, b, count: gl.constexpr):
    """total + sum over pieces of a b, one fused multiply-add each."""
    for k in gl.static_range(count):
        total += a[k] * b[k]
    return total


@gluon.jit
def load_stage(
    chunk, slot, pred, x_desc, y_desc, g_desc, du_desc, phi_desc, ready, x_tiles, g_tiles, y_tiles,
    phi_tiles, t0,
    n: gl.constexpr, KP: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, PRE: gl.constexpr,
    POST: gl.constexpr, HAS_G: gl.constexpr,
):  # fmt: skip
    """Starts the loads of BC channels into stage ``slot``: all streams of a tensor in one copy."""
    count: gl.constexpr = n + (1 if PRE else 0) + (1 if POST else 0) + (n if HAS_G else 0)
    phi_bytes: gl.constexpr = 2 * n * KP * BC * 2 if PRE else 0
    bar = ready.index(slot)
    mbarrier.expect(bar, count * BT * BC * 2 + phi_bytes, pred)
    c0 = chunk * BC
    if PRE:
        tma.async_copy_global_to_shared(phi_desc, [0, 0, 0, c0], bar, phi_tiles.index(slot), pred)
        tma.async_copy_global_to_shared(du_desc, [t0, c0], bar, y_tiles.index(2 * slot + 1), pred)
    tma.async_copy_global_to_shared(x_desc, [0, t0, c0], bar, x_tiles.index(slot), pred)
    if POST:
        tma.async_copy_global_to_shared(y_desc, [t0, c0], bar, y_tiles.index(2 * slot), pred)
    if HAS_G:
        tma.async_copy_global_to_shared(g_desc, [0, t0, c0], bar, g_tiles.index(slot), pred)


@gluon.jit
def add_phi_gradients(
    G, w_high, w_low, phi_tiles, slot, n: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """G + w phi of every stream, with the warp-wide instruction, which takes tiles of 16 tokens."""
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    out = ()
    for o in gl.static_range(n):
        high = phi_tiles.index(slot * 2 * n + o).load(right)
        acc = mma_v2(w_high, high, G[o])
        acc = mma_v2(w_low, high, acc)
        low = phi_tiles.index(slot * 2 * n + n + o).load(right)
        out = out + (mma_v2(w_high, low, acc),)
    return out


@gluon.jit
def store_sums(
    d_post, d_res, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr, rows, mask, T, part, parts,
    n: gl.constexpr, RES: gl.constexpr, row: gl.constexpr,
):  # fmt: skip
    """``post_pre.store_coefficient_grads``."""
    E: gl.constexpr = n + n * n if RES else n
    for e in gl.static_range(E):
        total = gl.sum(gl.sum(d_post[e] if e < n else d_res[e - n], axis=2), axis=1)
        total = gl.convert_layout(total, row)
        if parts > 1:
            gl.store(parts_ptr + (e * parts + part) * T.to(gl.int64) + rows, total, mask=mask)
        elif e < n:
            gl.store(dH_post_ptr + rows * n + e, total, mask=mask)
        else:
            gl.store(dH_res_ptr + rows * (n * n) + (e - n), total, mask=mask)
    if parts > 1:
        gl.thread_barrier()
        arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        gl.thread_barrier()
        if arrived == parts - 1:
            for e in gl.static_range(E):
                first = parts_ptr + e * parts * T.to(gl.int64) + rows
                total = gl.load(first, mask=mask, other=0.0)
                for s in range(1, parts):
                    total += gl.load(first + s * T.to(gl.int64), mask=mask, other=0.0)
                if e < n:
                    gl.store(dH_post_ptr + rows * n + e, total, mask=mask)
                else:
                    gl.store(dH_res_ptr + rows * (n * n) + (e - n), total, mask=mask)


@gluon.jit
def mix(x, y, H_res, H_post, o: gl.constexpr, n: gl.constexpr, RES: gl.constexpr):
    """Stream o of H_res x + H_post y, as ``post_pre.mix``."""
    if RES:
        out = H_post[o][:, None] * y
        for i in gl.static_range(n):
            out = gl.fma(H_res[o * n + i][:, None], x[i], out)
    else:
        out = gl.fma(H_post[o][:, None], y, x[o])
    return out


@gluon.jit
def add_coefficient_grads(
    d_post, d_res, G, x, y, n: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, WN: gl.constexpr,
    RES: gl.constexpr,
):  # fmt: skip
    """Adds G[o] . y and G[o] . x[i] of this block of channels, inside each thread."""
    count: gl.constexpr = BC // (4 * WN)
    post = ()
    res = ()
    y_pieces = pieces(y, BT, BC, WN)
    x_pieces = ()
    for i in gl.static_range(n):
        x_pieces = x_pieces + (pieces(x[i], BT, BC, WN),)
    for o in gl.static_range(n):
        G_pieces = pieces(G[o], BT, BC, WN)
        post = post + (add_products(d_post[o], G_pieces, y_pieces, count),)
        if RES:
            for i in gl.static_range(n):
                res = res + (add_products(d_res[o * n + i], G_pieces, x_pieces[i], count),)
    return post, res


@gluon.jit
def total_gradients(
    x, y, du, g_tile, w_high, w_low, phi_tile, slot, H_post, H_res, token, zero,
    n: gl.constexpr, mma: gl.constexpr, PRE: gl.constexpr, POST: gl.constexpr, RES: gl.constexpr,
    HAS_G: gl.constexpr,
):  # fmt: skip
    """G of every stream; token = H_pre (n), then the sum of the streams' norm's shares."""
    G = ()
    for o in gl.static_range(n):
        part_of_G = zero
        if HAS_G:
            part_of_G = g_tile.index(slot * n + o).load(mma).to(gl.float32)
        if PRE:
            x_next = x[o]
            if POST:
                x_next = mix(x, y, H_res, H_post, o, n, RES)
            part_of_G += token[n][:, None] * x_next
            part_of_G += token[o][:, None] * du
        G = G + (part_of_G,)
    if PRE:
        G = add_phi_gradients(G, w_high, w_low, phi_tile, slot, n, mma)
    return G


@gluon.jit
def write_gradients(
    G, H_post, H_res, g_tile, y_tiles, slot, n: gl.constexpr, POST: gl.constexpr, RES: gl.constexpr
):
    """dx over the stage's g, dy over its du."""
    for i in gl.static_range(n):
        dx = G[i]
        if POST and RES:
            dx = H_res[i][:, None] * G[0]
            for o in gl.static_range(1, n):
                dx += H_res[o * n + i][:, None] * G[o]
        g_tile.index(slot * n + i).store(dx.to(gl.bfloat16))
    if POST:
        dy = H_post[0][:, None] * G[0]
        for o in gl.static_range(1, n):
            dy += H_post[o][:, None] * G[o]
        y_tiles.index(2 * slot + 1).store(dy.to(gl.bfloat16))


@gluon.jit
def weights_of_z(H_pre, H_post, H_res, n: gl.constexpr, POST: gl.constexpr, RES: gl.constexpr):
    """z = H_pre x_next as a sum over x_i (n weights) and, with POST, y (the last)."""
    weights = ()
    for i in gl.static_range(n):
        weight = H_pre[i]
        if POST and RES:
            weight = H_pre[0] * H_res[i]
            for o in gl.static_range(1, n):
                weight += H_pre[o] * H_res[o * n + i]
        weights = weights + (weight,)
    if POST:
        weight = H_pre[0] * H_post[0]
        for o in gl.static_range(1, n):
            weight += H_pre[o] * H_post[o]
        weights = weights + (weight,)
    return weights


@gluon.jit
def before_norm(x, y, du, weight, z_weights, token, n: gl.constexpr, POST: gl.constexpr):
    """From du, the gradient of weight * z / rms(z): that of z, and each token's share of weight's.

    The factors come from ``coefficients.through_norm``.
    """
    z = z_weights[0][:, None] * x[0]
    for i in gl.static_range(1, n):
        z += z_weights[i][:, None] * x[i]
    if POST:
        z += z_weights[n][:, None] * y
    share = token[n + 2][:, None] * du
    return share * weight[None, :] - token[n + 3][:, None] * z, share * z


@gluon.jit
def sum_rows_of_warps(x, BT: gl.constexpr, BC: gl.constexpr):
    """[BT, BC] -> [BT // 16, BC], the sums of every 16 rows: those of one warp."""
    return gl.sum(gl.reshape(x, [BT // 16, 16, BC]), axis=1)


@gluon.jit
def indices_of_warps(
    tile, C: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, mma: gl.constexpr
):
    """Where the sums of ``sum_rows_of_warps`` belong in [T // 16, C], for channel 0."""
    rows = gl.arange(0, BT, layout=gl.SliceLayout(1, mma)) // 16
    columns = gl.arange(0, BC, layout=gl.SliceLayout(0, mma))
    at = gl.reshape((rows * C)[:, None] + columns[None, :], [BT // 16, 16, BC])
    # All 16 are equal; the reduction is there for the layout.
    return gl.max(at, axis=1).to(gl.int64) + tile.to(gl.int64) * (BT // 16 * C)


@gluon.jit
def load_coefficients(
    H_post_ptr, H_res_ptr, token_ptr, rows, mask, n: gl.constexpr, PRE: gl.constexpr,
    POST: gl.constexpr, RES: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """H_post, H_res and token (in column n the sum of the norm's shares), as tuples of [BT]."""
    H_post = ()
    H_res = ()
    token = ()
    if POST:
        H_post = load_columns(H_post_ptr, rows, n, n, mask)
        if RES:
            H_res = load_columns(H_res_ptr, rows, n * n, n * n, mask)
    if PRE:
        columns = load_columns(token_ptr, rows, n + 4, n + 4 if NORM else n + 2, mask)
        for i in gl.static_range(n):
            token = token + (columns[i],)
        token = token + (columns[n] + columns[n + 1], columns[n + 1])
        if NORM:
            token = token + (columns[n + 2], columns[n + 3])
    return H_post, H_res, token


@gluon.jit
def start_loads(
    first, last, x_desc, y_desc, g_desc, du_desc, phi_desc, w_desc, ready, x_tiles, g_tiles,
    y_tiles, phi_tiles, w_tiles, t0,
    n: gl.constexpr, KP: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    PRE: gl.constexpr, POST: gl.constexpr, HAS_G: gl.constexpr,
):  # fmt: skip
    """The loads of w (barrier STAGES) and of all stages but one, into a fresh pipeline."""
    fence_async_shared()
    w_bar = ready.index(STAGES)
    if PRE:
        mbarrier.expect(w_bar, 2 * BT * KP * 2)
        tma.async_copy_global_to_shared(w_desc, [t0, 0], w_bar, w_tiles.index(0))
        tma.async_copy_global_to_shared(w_desc, [t0, KP], w_bar, w_tiles.index(1))
    for s in gl.static_range(STAGES - 1):
        load_stage(
            first + s, s, first + s < last, x_desc, y_desc, g_desc, du_desc, phi_desc, ready,
            x_tiles, g_tiles, y_tiles, phi_tiles, t0, n, KP, BT, BC, PRE, POST, HAS_G,
        )  # fmt: skip


@relaunched
@gluon.jit(do_not_specialize=["T", "parts", "per_part"])
def boundary_grad_hopper_kernel(
    x_desc, y_desc, g_desc, du_desc, phi_desc, w_desc, dx_desc, dy_desc, norm_weight_ptr,
    dweight_ptr, H_post_ptr, H_res_ptr, token_ptr, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr,
    T, parts, per_part, n: gl.constexpr, C: gl.constexpr, K: gl.constexpr, KP: gl.constexpr,
    BT: gl.constexpr, BC: gl.constexpr, WN: gl.constexpr, PRE: gl.constexpr, POST: gl.constexpr,
    RES: gl.constexpr, HAS_G: gl.constexpr, NORM: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """A tile of BT tokens and a part of the channels, BC at a time; WN warps side by side in BC.

    PRE, POST: as in ``post_pre.boundary_grad_kernel``. NORM: dweight [T // 16, C] gets the sums
    over 16 tokens of the gradient of the fused norm's weight.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BT // 16, WN], [16, 8])
    row: gl.constexpr = gl.SliceLayout(1, mma)
    tile = gl.program_id(0)
    part = gl.program_id(1)
    t0 = tile * BT
    first = part * per_part
    last = gl.minimum(first + per_part, C // BC)

    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, n, BT, BC], x_desc.layout)
    g_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, n, BT, BC], x_desc.layout)
    y_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, BT, BC], y_desc.layout)
    # The same memory stream by stream: a stream's tile is contiguous in all of them.
    x_tile = x_tiles._reinterpret(gl.bfloat16, [STAGES * n, BT, BC], y_desc.layout)
    g_tile = g_tiles._reinterpret(gl.bfloat16, [STAGES * n, BT, BC], y_desc.layout)
    phi_tiles = x_tiles
    phi_tile = x_tile
    w_tiles = x_tile
    if PRE:
        phi_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2, n, KP, BC], phi_desc.layout)
        phi_tile = phi_tiles._reinterpret(gl.bfloat16, [STAGES * 2 * n, KP, BC], y_desc.layout)
        w_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BT, KP], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(s), count=1)
    start_loads(
        first, last, x_desc, y_desc, g_desc, du_desc, phi_desc, w_desc, ready, x_tiles, g_tiles,
        y_tiles, phi_tiles, w_tiles, t0, n, KP, BT, BC, STAGES, PRE, POST, HAS_G,
    )  # fmt: skip
    rows = (t0 + gl.arange(0, BT, layout=row)).to(gl.int64)
    mask = rows < T
    H_post, H_res, token = load_coefficients(
        H_post_ptr, H_res_ptr, token_ptr, rows, mask, n, PRE, POST, RES, NORM
    )
    z_weights = ()
    if NORM:
        z_weights = weights_of_z(token, H_post, H_res, n, POST, RES)
        dweight_ptrs = dweight_ptr + indices_of_warps(tile, C, BT, BC, mma)
        weight_ptrs = norm_weight_ptr + gl.arange(0, BC, layout=gl.SliceLayout(0, mma))
    zero = gl.full([BT, BC], 0.0, gl.float32, layout=mma)
    empty = pieces(zero, BT, BC, WN)[0]
    d_post = ()
    for _ in gl.static_range(n if POST else 0):
        d_post = d_post + (empty,)
    d_res = ()
    for _ in gl.static_range(n * n if POST and RES else 0):
        d_res = d_res + (empty,)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    w_high = zero
    w_low = zero
    if PRE:
        mbarrier.wait(ready.index(STAGES), 0)
        w_high = w_tiles.index(0).load(left)
        w_low = w_tiles.index(1).load(left)

    slot = 0
    phase = 0
    for chunk in range(first, last):
        c0 = chunk * BC
        mbarrier.wait(ready.index(slot), phase)
        x = ()
        for i in gl.static_range(n):
            x = x + (x_tile.index(slot * n + i).load(mma).to(gl.float32),)
        y = x[0]
        du = x[0]
        if POST:
            y = y_tiles.index(2 * slot).load(mma).to(gl.float32)
        if PRE:
            du = y_tiles.index(2 * slot + 1).load(mma).to(gl.float32)
        if NORM:
            weight = gl.load(weight_ptrs + c0).to(gl.float32)
            du, share = before_norm(x, y, du, weight, z_weights, token, n, POST)
            gl.store(dweight_ptrs + c0, sum_rows_of_warps(share, BT, BC))
        G = total_gradients(
            x, y, du, g_tile, w_high, w_low, phi_tile, slot, H_post, H_res, token, zero,
            n, mma, PRE, POST, RES, HAS_G,
        )  # fmt: skip
        write_gradients(G, H_post, H_res, g_tile, y_tiles, slot, n, POST, RES)
        fence_async_shared()
        if POST:
            d_post, d_res = add_coefficient_grads(d_post, d_res, G, x, y, n, BT, BC, WN, RES)
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dx_desc, [0, t0, c0], g_tiles.index(slot))
        if POST:
            tma.async_copy_shared_to_global(dy_desc, [t0, c0], y_tiles.index(2 * slot + 1))
        # The stage of the step before is free once its results have left shared memory.
        tma.store_wait(2 if POST else 1)
        free = slot + STAGES - 1
        free = gl.where(free >= STAGES, free - STAGES, free)
        load_stage(
            chunk + STAGES - 1, free, chunk + STAGES - 1 < last, x_desc, y_desc, g_desc, du_desc,
            phi_desc, ready, x_tiles, g_tiles, y_tiles, phi_tiles, t0,
            n, KP, BT, BC, PRE, POST, HAS_G,
        )  # fmt: skip
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    tma.store_wait(0)
    if POST:
        store_sums(
            d_post, d_res, dH_post_ptr, dH_res_ptr, parts_ptr, counter_ptr + tile, rows, mask, T,
            part, parts, n, RES, row,
        )  # fmt: skip


@gluon.jit
def load_project_stage(
    chunk, slot, pred, x_desc, y_desc, phi_desc, ready, x_tiles, y_tiles, phi_tiles, t0,
    n: gl.constexpr, KP: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, POST: gl.constexpr,
):  # fmt: skip
    """Starts the loads of BC channels of x, y and phi into stage ``slot``."""
    count: gl.constexpr = n + 1 if POST else n
    bar = ready.index(slot)
    mbarrier.expect(bar, count * BT * BC * 2 + 2 * n * KP * BC * 2, pred)
    c0 = chunk * BC
    tma.async_copy_global_to_shared(x_desc, [0, t0, c0], bar, x_tiles.index(slot), pred)
    if POST:
        tma.async_copy_global_to_shared(y_desc, [t0, c0], bar, y_tiles.index(slot), pred)
    tma.async_copy_global_to_shared(phi_desc, [0, 0, 0, c0], bar, phi_tiles.index(slot), pred)


@gluon.jit
def round_pairs(x):
    """x in bfloat16, two elements an instruction (the compiler takes one at a time here)."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def add_gram(
    sums, tiles, n: gl.constexpr, BT: gl.constexpr, BC: gl.constexpr, WN: gl.constexpr,
    GRAM: gl.constexpr,
):  # fmt: skip
    """``post_pre.add_products``: x_i . x_j for i <= j, or the total of squares, in each thread."""
    count: gl.constexpr = BC // (4 * WN)
    parts = ()
    for i in gl.static_range(n):
        parts = parts + (pieces(tiles[i].to(gl.float32), BT, BC, WN),)
    out = ()
    if GRAM:
        for i in gl.static_range(n):
            for j in gl.static_range(n):
                if j >= i:
                    total = sums[i * n - i * (i - 1) // 2 + j - i]
                    out = out + (add_products(total, parts[i], parts[j], count),)
    else:
        total = sums[0]
        for i in gl.static_range(n):
            total = add_products(total, parts[i], parts[i], count)
        out = (total,)
    return out


@gluon.jit
def store_products(
    acc, sums, projected_ptr, gram_ptr, part, t0, T, row: gl.constexpr, KP: gl.constexpr,
    BT: gl.constexpr, WN: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """This part's products with phi (high + low) and COUNT of the streams, of a tile of tokens."""
    rows = (t0 + gl.arange(0, BT, layout=row)).to(gl.int64)
    part_row = part.to(gl.int64) * T
    for k in gl.static_range(COUNT):
        total = gl.convert_layout(gl.sum(gl.sum(sums[k], axis=2), axis=1), row)
        gl.store(gram_ptr + (part_row + rows) * COUNT + k, total, mask=rows < T)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [BT // 16, WN], [1, 0])
    projected = gl.convert_layout(gl.sum(gl.reshape(acc, [BT, 2, KP]), axis=1), flat)
    rows = (t0 + gl.arange(0, BT, layout=gl.SliceLayout(1, flat))).to(gl.int64)
    k = gl.arange(0, KP, layout=gl.SliceLayout(0, flat))
    at = (part_row + rows)[:, None] * KP + k[None, :]
    gl.store(projected_ptr + at, projected, mask=(rows < T)[:, None])


@gluon.jit
def mix_rounded(x, y, H_res, H_post, o: gl.constexpr, n: gl.constexpr, RES: gl.constexpr):
    """``mix`` of bfloat16 tiles, widened where they are used: half the registers."""
    if RES:
        out = H_post[o][:, None] * y
        for i in gl.static_range(n):
            out = gl.fma(H_res[o * n + i][:, None], x[i].to(gl.float32), out)
    else:
        out = gl.fma(H_post[o][:, None], y, x[o].to(gl.float32))
    return out


@relaunched
@gluon.jit(do_not_specialize=["T", "per_part"])
def post_project_hopper_kernel(
    x_desc, y_desc, x_next_desc, phi_desc, H_post_ptr, H_res_ptr, projected_ptr, gram_ptr, T,
    per_part, n: gl.constexpr, C: gl.constexpr, KP: gl.constexpr, BT: gl.constexpr,
    BC: gl.constexpr, WN: gl.constexpr, POST: gl.constexpr, RES: gl.constexpr,
    GRAM: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """``post_pre.post_project_kernel`` for a tile of BT tokens and a part of the channels.

    x_next is written over x in shared memory, from where it is both stored and multiplied.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BT // 16, WN], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    row: gl.constexpr = gl.SliceLayout(1, mma)
    t0 = gl.program_id(0) * BT
    part = gl.program_id(1)
    first = part * per_part
    last = gl.minimum(first + per_part, C // BC)

    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, n, BT, BC], x_desc.layout)
    y_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BT, BC], y_desc.layout)
    phi_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, n, 2, KP, BC], phi_desc.layout)
    x_tile = x_tiles._reinterpret(gl.bfloat16, [STAGES * n, BT, BC], y_desc.layout)
    phi_tile = phi_tiles._reinterpret(gl.bfloat16, [STAGES * n, 2 * KP, BC], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES - 1):
        load_project_stage(
            first + s, s, first + s < last, x_desc, y_desc, phi_desc, ready, x_tiles, y_tiles,
            phi_tiles, t0, n, KP, BT, BC, POST,
        )  # fmt: skip

    rows = (t0 + gl.arange(0, BT, layout=row)).to(gl.int64)
    mask = rows < T
    H_post = ()
    H_res = ()
    if POST:
        H_post = load_columns(H_post_ptr, rows, n, n, mask)
        if RES:
            H_res = load_columns(H_res_ptr, rows, n * n, n * n, mask)
    acc = gl.full([BT, 2 * KP], 0.0, gl.float32, layout=mma)
    COUNT: gl.constexpr = n * (n + 1) // 2 if GRAM else 1
    sums = ()
    for _ in gl.static_range(COUNT):
        sums = sums + (pieces(gl.full([BT, BC], 0.0, gl.float32, layout=mma), BT, BC, WN)[0],)

    slot = 0
    phase = 0
    for chunk in range(first, last):
        mbarrier.wait(ready.index(slot), phase)
        x = ()
        for i in gl.static_range(n):
            x = x + (x_tile.index(slot * n + i).load(mma),)
        if POST:
            y = y_tiles.index(slot).load(mma).to(gl.float32)
            x_next = ()
            for o in gl.static_range(n):
                out = round_pairs(mix_rounded(x, y, H_res, H_post, o, n, RES))
                x_tile.index(slot * n + o).store(out)
                x_next = x_next + (out,)
            fence_async_shared()
            x = x_next
        sums = add_gram(sums, x, n, BT, BC, WN, GRAM)
        gl.thread_barrier()
        if POST:
            tma.async_copy_shared_to_global(x_next_desc, [0, t0, chunk * BC], x_tiles.index(slot))
        for o in gl.static_range(n):
            phi = phi_tile.index(slot * n + o).permute((1, 0)).load(right)
            acc = mma_v2(x_tile.index(slot * n + o).load(left), phi, acc)
        # The stage of the step before is free: all warps are past it, x_next has left it.
        if POST:
            tma.store_wait(1)
        free = slot + STAGES - 1
        free = gl.where(free >= STAGES, free - STAGES, free)
        load_project_stage(
            chunk + STAGES - 1, free, chunk + STAGES - 1 < last, x_desc, y_desc, phi_desc, ready,
            x_tiles, y_tiles, phi_tiles, t0, n, KP, BT, BC, POST,
        )  # fmt: skip
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    if POST:
        tma.store_wait(0)
    store_products(acc, sums, projected_ptr, gram_ptr, part, t0, T, row, KP, BT, WN, COUNT)
