"""The mutants: mistakes that kernels are prone to, one line each (see `mutants`).

Wrong comparison at an edge, a lost mask, a stride of another tensor, a forgotten factor, a wrong rounding, an order of
nibbles or bits, a plane left out. `old` must occur once in its file, so an edit of a line shows here.
"""

from __future__ import annotations

from benchmarks.mutants import Mutant


def _mutants(file: str, tests: tuple[str, ...], *pairs: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tests) for old, new in pairs]


_LAUNCH = _mutants(
    "launch.py",
    ("test_launch.py",),
    ("    if 0 in grid:\n", "    if 0 == grid[0]:\n"),
    ("if not all(recorder.run", "if not any(recorder.run"),
    ("in reversed(_recorders):", "in _recorders:"),
    ("    return -(-a // b)", "    return a // b"),
    ("1 << max(0, n - 1).bit_length()", "1 << max(0, n).bit_length()"),
    ("arch = properties.major * 10 + properties.minor", "arch = properties.major * 10"),
    ("64 if arch >= 900 and arch < 1000 else 32", "64 if arch >= 900 else 32"),
)

_PRIMITIVES = [
    *_mutants(
        "primitives.py",
        ("test_primitives.py",),
        ("0x7FFF + ((bits >> 16) & 1)", "0x8000"),
        ("tl.where(nan, 0x7FC0, rounded)", "tl.where(nan, 0x7F80, rounded)"),
        ("tl.minimum(tl.maximum(left, 0), 8)", "tl.minimum(tl.maximum(left, 0), 7)"),
        ("((tl.arange(0, PER) ^ 1) * 4)", "(tl.arange(0, PER) * 4)"),
        ('            acc = dot(a3, b1, acc, "ieee")\n', '            acc = dot(a3, b3, acc, "ieee")\n'),
        ("((nibble % 2 ^ 1) * 4)", "((nibble % 2) * 4)"),
        ("first_col % BLOCKSIZE // 8 + word", "word"),
        ("inside = inside_n & (word * 8 < k - first_col)", "inside = inside_n & (word * 8 < k)"),
        ("inside = inside_n & (cols < k - first_col)", "inside = inside_n & (cols <= k - first_col)"),
    ),
    *_mutants(
        "primitives.py",
        ("test_quantize.py",),
        ("tl.load(map_ptr + codes) * second + tl.load(nested_offset_ptr)", "tl.load(map_ptr + codes) * second"),
    ),
    *_mutants(
        "primitives.py",
        ("test_primitives.py", "test_merge.py", "test_norm.py", "test_skinny.py"),
        ("groups = ((first % NESTED).to(tl.uint32) + blocks) // NESTED", "groups = blocks // NESTED"),
    ),
    *_mutants(
        "primitives.py",
        ("test_dropout.py",),
        ("return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0", "return high1 ^ c1 ^ k1, low1, high0 ^ c3 ^ k0, low0"),
        ("low = ((word & 0xFFFF) >= threshold)", "low = ((word & 0xFFFF) > threshold)"),
        ("(low << SHIFT) | (high << (SHIFT + 1))", "(high << SHIFT) | (low << (SHIFT + 1))"),
        ("k0, k1 = k0 + _W0, k1 + _W1", "k0, k1 = k0 + _W1, k1 + _W0"),
        ("zero + (row >> 32).to(tl.uint32)", "zero"),
        ("tl.static_range(10)", "tl.static_range(7)"),
    ),
]

_QUANTIZE = _mutants(
    "quantize.py",
    ("test_quantize.py",),
    ("count -= (x <= POINTS[i])", "count -= (x < POINTS[i])"),
    ("tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=1)", "tl.max((x.to(tl.int32, bitcast=True)), axis=1)"),
    ("(high << 4 | low).to(tl.uint8)", "(low << 4 | high).to(tl.uint8)"),
    ("mask=byte * 2 < left", "mask=byte * 2 <= left"),
    ("x = x * inverse[:, None]", "x = x / absmax[:, None]"),
    ("code = tl.where(inside, _count_below(x, _NF4_POINTS, 15), 7)", "code = _count_below(x, _NF4_POINTS, 15)"),
    ("code | tl.where(x < 0, 8, 0)", "code | tl.where(x <= 0, 8, 0)"),
    ("left = count % PER", "left = 0 * PER"),
    (
        "blocks = ((start % PER_BLOCK).to(tl.uint32) + word.to(tl.uint32)) // PER_BLOCK",
        "blocks = ((start % PER_BLOCK).to(tl.uint32) + word.to(tl.uint32)) // BLOCKSIZE",
    ),
)

_MERGE = _mutants(
    "merge.py",
    ("test_merge.py",),
    ("value = tl.fma(delta, scale, value)", "value = tl.fma(delta, 1.0, value)"),
    (
        "value = value * factor[None, :, None]",
        "value = cast(value, tl.bfloat16).to(tl.float32) * factor[None, :, None]",
    ),
    ("inside = inside_n[None, :, None] & (cols < k - first_col)", "inside = inside_n[None, :, None] & (cols < k)"),
    ("inside_n = rows < n - first_row", "inside_n = rows <= n - first_row"),
    ("begin = (pid % spans) * (BLOCK_K * STEPS)", "begin = (pid % spans) * BLOCK_K"),
    ("(rank < r)[:, None] & (cols < k - first_col)[None, :]", "(rank <= r)[:, None] & (cols < k - first_col)[None, :]"),
    ("    return 3 if result.itemsize > 2 else 2\n", "    return 2\n"),
    ("part = load_b(b_ptr, first_row, first, n, r", "part = load_b(b_ptr, first_row, 0, n, r"),
)

_NORM = _mutants(
    "norm.py",
    ("test_norm.py",),
    ("tl.sqrt_rn(square)", "square"),
    ("value = tl.fma(delta, scale, value)", "value = tl.fma(delta, -scale, value)"),
    ("(rows < n - first_row)[None, :, None] & (cols < k - first_col)", "(rows < n - first_row)[None, :, None]"),
    ("tl.store(out_ptr + first_row + rows", "tl.store(out_ptr + rows"),
    ("total = tl.fma(value, value, total)", "total = tl.fma(value, value, 0.0)"),
)

_DROPOUT = _mutants(
    "dropout.py",
    ("test_dropout.py",),
    ("rows.to(tl.int64) + row_offset", "rows.to(tl.int64)"),
    ("width = tl.cdiv(k, 8)", "width = k // 8"),
    ("(groups < width)[None, :])", "(groups <= width)[None, :])"),
)

_SHRINK = _mutants(
    "shrink.py",
    ("test_shrink.py",),
    ("tl.minimum(n, (plane + 1) * plane_n)", "n"),
    ("acc += tl.sum(tl.load(planes_ptr", "acc = tl.sum(tl.load(planes_ptr"),
    ("second = first - upper_half(first).to(tl.float32)", "second = first - first"),
    ("third = second - upper_half(second).to(tl.float32)", "third = second"),
    ("out - round_tf32(out)", "out - out"),
    ("fold(acc, TERMS) * factor, mask=inside)", "fold(acc, TERMS), mask=inside)"),
    (
        "bits = draw_bits(seed_ptr, stream, threshold, rows, groups, n)",
        "bits = draw_bits(seed_ptr, 0, threshold, rows, groups, n)",
    ),
    ("lane = 1 << tl.arange(0, 8)", "lane = 128 >> tl.arange(0, 8)"),
    ("groups = start // 8 + tl.arange(0, BLOCK_K // 8)", "groups = tl.arange(0, BLOCK_K // 8)"),
    ("return self.factor if self.number == 1 else 1.0", "return self.factor"),
)

_SHRINK += [
    Mutant(
        "shrink.py",
        "inside = (rows < m)[:, None] & (groups < bytes_per_row)[None, :]",
        "inside = (rows < m - 1)[:, None] & (groups < bytes_per_row)[None, :]",
        ("test_shrink.py",),
    ),
    Mutant(
        "shrink.py",
        "inside = (rows < m)[:, None] & (groups < bytes_per_row)[None, :]",
        "inside = (rows <= m)[:, None] & (groups < bytes_per_row)[None, :]",
        ("test_shrink.py",),
        survives="reads one row of bits past the last; x is 0 there, so no value shows it (a memory checker would)",
    ),
]

_EXPAND = _mutants(
    "expand.py",
    ("test_expand.py",),
    ("for start in range(0, R, BLOCK_K):", "for start in range(0, BLOCK_K, BLOCK_K):"),
    ("    acc = acc * factor\n", "    acc = acc\n"),
    (
        "acc = acc * ratio(mag_ptr, norm_ptr, cols, n)[None, :]",
        "acc = acc * ratio(norm_ptr, mag_ptr, cols, n)[None, :]",
    ),
    ("groups = block_n * (BLOCK_N // 8)", "groups = block_n * BLOCK_N"),
    ("cast(acc, dtype), mask=inside)", "cast(acc, dtype), mask=(rows < m)[:, None])"),
    ("(n + 7) // 8, WIDE)", "n // 8, WIDE)"),
)

_PROJECT = _mutants(
    "project.py",
    ("test_project.py",),
    ("tl.minimum(m, (plane + 1) * plane_m)", "m"),
    ("factor = c - 1.0 if MINUS_ONE else c", "factor = c"),
    ("dbias += t.to(tl.float32)", "dbias = t.to(tl.float32)"),
    ("tl.div_rn(tl.sum(dmag, axis=0), norm)", "tl.sum(dmag, axis=0)"),
    ("            right = right * c[:, None]\n", "            right = right\n"),
    ("            v = v.to(tl.float32) * c[:, None]\n", "            v = v.to(tl.float32)\n"),
    (
        "left_row = block.to(tl.int64) * m + rows if WIDE else block * m + rows",
        "left_row = block.to(tl.int64) + rows if WIDE else block * m + rows",
    ),
    (
        "column = plane.to(tl.int64) * n + cols if WIDE else plane * n + cols",
        "column = plane.to(tl.int64) * n + cols if WIDE else cols",
    ),
)

_GRAD_A = _mutants(
    "grad_a.py",
    ("test_grad_a.py",),
    ("right_factor=scale * dscale", "right_factor=scale"),
    ("h = rows_product(x, a, transposed=True, splits=splits", "h = rows_product(x, a, transposed=True, splits=1"),
    ("    finish(out.left, out.right, wide=wide)\n", "    finish(out.right, wide=wide)\n"),
)

_COMPOSE = _mutants(
    "compose.py",
    ("test_compose.py",),
    ("(c - 1.0) * dropped", "c * dropped"),
    ("c * delta\n", "delta\n"),
    ("cast(dropped + delta, dtype)", "cast(dropped, dtype)"),
    ("value = cast(value.to(tl.float32) * factor, value.dtype)", "value = value * factor"),
    ("dropped = dscale * tl.load", "dropped = tl.load"),
    (
        "value = value * ratio(mag_ptr, norm_ptr, cols, n)[None, :]",
        "value = value * ratio(mag_ptr, norm_ptr, cols - 1, n)[None, :]",
    ),
)

_DENSE = _mutants(
    "dense.py",
    ("test_dense.py",),
    ("height = tl.minimum(down - first, GROUP)", "height = GROUP"),
    ("return first + inner % height, inner // height", "return first + inner // height, inner % height"),
    (
        "mask=(rows < m)[:, None] & (rank < r)[None, :], other=0.0)\n",
        "mask=(rows < m)[:, None] & (rank <= r)[None, :], other=0.0)\n",
    ),
    ("STEPS * R, R, num_stages=1", "R, R, num_stages=1"),
    ("return mag / tl.load(norm_ptr", "return mag * tl.load(norm_ptr"),
    ("cast(dy_tile.to(tl.float32) * c[None, :], DTYPE)", "cast(dy_tile.to(tl.float32), DTYPE)"),
    (
        "acc = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), acc, 0.0)",
        "acc = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), 0.0, acc)",
    ),
    ("load_block(bits_ptr, row, col // 8, m, width", "load_block(bits_ptr, row, col // 8, m, k"),
    ("float(scale * dscale),", "float(scale),"),
    (
        "        if HAS_BIAS:\n            acc = acc + tl.load(bias_ptr + cols",
        "        if HAS_BIAS:\n            acc = acc - tl.load(bias_ptr + cols",
    ),
)

_SKINNY = _mutants(
    "skinny.py",
    ("test_skinny.py",),
    ("for _ in range(splits):", "for _ in range(1):"),
    ("planes_ptr += size", "planes_ptr += m"),
    (
        "return cast(lookup(table_ptr, byte >> 4), DTYPE), cast(lookup(table_ptr, byte & 15), DTYPE)",
        "return cast(lookup(table_ptr, byte & 15), DTYPE), cast(lookup(table_ptr, byte >> 4), DTYPE)",
    ),
    ("if index % 2 == 0:", "if index % 2 == 1:"),
    (
        "acc = acc * column_factor(mag_ptr, norm_ptr, cols, n)[None, :]",
        "acc = acc * column_factor(norm_ptr, mag_ptr, cols, n)[None, :]",
    ),
)

_FUSED = _mutants(
    "fused.py",
    ("test_fused.py",),
    ("h = fold(hidden, TERMS) * dscale", "h = fold(hidden, TERMS)"),
    (
        "owned = tokens < tl.where(tl.program_id(0) == 0, m, 0)",
        "owned = tokens < tl.where(tl.program_id(0) == 1, m, 0)",
    ),
    ("groups = col // 8 + tl.arange(0, SPAN // 8)", "groups = start // 8 + tl.arange(0, SPAN // 8)"),
    ("b = b.to(tl.float32) * scale", "b = b.to(tl.float32)"),
    (
        "z = z * column_factor(mag_ptr, norm_ptr, rows, n)[None, :]",
        "z = z * column_factor(mag_ptr, norm_ptr, rows, n - 1)[None, :]",
    ),
    ("step * (BLOCK_K // 2) + index * (SPAN // 2),", "step * (BLOCK_K // 2),"),
)

_WEIGHT = _mutants(
    "weight.py",
    ("test_skinny.py",),
    ("k % weight.blocksize == 0 and packed", "k % 2 == 0 and packed"),
)

_GROUPED = [
    *_mutants(
        "grouped_members.py",
        ("test_grouped.py",),
        ("(begin // BLOCK_M + lane <= tile)", "(begin // BLOCK_M + lane < tile)"),
        ("begin // BLOCK_M + lane <= tile", "begin // BLOCK_M <= tile"),
        ("end = tl.where(e < groups,", "end = tl.where(e <= groups,"),
        ("    live = position < end\n", "    live = position <= end\n"),
        ("(groups8 < tl.where(drops, bytes_per_row, 0))", "(groups8 < bytes_per_row)"),
        (
            "    return tl.where(cols < width, tl.div_rn(mag, norm), 1.0), norm\n",
            "    return tl.div_rn(mag, norm), norm\n",
        ),
        ("mask=cols < tl.where(kind == 2, width, 0)", "mask=cols < tl.where(kind == 3, width, 0)"),
        ("number(table_ptr, e, NORM) * n + cols", "number(table_ptr, e, NORM) + cols"),
        ("none[THRESHOLD.value] = philox.LANES", "none[THRESHOLD.value] = 0"),
    ),
    *_mutants(
        "grouped_forward.py",
        ("test_grouped.py",),
        ("tl.where((ranks < r)[None, :], fold(acc, TERMS)", "tl.where((ranks < R)[None, :], fold(acc, TERMS)"),
        ("mask=live[:, None] & (ranks < width)[None, :]", "mask=live[:, None] & (ranks < r)[None, :]"),
        ("bytes8 = begin // 8 + tl.arange(0, BLOCK_K // 8)", "bytes8 = tl.arange(0, BLOCK_K // 8)"),
        ("FACTOR=(DSCALE if down else SCALE).value", "FACTOR=SCALE.value"),
        ("    delta *= fraction(table_ptr, e, SCALE)\n", "    delta *= fraction(table_ptr, e, DSCALE)\n"),
        ("z = tl.where(drops, dropped * fraction(table_ptr, e, DSCALE), z)", "z = tl.where(drops, dropped, z)"),
        ("out + (c - 1.0)[None, :] * z", "out + c[None, :] * z"),
        ("cast(tl.where(is_dora, z, 0.0), dtype)", "cast(z, dtype)"),
        ("    return m // block_m + groups + rest\n", "    return m // block_m + groups\n"),
        (
            "load_gathered(h_ptr, rows, live, width, ranks, r, WIDE)",
            "load_gathered(h_ptr, rows, live, r, ranks, r, WIDE)",
        ),
    ),
    *_mutants(
        "grouped_backward.py",
        ("test_grouped.py",),
        ("(kind & DROPS) != 0, WIDE)", "(kind & BASE_DROPS) != 0, WIDE)"),
        ("    delta *= fraction(table_ptr, e, DSCALE)\n", "    delta *= fraction(table_ptr, e, SCALE)\n"),
        ("(cols < tl.where(drops, k, 0))[None, :]", "(cols < k)[None, :]"),
        ("stop = tl.minimum(end, first + (plane + 1) * share)", "stop = end"),
        ("number(table_ptr, e, FIRST) * n", "number(table_ptr, e, FIRST)"),
        ("        stored = tl.where(wanted, r, 0)\n", "        stored = r\n"),
        ("            right = right * c[:, None]\n", "            right = right * 1.0\n"),
        ("plane.to(tl.int64) * total +", "plane.to(tl.int64) * n +"),
    ),
    *_mutants(
        "grouped.py",
        ("test_grouped.py",),
        ("    finish(da, db, dmag)\n", "    finish(da, db)\n"),
        ("dmag.out[held.doras.index(e)]", "dmag.out[0]"),
        ("keep_z = train and bool(problem.flags & DORA)", "keep_z = train"),
    ),
]

_PLANS = [
    *_mutants(
        "forward.py",
        ("test_plans.py",),
        ("mag, norm = (None, None) if keep_z else (call.mag, call.norm)", "mag, norm = call.mag, call.norm"),
        ("        y.addmm_(x, w.t())\n", "        y.copy_(x @ w.t())\n"),
        ("bias = None if dora else call.bias", "bias = call.bias"),
    ),
    *_mutants(
        "backward.py",
        ("test_plans.py",),
        ("            dx.addmm_(d, w)\n", "            dx.addmm_(call.dy, w)\n"),
        ("factor=call.dscale if masked else 1.0", "factor=1.0"),
        (
            "compose.masked_add(dx, call.bits, call.dscale, dx)",
            "compose.masked_add(dx, call.bits, 1.0, dx)",
        ),
    ),
]

_GATED = _mutants(
    "gated.py",
    ("test_gated.py",),
    ("value, slope = z * s, s * (1.0 + z * (1.0 - s))", "value, slope = z * s, s * (1.0 + z * s)"),
    ("below + z * tl.exp(-0.5 * z * z) * _DENSITY", "below + tl.exp(-0.5 * z * z) * _DENSITY"),
    ("(1.0 + z * z * (3.0 * _CUBE)) * (2.0 * _SCALE)", "(1.0 + z * z * _CUBE) * (2.0 * _SCALE)"),
    ("cast(d * value, dtype)", "cast(d * value * up, dtype)"),
    (
        "tl.store(product_ptr + start + where, cast(value * up, dtype)",
        "tl.store(product_ptr + start + where, cast(value, dtype)",
    ),
)

_OVER_ONE_X = [
    *_mutants(
        "shrink.py",
        ("test_projections.py",),
        ("member, rank = ranks // PART, ranks % PART", "member, rank = ranks % PART, ranks // PART"),
    ),
    *_mutants(
        "merge_parts.py",
        ("test_projections.py",),
        ("            pid, packed1, absmax1,", "            pid, packed1, absmax0,"),
        ("        blocks = tl.cdiv(n2, BLOCK_N) * spans", "        blocks = tl.cdiv(n1, BLOCK_N) * spans"),
    ),
    *_mutants(
        "projections.py",
        ("test_projections.py",),
        ("g_factor=call.scale, g_out", "g_factor=1.0, g_out"),
        ("    finish_all(partial)\n", "    finish_all(partial[:1])\n"),
        (
            "given = backward.Given(made[i], low_rank.get(i), dx)",
            "given = backward.Given(made[i], low_rank.get(i), None)",
        ),
        ("found[i] = forward.Given((h[place], mask))", "found[i] = forward.Given((h[0], mask))"),
    ),
    *_mutants(
        "shrink.py",
        ("test_projections.py",),
        ("finish(*todo[at : at + _STACKS])", "finish(*todo[: _STACKS])"),
    ),
    *_mutants(
        "projections.py",
        ("test_recompute.py",),
        ('weights = [w if plan == "merge" else None for w, plan', "weights = [w for w, plan"),
    ),
    *_mutants(
        "forward.py",
        ("test_recompute.py",),
        ("merge(call._replace(given=Given(weight=w)))", "merge(call._replace(given=Given()))"),
        ("else _empty(problem, x)), w", "else _empty(problem, x)), None"),
    ),
    *_mutants(
        "backward.py",
        ("test_recompute.py",),
        ("_replace(given=Given(weight=merged))", "_replace(given=Given())"),
    ),
]

MUTANTS: list[Mutant] = [
    *_LAUNCH,
    *_PRIMITIVES,
    *_QUANTIZE,
    *_MERGE,
    *_NORM,
    *_DROPOUT,
    *_SHRINK,
    *_EXPAND,
    *_PROJECT,
    *_GRAD_A,
    *_COMPOSE,
    *_DENSE,
    *_SKINNY,
    *_FUSED,
    *_WEIGHT,
    *_GROUPED,
    *_PLANS,
    *_GATED,
    *_OVER_ONE_X,
]
