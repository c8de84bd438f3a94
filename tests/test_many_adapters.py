"""Several adapters in one batch: rows sorted on the device, the reference judged by the oracle, the ops' contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import settings, testing
from fastlora.errors import DtypeError, ShapeError
from fastlora.math import philox, reference
from fastlora.math.segments import dropout_bits, segments
from fastlora.ops import grouped_schema
from fastlora.ops.grouped import RowAdapter, mixed_linear
from fastlora.ops.lora import lora_linear
from tests.many_tools import MIXES, OWNER, batch, op_samples

BACKENDS = ["reference", "cpu"]


# --- segments ---------------------------------------------------------------------------------------------------------


def test_segments_sort_stably_and_put_the_rest_last():
    rows = segments(torch.tensor(OWNER), 4)
    assert rows.order.tolist() == [1, 7, 3, 4, 10, 0, 5, 8, 11, 9, 2, 6]
    assert rows.offsets.tolist() == [0, 2, 5, 9, 10]
    assert rows.groups == 4


@pytest.mark.parametrize(
    ("owner", "offsets"), [([], [0, 0, 0]), ([2, 2], [0, 0, 0]), ([1], [0, 0, 1]), ([0, 0], [0, 2, 2])]
)
def test_segments_of_absent_adapters_are_empty(owner, offsets):
    assert segments(torch.tensor(owner, dtype=torch.int64), 2).offsets.tolist() == offsets


def test_segments_refuse():
    with pytest.raises(DtypeError, match="int64"):
        segments(torch.zeros(3), 1)
    with pytest.raises(ShapeError, match=r"\[m\]"):
        segments(torch.zeros((3, 1), dtype=torch.int64), 1)
    with pytest.raises(ShapeError, match="groups"):
        segments(torch.zeros(3, dtype=torch.int64), 0)


@pytest.mark.parametrize("cols", [1, 8, 43])
def test_a_row_drops_what_its_adapter_alone_would(cols):
    seed, streams, ps = torch.tensor([2**40 + 3]), [4, 0, 7, 65536], [0.25, 0.0, 0.9, 0.5]
    bits = dropout_bits(seed, torch.tensor(OWNER), streams, ps, cols)
    for row, own in enumerate(OWNER):
        if own == 4:
            assert not bits[row].any()
        else:
            alone = philox.dropout_bits(seed, streams[own], len(OWNER), cols, ps[own])
            assert torch.equal(bits[row], alone[row])


# --- the oracle -------------------------------------------------------------------------------------------------------


class Oracle(torch.autograd.Function):
    """reference.mixed_forward with reference.mixed_backward; the norms are constants."""

    @staticmethod
    def forward(ctx, x, bias, w, owner, norms, dropouts, *tensors):
        ctx.save_for_backward(x, w, owner, *tensors)
        ctx.rest = norms, dropouts
        return reference.mixed_forward(x, w, Oracle.adapters(tensors, norms), owner, bias, dropouts)

    @staticmethod
    def backward(ctx, dy):
        x, w, owner, *tensors = ctx.saved_tensors
        norms, dropouts = ctx.rest
        grads = reference.mixed_backward(dy, x, w, Oracle.adapters(tensors, norms), owner, dropouts)
        each = [t for triple in zip(grads.da, grads.db, grads.dmag, strict=True) for t in triple]
        return grads.dx, grads.dbias, None, None, None, None, *each

    @staticmethod
    def adapters(tensors, norms):
        return [
            reference.Adapter(tensors[3 * e], tensors[3 * e + 1], 1.3, tensors[3 * e + 2], norm)
            for e, norm in enumerate(norms)
        ]


def test_gradcheck():
    torch.manual_seed(0)
    m, n, k = 5, 4, 6
    double = {"dtype": torch.float64}
    x, bias = torch.randn(m, k, **double, requires_grad=True), torch.randn(n, **double, requires_grad=True)
    w, owner = torch.randn(n, k, **double), torch.tensor([1, 0, 3, 2, 1])
    tensors, norms = [], []
    for rank, dora in ((1, False), (2, True), (3, True)):
        a, b = torch.randn(rank, k, **double), torch.randn(n, rank, **double)
        norms.append(reference.dora_norm(w, a, b, 1.3) if dora else None)
        mag = norms[-1] * torch.linspace(0.5, 2, n, **double) if dora else None
        tensors += [t if t is None else t.requires_grad_() for t in (a, b, mag)]
    keep = torch.rand(m, k) > 0.3
    dropouts = [reference.Dropout(keep, 1 / 0.7), reference.Dropout(keep, 1 / 0.7), None]
    assert torch.autograd.gradcheck(
        lambda x, bias, *t: Oracle.apply(x, bias, w, owner, norms, dropouts, *t), (x, bias, *tensors)
    )


# --- a batch against its adapters one at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_adapter_as_if_alone(backend, quant, mix, dtype):
    for adapter_dtype in {torch.float32, dtype}:
        case = batch(mix, dtype=dtype, adapter_dtype=adapter_dtype, quant=quant, blocksize=32, nested=True)
        many = testing.make_many(case)
        out = testing.run_many(case, many, backend)
        assert testing.judge_many(case, many, out) == []


def test_float64():
    case = batch("dora-dropout", dtype=torch.float64, adapter_dtype=torch.float64)
    many = testing.make_many(case)
    assert testing.judge_many(case, many, testing.run_many(case, many)) == []


@pytest.mark.parametrize("mutation", ["y", "dx", "da", "db", "dmag", "dbias", "rows"])
def test_the_judge_sees_a_small_error(mutation):
    case = batch("dora")
    many = testing.make_many(case)
    out = testing.run_many(case, many, "reference")
    (da, db, dmag), rest = out.adapters[2], list(out.adapters)
    if mutation in ("y", "dx", "dbias"):
        out = out._replace(**{mutation: getattr(out, mutation) * 1.001})
    elif mutation == "rows":
        out = out._replace(y=out.y[[1, 0, *range(2, len(OWNER))]])
    else:
        changed = {"da": (da * 1.001, db, dmag), "db": (da, db * 1.001, dmag), "dmag": (da, db, dmag * 1.001)}
        rest[2] = changed[mutation]
        out = out._replace(adapters=rest)
    assert testing.judge_many(case, many, out) != []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", MIXES)
def test_rows_without_adapter_are_the_base_bit_for_bit(backend, mix):
    case = batch(mix, dtype=torch.bfloat16)
    many = testing.make_many(case)
    out = testing.run_many(case, many, backend)
    whole = many.whole
    x = whole.x.clone().requires_grad_()
    y = lora_linear(x, whole.weight, x.new_empty(0, 43), x.new_empty(20, 0), 1.0, bias=whole.bias, backend=backend)
    y.backward(whole.dy)
    none = [row for row, own in enumerate(OWNER) if own == 4]
    assert torch.equal(out.y[none], y[none])
    assert torch.equal(out.dx[none], x.grad[none])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", ["lora", "dora"])
def test_permuting_rows_permutes_outputs(backend, mix):
    case = batch(mix)
    many = testing.make_many(case)
    out = testing.run_many(case, many, backend)
    mixed = torch.randperm(len(OWNER), generator=torch.Generator().manual_seed(3))
    moved = dataclasses.replace(case, owner=tuple(OWNER[i] for i in mixed))
    whole = many.whole._replace(x=many.whole.x[mixed], dy=many.whole.dy[mixed])
    again = testing.run_many(moved, many._replace(whole=whole), backend)
    if backend == "reference":  # its products are the library's, whose rows depend on their place by a last bit
        near = {"rtol": 0, "atol": 2e-5}
        torch.testing.assert_close(again.y, out.y[mixed], **near)
        torch.testing.assert_close(again.dx, out.dx[mixed], **near)
    else:
        assert torch.equal(again.y, out.y[mixed])
        assert torch.equal(again.dx, out.dx[mixed])


# --- what the ops promise ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes every op that reads a tensor's values back to the host."""

    READS = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen, self.reads = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        name = func.overloadpacket.__name__
        body = getattr(grouped_schema, name, None)
        if body is not None:  # what an op does inside is seen only if its body is called
            with self:
                return body(*args, **(kwargs or {}))
        if name in self.READS or (
            name in ("index", "index_put") and any(t.dtype == torch.bool for t in args[1] if t is not None)
        ):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_to_the_host():
    """Inside the ops too: their bodies are run under the mode."""
    case = batch("dora-dropout")
    many = testing.make_many(case)
    with Watch() as watch:
        testing.run_many(case, many, "reference")
    assert watch.seen > 200
    assert watch.reads == []
    with Watch() as watch:
        torch.ones(3).nonzero()
        assert torch.ones(1).item() == 1
    assert watch.reads == ["nonzero", "_local_scalar_dense"]


def test_tuning_does_not_add_twice(tmp_path):
    """Measured candidates run on the arguments at hand; the grouped kernels change theirs."""
    case = batch("dora-dropout")
    many = testing.make_many(case)
    with settings.override(tune=True, tune_cache=str(tmp_path / "tuned.json")):
        out = testing.run_many(case, many)
    assert testing.judge_many(case, many, out) == []


def test_bad_input():
    case = batch("lora")
    many = testing.make_many(case)
    whole, adapters = many.whole, [RowAdapter(own.a, own.b, 1.0) for own in many.alone]
    rows = segments(torch.tensor(OWNER), 4)
    with pytest.raises(ShapeError, match="3 adapters and 12 rows of 4"):
        mixed_linear(whole.x, whole.weight, adapters[:3], rows)
    with pytest.raises(ShapeError, match="one adapter at least"):
        mixed_linear(whole.x, whole.weight, [], rows)
    with pytest.raises(ShapeError, match="12 rows"):
        mixed_linear(whole.x[:5], whole.weight, adapters, rows)
    wrong = adapters[0]._replace(a=adapters[0].a[:, :4])
    away = adapters[2]._replace(a=adapters[2].a.to("meta"), b=adapters[2].b.to("meta"))
    with pytest.raises(ShapeError, match=r"expected a \[r, 43\]"):
        mixed_linear(whole.x, whole.weight, [wrong, *adapters[1:]], rows)
    with pytest.raises(DtypeError, match="on the device of x, cpu, got one on meta"):
        mixed_linear(whole.x, whole.weight, [*adapters[:2], away, adapters[3]], rows)
    with pytest.raises(ShapeError, match="dora_dropout"):
        mixed_linear(whole.x, whole.weight, [adapters[0]._replace(dora_dropout="no"), *adapters[1:]], rows)
    with pytest.raises(DtypeError, match="one dtype"):
        mixed_linear(whole.x.bfloat16(), whole.weight, adapters, rows)


# --- the ops' contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s[0]}") for i, s in enumerate(op_samples())])
def test_opcheck(sample):
    name, args = sample
    results = torch.library.opcheck(getattr(torch.ops.fastlora, name).default, args)
    assert set(results.values()) == {"SUCCESS"}, results
