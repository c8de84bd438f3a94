"""Groups of projections by Triton's kernels: budgets, single layers, what is shared, launches of a whole layer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import settings
from fastlora.backends.triton.launch import record
from fastlora.backends.triton.merge import merge
from fastlora.backends.triton.merge_parts import MOST, Part, alike, merge_parts
from fastlora.backends.triton.quantize import dequantize
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.glu import glu_linear
from fastlora.ops.projections import STREAMS, projections
from fastlora.testing import Case, Outputs, judge
from tests.projection_tools import GROUPS, Group, alone, make_group
from tests.triton.adapted import adapted, guard_outputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NF4 = {"quant": "nf4", "nested": True, "blocksize": 32}
MORE = {
    "split-bf16": [Case(33, n, 64, 8, dtype=BF16) for n in (48, 16, 16)],
    "split-fp16": [Case(17, n, 64, 16, dtype=FP16, bias=True) for n in (48, 16)],
    "wide-rank": [Case(17, n, 96, 24, dtype=BF16, **NF4) for n in (48, 16, 33)],
    "rank-48": [Case(17, n, 96, 48, **NF4) for n in (48, 40)],
    "five": [Case(17, n, 64, 4, **NF4) for n in (48, 16, 33, 8, 20)],
    "shared-dora": [Case(17, n, 64, 4, dora=True, **NF4) for n in (48, 16)],
}
ALL = GROUPS | MORE


def outputs(group: Group, ys: tuple[torch.Tensor, ...], cases: list[Case]) -> list[Outputs]:
    """Each member's outputs, dx for its dy alone."""
    found = []
    for i, each in enumerate(group.members):
        fields = (each.a, each.b, each.magnitude, each.bias)
        leaves = [group.x, *(t for t in fields if t is not None)]
        dx, *rest = torch.autograd.grad(ys[i], leaves, group.dys[i], retain_graph=True)
        grads = iter(rest)
        da, db, dmag, dbias = (None if t is None else next(grads) for t in fields)
        if each.a is None:
            da, db = group.inputs[i].a, group.inputs[i].b
        found.append(Outputs(ys[i].detach(), dx, da, db, dmag, dbias))
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", list(ALL))
def test_within_budget(name, shared):
    cases = ALL[name]
    if shared and len({case.p for case in cases if case.p}) != 1:
        return
    group = make_group(cases)
    ys = projections(group.x, group.members, seed=9, shared_dropout=shared, backend="triton")
    for i, (case, inputs, out) in enumerate(zip(cases, group.inputs, outputs(group, ys, cases), strict=True)):
        keep = None
        if case.p:
            stream = 3 if shared else STREAMS * i + 3
            keep = philox.unpack_bits(philox.dropout_bits(9, stream, case.m, case.k, case.p), case.k)
        assert judge(case, inputs._replace(keep=keep), out) == []


@pytest.mark.parametrize("name", list(ALL))
def test_all_at_once_are_the_single_layers(name):
    """da, db, dmag, dbias of members are those of single layers but for sums in another order; dx within its budget."""
    cases = ALL[name]
    group = make_group(cases)
    ys = projections(group.x, group.members, seed=9, backend="triton")
    got = torch.autograd.grad(ys, [group.x, *group.leaves], group.dys)
    again = torch.autograd.grad(
        projections(group.x, group.members, seed=9, backend="triton"), [group.x, *group.leaves], group.dys
    )
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    singles = [alone(each, group.x, 9, STREAMS * i, "triton") for i, each in enumerate(group.members)]
    want = torch.autograd.grad(singles, [group.x, *group.leaves], group.dys)
    exact = [alone(each, group.x.detach().float(), 9, STREAMS * i, "reference") for i, each in enumerate(_wide(group))]
    for y, single, truth in zip(ys, singles, exact, strict=True):
        assert (y - truth).norm() <= 1.5 * (single - truth).norm() + 1e-6 * truth.norm()
    for one, other in zip(got, want, strict=True):
        u = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-21}[group.x.dtype if one is got[0] else one.dtype]
        assert (one - other).float().norm() <= 3 * max(u, 2.0**-19) * other.float().norm()


def _wide(group: Group):
    for each in group.members:
        weight = each.weight if isinstance(each.weight, PackedWeight) else each.weight.float()
        yield each._replace(weight=weight)


def test_inside_their_tensors(monkeypatch):
    group = make_group(MORE["wide-rank"])
    plain = projections(group.x, group.members, backend="triton")
    want = torch.autograd.grad(plain, [group.x, *group.leaves], group.dys)
    bands = guard_outputs(monkeypatch)
    ys = projections(group.x, group.members, backend="triton")
    got = torch.autograd.grad(ys, [group.x, *group.leaves], group.dys)
    assert bands and all(band.intact() for band in bands)
    assert all(torch.equal(one, other) for one, other in zip((*ys, *got), (*plain, *want), strict=True))


# --- one launch for several weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "r", "dtype"), [(1, 0, BF16), (2, 8, BF16), (3, 24, FP32), (4, 24, BF16)], ids=str)
def test_merged_parts_are_bitwise_the_merged(count, r, dtype, monkeypatch):
    made = [adapted(n, 100, r, seed=n, nested=count % 2 == 0) for n in (33, 1, 64, 40)[:count]]
    mags = [torch.rand(n) + 0.5 if i % 2 else None for i, n in enumerate((33, 1, 64, 40)[:count])]
    norms = [None if mag is None else torch.rand_like(mag) + 0.5 for mag in mags]
    parts = [Part(each.weight, each.a, each.b, 1.7, *pair) for each, *pair in zip(made, mags, norms, strict=True)]
    want = [merge(p.weight, p.a, p.b, p.scale, dtype, mag=p.mag, norm=p.norm) for p in parts]
    bands = guard_outputs(monkeypatch)
    with record(run=True) as launches:
        got = merge_parts(parts, dtype)
    assert len(launches) == 1 and len(bands) == count
    for one, other, each in zip(got, want, made, strict=True):
        assert torch.equal(one, other) and each.intact()
    assert all(torch.equal(a, b) for a, b in zip(got, merge_parts(parts, dtype, wide=True), strict=True))
    if r == 0 and mags == [None]:
        assert torch.equal(got[0], dequantize(parts[0].weight, dtype))


def test_only_alike_weights_share_a_launch():
    def part(**options):
        made = adapted(16, 64, 4, **options)
        return Part(made.weight, made.a, made.b, 1.0)

    first = part()
    assert alike([first, part(seed=1)]) and MOST == 4
    for options in ({"quant": "fp4"}, {"nested": False}, {"blocksize": 32}, {"adapter": BF16}):
        assert not alike([first, part(**options)])
    assert not alike([first, Part(adapted(16, 128, 4).weight, first.a, first.b, 1.0)])
    custom = first.weight._replace(code=torch.zeros(16, 4, dtype=torch.uint8))
    assert not alike([first, first._replace(weight=custom)])


# --- launches ---------------------------------------------------------------------------------------------------------


def names(run) -> list[str]:
    with record(run=True) as launches:
        run()
    return [each.name for each in launches]


@pytest.mark.parametrize(("name", "merges"), [("nf4", 1), ("bf16", 1), ("five", 2)])
def test_what_a_group_launches(name, merges):
    group = make_group(ALL[name])
    with record(run=True) as launches:
        ys = projections(group.x, group.members, backend="triton")
        forward = [each.name for each in launches]
        torch.autograd.grad(ys, [group.x, *group.leaves], group.dys)
        backward = [each.name for each in launches][len(forward) :]
    for found in (forward, backward):
        assert found.count("_merge_parts_kernel") + found.count("_merge_kernel") == merges
    assert forward.count("_rows_kernel") == 1
    # One walk over each dy and one over x.
    assert backward.count("_walk_kernel") == len(group.members) + 1


def test_dropped_members_read_x_each_unless_they_share():
    group = make_group([Case(9, n, 48, 4, p=0.25) for n in (20, 12)])

    def run(shared):
        ys = projections(group.x, group.members, seed=9, shared_dropout=shared, backend="triton")
        torch.autograd.grad(ys, [group.x, *group.leaves], group.dys)

    own, one = names(lambda: run(False)), names(lambda: run(True))
    assert own.count("_rows_kernel") - one.count("_rows_kernel") >= 1
    assert own.count("_walk_kernel") - one.count("_walk_kernel") == 1


@pytest.mark.parametrize("dora", [False, True])
def test_partial_sums_of_a_group_are_added_four_a_launch(dora):
    """And the sums are bit for bit those of single layers: every stack has its own planes in their own order."""
    group = make_group([Case(300, n, 64, 4, bias=True, dora=dora, **NF4) for n in (48, 16, 33)])

    def backward(ys):
        grads: list[torch.Tensor] = []
        found = names(lambda: grads.extend(torch.autograd.grad(ys, group.leaves, group.dys)))
        return found.count("_finish_kernel"), dict(zip(map(id, group.leaves), grads, strict=True))

    count, got = backward(projections(group.x, group.members, seed=9, backend="triton"))
    each, want = backward([alone(one, group.x, 9, STREAMS * i, "triton") for i, one in enumerate(group.members)])
    # Of each member db and dbias, with DoRA dmag, of two g: 8 stacks, or 11. And da: of all together, or of each.
    assert each == 6 and count == (4 if dora else 3)
    for one in group.members:
        for leaf in (one.b, one.magnitude, one.bias):
            assert leaf is None or torch.equal(got[id(leaf)], want[id(leaf)])


# --- a checkpoint's merged weight lives until its backward ------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_recomputed_merge_is_not_made_again(reentrant, low_memory):
    group = make_group(GROUPS["nf4"])

    def block(x):
        return torch.cat(projections(x, group.members, backend="triton"), -1).square()

    want = torch.autograd.grad(block(group.x).sum(), [group.x, *group.leaves])
    with settings.override(low_memory=low_memory):
        found = names(lambda: checkpoint(block, group.x, use_reentrant=reentrant).sum().backward())
    merges = found.count("_merge_parts_kernel")
    assert merges == (3 if low_memory else 2)  # forward, recompute, and without memory for it the backward
    for leaf, other in zip((group.x, *group.leaves), want, strict=True):
        assert torch.equal(leaf.grad, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gated_layers_recomputed_merge_is_not_made_again(reentrant):
    (each, *_), gate = make_group(GROUPS["nf4"]).members, torch.randn(9, 64).requires_grad_()

    def block(gate):
        return glu_linear(gate, gate * 2, each, backend="triton").square()

    (want,) = torch.autograd.grad(block(gate).sum(), gate)
    found = names(lambda: checkpoint(block, gate, use_reentrant=reentrant).sum().backward())
    assert found.count("_merge_kernel") == 2 and torch.equal(gate.grad, want)
    assert names(lambda: block(gate).sum().backward()).count("_merge_kernel") == 2


def test_without_a_checkpoint_no_merged_weight_is_kept():
    group = make_group(GROUPS["nf4"])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        projections(group.x, group.members, backend="triton")
    dense = {(case.n, case.k) for case in GROUPS["nf4"]}
    assert kept and not any(tuple(t.shape) in dense and t.is_floating_point() for t in kept)
