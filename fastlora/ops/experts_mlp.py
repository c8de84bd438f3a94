"""A mixture of LoRA experts over a whole gated MLP (MixLoRA, 2404.15159) as one autograd Function.

T tokens, S slots a token (experts it goes to), E experts; row p = t S + j is token t in slot j. A row whose slot has no
expert belongs to nobody (`math.segments`): it sees the base alone, and its weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora import settings
from fastlora.math.activations import activation
from fastlora.math.segments import Segments, segments
from fastlora.ops import experts_schema
from fastlora.ops.experts import PARTS, Frozen, base_backward, base_forward, put_together, take_apart
from fastlora.ops.experts_fused import Mixture, mixture_of
from fastlora.ops.lora import _direct
from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, NEED_DX, TRAIN

_ops = torch.ops.fastlora


class Facts(NamedTuple):
    """The static facts of a mixture of MLPs.

    Attributes:
        slots: S. experts: E.
        inputs: how many projections read x: two (gate, up), or one that holds both, gate first, or one alone (`gated`
            False: fc1).
        gated: whether the activated half is multiplied by the other.
        act: a name of `math.activations`, or a function.
        low_memory: draw dropout masks again in the backward.
    """

    slots: int
    experts: int
    inputs: int
    gated: bool
    act: str | Callable[[Tensor], Tensor]
    low_memory: bool


class _Scratch:
    """Buffers that the chunks of one call share: fresh pages would cost more than what is written to them."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """[rows, columns] of anything, in the dtype of `like`; the same memory for the same name."""
        (rows, columns), found = shape, self.held.get(name)
        if found is None or found.shape[0] < rows:
            found = self.held[name] = like.new_empty((rows, columns))
        return found if found.shape[0] == rows else found[:rows]

    def repeat(self, name: str, t: Tensor, slots: int) -> Tensor:
        """t [T, n] -> rows [T S, n], each token's side by side."""
        rows = self.take(name, (t.shape[0] * slots, t.shape[1]), t)
        rows.view(-1, slots, t.shape[1]).copy_(t[:, None])
        return rows

    def spread(self, name: str, t: Tensor, w: Tensor) -> Tensor:
        """t [T, n], w [T, S] -> rows [T S, n] of w t."""
        rows = self.take(name, (w.numel(), t.shape[1]), t)
        torch.mul(t[:, None], w[..., None], out=rows.view(*w.shape, t.shape[1]))
        return rows


def _combine(rows: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """rows [T S, n], w [T, S] -> sum over a token's slots of w row, in at least fp32: [T, n]; into `out` if given."""
    view = rows.view(*w.shape, rows.shape[1])
    if rows.dtype == w.dtype and w.shape[1] > 4:
        total = torch.bmm(w[:, None], view)[:, 0]
    else:
        fits = out is not None and out.dtype == w.dtype
        total = torch.mul(view[:, 0], w[:, 0, None], out=out) if fits else view[:, 0] * w[:, 0, None]
        for slot in range(1, w.shape[1]):
            total.addcmul_(view[:, slot].to(total.dtype), w[:, slot, None].to(total.dtype))
    return total if out is None or total is out else out.copy_(total)


def _sum_slots(rows: Tensor, slots: int, out: Tensor) -> None:
    """rows [T S, n] -> their sum over a token's slots, into out [T, n]."""
    view = rows.view(-1, slots, rows.shape[1])
    if slots == 1:
        out.copy_(rows)
    elif slots == 2:
        torch.add(view[:, 0], view[:, 1], out=out)
    else:
        torch.sum(view, 1, out=out)


class _Side(NamedTuple):
    """One linear of the MLP with its experts' tensors; a is None where it has no adapters."""

    frozen: Frozen
    a: Tensor | None
    b: Tensor | None
    mag: Tensor | None

    @property
    def flags(self) -> int:
        return DROPOUT * (self.frozen.p > 0) | DORA * (self.mag is not None)


def _mask(side: _Side, rows: Segments, seed: Tensor | None) -> Tensor | None:
    """The dropout bits of a projection's rows, or None."""
    if seed is None or side.frozen.p == 0.0 or side.a is None or side.b is None:
        return None
    body = experts_schema.experts_mask if _direct(seed, side.a, side.b) else _ops.experts_mask
    return body(seed, side.a, side.b, side.frozen.p, side.frozen.stream, *rows, settings.current.backend)


def _add(
    side: _Side, x: Tensor, y: Tensor, bias: Tensor | None, rows: Segments, mask: Tensor | None, train: int
) -> tuple[Tensor | None, Tensor | None]:
    """What each row's expert adds to y [m, n], which holds the base; h and, of DoRA, z where `train` asks."""
    if side.a is None or side.b is None:
        return None, None
    frozen = side.frozen
    group = (side.a, side.b, side.mag, frozen.norm, frozen.scale, frozen.p, frozen.stream)
    body = experts_schema.experts_fwd if _direct(x, side.a, side.b, side.mag, y) else _ops.experts_fwd
    h, z = body(x, y, bias, *group, *rows, mask, side.flags | train, settings.current.backend)
    return h if train else None, z if train and side.flags & DORA else None


def _add_backward(
    side: _Side,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    rows: Segments,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da, db, dmag, those needed; dx [m, k] gets what flows through the adapter. saved: h, mask, z."""
    if side.a is None or side.b is None:
        return None, None, None
    frozen = side.frozen
    flags = side.flags | NEED_DX * (dx is not None)
    bits = (NEED_DA, NEED_DB, NEED_DMAG)
    flags |= sum(bit for bit, need in zip(bits, needs, strict=True) if need)
    group = (side.a, side.b, side.mag, frozen.norm, frozen.scale, frozen.p, frozen.stream)
    body = experts_schema.experts_bwd if _direct(dy, side.a, side.b, side.mag, x, dx) else _ops.experts_bwd
    found = body(dy, x, dx, *group, *rows, *saved, flags, settings.current.backend)
    da, db, dmag = (grad if flags & bit else None for grad, bit in zip(found, bits, strict=True))
    return da, db, dmag


def _through_dora(side: _Side, d: Tensor, rows: Segments) -> Tensor:
    """d [m, n] times the factor c of each row's expert: the gradient of its base term."""
    norm = side.frozen.norm
    if side.mag is None or norm is None:
        return d
    c = side.mag.to(norm.dtype) / norm
    return (d * torch.cat([c, torch.ones_like(c[:1])])[rows.owner]).to(d.dtype)


def _halves(zs: list[Tensor], gated: bool) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return zs[0], None
    if len(zs) == 2:
        return zs[0], zs[1]
    gate, up = zs[0].chunk(2, -1)
    return gate, up


def _hidden(zs: list[Tensor], facts: Facts, scratch: _Scratch | None = None) -> tuple[Tensor, Tensor]:
    """act(gate), and the hidden rows act(gate) * up; without scratch the z are overwritten."""
    gate, up = _halves(zs, facts.gated)
    own = gate if scratch is None else scratch.take("acted", gate.shape, gate)
    acted = activation(facts.act).forward(gate, own)
    if up is None:
        return acted, acted
    return acted, torch.mul(acted, up, out=acted if scratch is None else scratch.take("hidden", up.shape, up))


def _hidden_backward(d: Tensor, zs: list[Tensor], acted: Tensor, spare: Tensor, facts: Facts) -> list[Tensor]:
    """d of the hidden rows -> d of each projection's rows; the z, `acted` and `spare` are overwritten."""
    gate, up = _halves(zs, facts.gated)
    act = activation(facts.act)
    if up is None:
        return [act.backward(d, gate, gate)]
    through = torch.mul(d, up, out=spare)
    if facts.inputs == 2:
        return [act.backward(through, gate, gate), acted.mul_(d)]
    act.backward(through, gate, gate)
    torch.mul(acted, d, out=up)
    return zs


class _Chunk(NamedTuple):
    """Some tokens, their rows, and whose they are."""

    tokens: slice
    rows: slice
    owners: Segments


# Bytes of one chunk's rows. On a CPU what is formed stays in the cache (2026-11, AMD Zen 4, 32 MiB of L3); elsewhere
# the half a dozen buffers of one call stay small beside what a model saves.
_CHUNK_BYTES = 2 << 20
_DEVICE_CHUNK_BYTES = 256 << 20


def _chunks(experts: Tensor, count: int, width: int, itemsize: int) -> list[_Chunk]:
    """experts [T, S] -> chunks of so many tokens that their rows [., width] stay small; under the compiler one."""
    tokens, slots = experts.shape
    limit = _CHUNK_BYTES if experts.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    size = tokens if torch.compiler.is_compiling() else max(64, limit // (width * itemsize * slots))
    flat = experts.reshape(-1)
    if size >= tokens:
        return [_Chunk(slice(None), slice(None), segments(flat, count))]
    found = []
    for start in range(0, tokens, size):
        rows = slice(start * slots, min(tokens, start + size) * slots)
        found.append(_Chunk(slice(start, start + size), rows, segments(flat[rows], count)))
    return found


def _masks(sides: Sequence[_Side], experts: Tensor, count: int, seed: Tensor | None) -> list[Tensor | None]:
    """The dropout bits of all rows, for each linear."""
    if seed is None:
        return [None] * len(sides)
    owners = segments(experts.reshape(-1), count)
    return [_mask(side, owners, seed) for side in sides]


def _part(t: Tensor | None, at: slice) -> Tensor | None:
    return None if t is None else t[at]


class ExpertsMLP(torch.autograd.Function):
    """y_t = sum_j w_tj FFN_e(t,j)(x_t), FFN_e(x) = W2'(act(W1' x) * W3' x), W' = the frozen W with expert e's adapter.

    c1 = W1 x and c3 = W3 x are formed once a token, z = c + s h B_e^T in every row; W2 is applied once to
    hbar = sum_j w_j act(z1) z3, beside what W2's adapters add to each row. In the backward g = W2^T dy is shared too:
    dw_j = <g + s A2^T B2^T dy, hidden_j>. With DoRA on W2 its product is formed for every row.

    x [T, k], w [T, S], experts int64 [T, S], then a [E, r, k], b [E, n, r], mag [E, n] of each input projection and of
    W2 -> y [T, out]. Saved: x, w, experts, c1, c3, every h [T S, r], dropout bits (low memory: the seed), of DoRA on W2
    its z [T S, out], references to the parameters. The rows of z and hidden are formed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        experts: Tensor,
        seed: Tensor | None,
        layers: tuple[Frozen, ...],
        facts: Facts,
        *tensors: Tensor | None,
    ) -> Tensor:
        """See above."""
        sides = _sides(layers, tensors)
        with torch.amp.autocast(x.device.type, enabled=False):
            y, saved = _mlp_forward(x, w, experts, seed, sides, facts, TRAIN)
        ctx.layer_facts, held = [], []
        for layer in layers:
            parts, fact = take_apart(layer)
            ctx.layer_facts.append(fact)
            held += parts
        ctx.facts, ctx.counts = facts, (len(held), len(tensors))
        ctx.save_for_backward(x, w, experts, seed, *held, *tensors, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy [T, out] -> dx, dw, and da, db, dmag of every projection, each only if its input needs it."""
        x, w, experts, seed, *rest = ctx.saved_tensors
        held, tensors = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts)]
        layers = [
            put_together(held[at : at + PARTS], fact)
            for at, fact in zip(range(0, len(held), PARTS), ctx.layer_facts, strict=True)
        ]
        saved = rest[sum(ctx.counts) :]
        with torch.amp.autocast(x.device.type, enabled=False):
            dy, sides, needs = dy.contiguous(), _sides(layers, tensors), ctx.needs_input_grad
            if (whole := _whole(x, w, experts, seed, sides, ctx.facts)) is not None:
                dx, dw, grads = whole.backward(dy, x, w, experts, saved[:2], saved[2:5], (*needs[:2], *needs[6:]))
            else:
                dx, dw, grads = _Backward(x, w, experts, seed, sides, ctx.facts, saved, needs).run(dy)
        return dx, dw, None, None, None, None, *grads


def _sides(layers: Sequence[Frozen], tensors: Sequence[Any]) -> list[_Side]:
    return [_Side(layer, *tensors[3 * at : 3 * at + 3]) for at, layer in enumerate(layers)]


def _whole(
    x: Tensor, w: Tensor, experts: Tensor, seed: Tensor | None, sides: Sequence[_Side], facts: Facts
) -> Mixture | None:
    """The kernels that take the MLP whole, or None."""
    if not facts.gated or facts.inputs != 2:
        return None
    tensors = [t for side in sides for t in side[1:]]
    return mixture_of(x, w, experts, seed, [side.frozen for side in sides], tensors, facts.act)


def _mlp_forward(
    x: Tensor, w: Tensor, experts: Tensor, seed: Tensor | None, sides: Sequence[_Side], facts: Facts, train: int
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and under `train` what the backward needs: every c, then every h, every mask, and z of W2."""
    if (whole := _whole(x, w, experts, seed, sides, facts)) is not None:
        y, bases, own = whole.forward(x, w, experts, train)
        return y, [*bases, *own, None, None, None, None] if train else []
    *inputs, down = sides
    cs = [base_forward(x, side.frozen) for side in inputs]
    masks = _masks(sides, experts, facts.experts, seed)
    dora = down.mag is not None
    out, width = down.frozen.weight.shape
    y = x.new_empty((x.shape[0], out), dtype=w.dtype)
    seen = x.new_empty((x.shape[0], width)) if not dora else None  # hbar
    kept: list[list[Tensor | None]] = []
    scratch, slots = _Scratch(), facts.slots
    for chunk in _chunks(experts, facts.experts, width, x.element_size()):
        hs: list[Tensor | None] = []
        xr, zs = scratch.repeat("x", x[chunk.tokens], slots), []
        for place, (side, c, mask) in enumerate(zip(inputs, cs, masks[:-1], strict=True)):
            z = scratch.repeat(f"z{place}", c[chunk.tokens], slots)
            h, _ = _add(side, xr, z, side.frozen.bias, chunk.owners, _part(mask, chunk.rows), train)
            hs.append(h)
            zs.append(z)
        # Halves of one tensor are not rows of their own.
        fused = facts.gated and facts.inputs == 1
        (_, hidden), part = _hidden(zs, facts, scratch if fused else None), w[chunk.tokens]
        none = scratch.take("rows", (hidden.shape[0], out), x)
        rows = base_forward(hidden, down.frozen) if dora else none.zero_()
        bias = down.frozen.bias if dora else None
        h, z2 = _add(down, hidden, rows, bias, chunk.owners, _part(masks[-1], chunk.rows), train)
        kept.append([*hs, h, z2])
        if seen is not None:
            _combine(hidden, part, seen[chunk.tokens])
        _combine(rows, part, y[chunk.tokens])
    if seen is not None:
        y += base_forward(seen, down.frozen, bias=False)
        if down.frozen.bias is not None:
            y += w.sum(-1, keepdim=True) * down.frozen.bias
    if not train:
        return y.to(x.dtype), []
    rowwise = [None if p[0] is None else torch.cat(p) if len(p) > 1 else p[0] for p in zip(*kept, strict=True)]
    held = [None] * len(masks) if facts.low_memory else masks
    return y.to(x.dtype), [*cs, *rowwise[:-1], *held, rowwise[-1]]


class _Backward:
    """One backward of `ExpertsMLP`: what it was given, and what has been summed over the chunks so far."""

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        experts: Tensor,
        seed: Tensor | None,
        sides: list[_Side],
        facts: Facts,
        saved: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> None:
        self.x, self.w, self.facts = x, w, facts
        self.inputs, self.down = sides[:-1], sides[-1]
        count = len(sides)
        self.cs, self.hs = saved[: count - 1], saved[count - 1 : 2 * count - 1]
        self.masks, self.z2 = list(saved[2 * count - 1 : 3 * count - 1]), saved[-1]
        if facts.low_memory and seed is not None:
            self.masks = _masks(sides, experts, facts.experts, seed)
        self.need_x, self.need_w, self.needs = needs[0], needs[1], needs[6:]
        width = self.down.frozen.weight.shape[1]
        self.chunks = _chunks(experts, facts.experts, width, x.element_size())
        self.sums: list[Tensor | None] = [None] * (3 * count)
        self.scratch = _Scratch()

    def run(self, dy: Tensor) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """dy [T, out] -> dx, dw, and each linear's da, db, dmag."""
        x, w = self.x, self.w
        # W2^T dy, which every slot of a token shares; with DoRA each row has its own.
        g = None if self.down.mag is not None else base_backward(dy, self.down.frozen)
        dcs = [x.new_empty((x.shape[0], side.frozen.weight.shape[0])) if self.need_x else None for side in self.inputs]
        dx = torch.empty_like(x) if self.need_x else None
        dw = torch.empty_like(w) if self.need_w else None
        for chunk in self.chunks:
            at, slots = chunk.tokens, self.facts.slots
            xr = self.scratch.repeat("x", x[at], slots)
            zs, inner = self._again(chunk, xr)
            acted, hidden = _hidden(zs, self.facts, self.scratch)
            d = self._down(chunk, dy, g, hidden, dw)
            dzs = _hidden_backward(d, zs, acted, hidden, self.facts)
            dxr = self.scratch.take("dx", xr.shape, xr).zero_() if self.need_x else None
            for place, (side, dz, dc) in enumerate(zip(self.inputs, dzs, dcs, strict=True)):
                mask, h = _part(self.masks[place], chunk.rows), _part(self.hs[place], chunk.rows)
                self._gather(place, side, dz, xr, dxr, chunk, (h, mask, inner[place]))
                if dc is not None:
                    _sum_slots(_through_dora(side, dz, chunk.owners), slots, dc[at])
            if dx is not None and dxr is not None:
                _sum_slots(dxr, slots, dx[at])
        for side, dc in zip(self.inputs, dcs, strict=True):
            if dx is not None and dc is not None:
                dx += base_backward(dc, side.frozen)
        return dx, self._dw(dy, dw), self._sums()

    def _again(self, chunk: _Chunk, xr: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The input projections' z of a chunk, and what DoRA's factors multiply."""
        zs, inner = [], []
        for place, (side, c, mask) in enumerate(zip(self.inputs, self.cs, self.masks[:-1], strict=True)):
            assert c is not None
            z = self.scratch.repeat(f"z{place}", c[chunk.tokens], self.facts.slots)
            train = TRAIN if side.mag is not None else 0
            _, own = _add(side, xr, z, side.frozen.bias, chunk.owners, _part(mask, chunk.rows), train)
            zs.append(z)
            inner.append(own)
        return zs, inner

    def _down(self, chunk: _Chunk, dy: Tensor, g: Tensor | None, hidden: Tensor, dw: Tensor | None) -> Tensor:
        """The gradient of the hidden rows; fills a chunk of dw (without the bias) and adds W2's own gradients."""
        side, w, at = self.down, self.w[chunk.tokens], chunk.tokens
        h, mask, z = _part(self.hs[-1], chunk.rows), _part(self.masks[-1], chunk.rows), _part(self.z2, chunk.rows)
        rows = self.scratch.spread("dy", dy[at], w)
        if g is not None:
            d = self.scratch.spread("d", g[at], w)
        else:  # DoRA: each row has its own
            d = base_backward(_through_dora(side, rows, chunk.owners), side.frozen)
        self._gather(len(self.inputs), side, rows, hidden, d, chunk, (h, mask, z))
        if dw is not None and z is not None:
            plain = self.scratch.repeat("dy", dy[at], w.shape[1])
            dw[at] = _row_dots(_through_dora(side, plain, chunk.owners), z, w, None)
        elif dw is not None:
            # d holds the weight already; where that is 0 the router's own derivative is 0 too.
            dw[at] = (_row_dots(d, hidden, w, hidden) / w).masked_fill_(w == 0, 0.0)
        return d

    def _gather(
        self,
        place: int,
        side: _Side,
        dy: Tensor,
        x: Tensor,
        dx: Tensor | None,
        chunk: _Chunk,
        saved: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        """Add a chunk's da, db, dmag of one linear."""
        wanted = self.needs[3 * place : 3 * place + 3]
        if dx is None and not any(wanted):
            return
        for at, grad in enumerate(_add_backward(side, dy, x, dx, chunk.owners, saved, wanted), 3 * place):
            if grad is not None and len(self.chunks) > 1:
                grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            old = self.sums[at]
            self.sums[at] = grad if old is None or grad is None else old.add_(grad)

    def _dw(self, dy: Tensor, dw: Tensor | None) -> Tensor | None:
        bias = self.down.frozen.bias
        return dw if dw is None or bias is None else dw + (dy @ bias.to(dy.dtype))[:, None]

    def _sums(self) -> list[Tensor | None]:
        like = [t for side in (*self.inputs, self.down) for t in (side.a, side.b, side.mag)]
        return [None if d is None or t is None else d.to(t.dtype) for d, t in zip(self.sums, like, strict=True)]


def _row_dots(a: Tensor, b: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """The inner product of each row of a [T S, n] with that of b, as `like` [T, S]; `out` may be overwritten."""
    return torch.mul(a, b, out=out).sum(-1, dtype=like.dtype).view_as(like)


def experts_mlp(
    x: Tensor,
    w: Tensor,
    experts: Tensor,
    seed: Tensor | None,
    layers: Sequence[Frozen],
    facts: Facts,
    tensors: Sequence[Tensor | None],
) -> Tensor:
    """`ExpertsMLP`, or its forward alone where nothing needs a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, *tensors)):
        y: Tensor = ExpertsMLP.apply(x, w, experts, seed, tuple(layers), facts, *tensors)
        return y
    with torch.amp.autocast(x.device.type, enabled=False):
        return _mlp_forward(x, w, experts, seed, _sides(layers, tensors), facts, 0)[0]
