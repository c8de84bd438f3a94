"""The CPU library's kernels for a few tokens: every token count around the groups they work in, weights whose blocks
are and are not whole rows, and memory that must not be read or written."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastlora.backends import _cpu_library, cpu
from fastlora.math import nf4, philox
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import BIAS, DORA, NEED_DMAG, TRAIN
from fastlora.testing import Guarded, guarded
from tests.test_cpu_backend import (
    ALL_NEEDS,
    DTYPES,
    FORMATS,
    FOUND,
    MODES,
    WHY,
    Case,
    check,
    one_thread,
    tier,
)

pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY or "built")
__all__ = ["one_thread", "tier"]  # fixtures


def flags_of(mode: str) -> int:
    return MODES[mode] | TRAIN | BIAS | (ALL_NEEDS if MODES[mode] & DORA else ALL_NEEDS & ~NEED_DMAG)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["lora", "drop", "dora-peft"])
def test_every_token_count(tier: str, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    for m in range(1, 34):
        check(Case(m, 37, 192, 16, dtype, "nested", flags_of(mode), torch.float32, 64), tier)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", ["drop", "dora", "dora-peft", "dora-shared"])
def test_shapes_and_blocks(tier: str, mode: str, fmt: str) -> None:
    """Rows of whole blocks, rows that share blocks, odd rows and columns, more than one piece of columns."""
    torch.manual_seed(11)
    shapes = ((1, 33, 64, 64), (3, 25, 128, 128), (8, 31, 1088, 64), (2, 65, 2304, 256), (5, 24, 96, 64))
    shapes += ((4, 23, 75, 64), (9, 27, 100, 128), (17, 50, 33, 64), (2, 20, 39, 64), (6, 30, 4096, 4096))
    for (m, n, k, blocksize), dtype in itertools.product(shapes, DTYPES):
        check(Case(m, n, k, 5, dtype, fmt, flags_of(mode), torch.float32, blocksize), tier)


def test_long_sums(tier: str) -> None:
    """h over 4096 columns and g over 4096 rows stay as exact as short sums."""
    torch.manual_seed(12)
    for dtype, (n, k) in itertools.product((torch.float32, torch.bfloat16), ((4096, 64), (64, 4096))):
        check(Case(8, n, k, 16, dtype, "nested", flags_of("drop"), torch.float32, 64), tier)


@pytest.mark.parametrize("rank", [0, 1, 4, 15, 17, 40])
def test_ranks(tier: str, rank: int) -> None:
    torch.manual_seed(13)
    for m, dtype in itertools.product((1, 6), DTYPES):
        check(Case(m, 40, 128, rank, dtype, "nf4", flags_of("drop"), torch.float32, 64), tier)


def test_threads_do_not_change_a_bit(tier: str) -> None:
    for m, dtype, fmt in itertools.product((1, 7, 20), (torch.float32, torch.bfloat16), ("nested", "dense")):
        case = Case(m, 1500, 1344, 16, dtype, fmt, flags_of("dora-peft"), torch.float32, 64)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, h, mask, z = case.forward()
            results.append([y, h, mask, z, *case.backward(h, mask, z)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert a is not None and b is not None and torch.equal(a, b)


def fenced(case: Case) -> list[Guarded]:
    """Put poison around every operand of a case."""
    fences = []

    def guard(t: Tensor) -> Tensor:
        fences.append(guarded(t))
        return fences[-1].tensor

    for name in ("x", "dy", "a", "b", "bias", "mag", "norm"):
        if getattr(case, name) is not None:
            setattr(case, name, guard(getattr(case, name)))
    if isinstance(case.weight, PackedWeight):
        parts = ("packed", "absmax", "nested_absmax", "nested_offset", "code")
        found = {name: getattr(case.weight, name) for name in parts}
        case.weight = case.weight._replace(**{name: guard(t) for name, t in found.items() if t is not None})
    else:
        case.weight = guard(case.weight)
    return fences


@pytest.mark.parametrize("fmt", FORMATS)
def test_nothing_around_the_operands_is_used(tier: str, fmt: str) -> None:
    torch.manual_seed(14)
    shapes = ((1, 33, 64, 64), (8, 25, 192, 64), (3, 17, 1088, 64), (5, 9, 75, 64), (20, 31, 96, 32))
    for (m, n, k, blocksize), dtype in itertools.product(shapes, DTYPES):
        case = Case(m, n, k, 5, dtype, fmt, flags_of("dora-peft"), torch.float32, blocksize)
        fences = fenced(case)
        check(case, tier)
        assert all(fence.intact() for fence in fences)


def test_nothing_around_the_outputs_is_written(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own calls, their outputs moved between poisoned bands."""
    fences: list[Guarded] = []
    fields = ("y", "h", "mask", "z", "dx", "da", "db", "dmag", "dbias")
    position = {name: 28 + i for i, name in enumerate((*fields[:4], "dy", *fields[4:]))}  # in `struct Args`
    pack = _cpu_library.pack_fields
    sizes: dict[str, Tensor] = {}

    def moved(*values: float) -> bytes:
        made = list(values)
        for name in fields[:4] if made[position["y"]] else fields[4:]:
            fences.append(guarded(sizes[name]))
            assert made[position[name]]
            made[position[name]] = fences[-1].tensor.data_ptr()
            fences[-1].tensor.zero_()
        return pack(*made)

    for (m, n, k), dtype in itertools.product(((1, 33, 64), (8, 25, 1088), (5, 9, 75), (20, 31, 192)), DTYPES):
        case = Case(m, n, k, 5, dtype, "nested", flags_of("dora-peft"), torch.float32, 64)
        y, h, mask, z = case.forward()
        outputs = (y, h, mask, z, *case.backward(h, mask, z))
        sizes = {name: t for name, t in zip(fields, outputs, strict=True) if t is not None}
        with monkeypatch.context() as patch:
            patch.setattr(_cpu_library, "pack_fields", moved)
            case.forward()
            case.backward(h, mask, z)
        assert all(torch.equal(f.tensor, t) for f, t in zip(fences, outputs, strict=True))
        assert len(fences) == len(fields) and all(fence.intact() for fence in fences)
        fences.clear()


def test_wide_masks_and_groups_of_them(tier: str) -> None:
    """Column counts around the number of mask bytes made at once."""
    for k in (1, 7, 8, 127, 128, 129, 255, 256, 257, 520):
        case = Case(3, 4, k, 2, torch.float32, "dense", flags_of("drop"), torch.float32)
        mask = case.forward()[2]
        assert mask is not None and torch.equal(mask, philox.dropout_bits(1234567890123, 3, 3, k, 0.3)), k


def test_every_code_next_to_every_decision(tier: str) -> None:
    """Quantization beside each decision point, at scales where 1/absmax rounds: no code may move."""
    points = nf4.midpoints("nf4")
    near = [points]
    for _ in range(4):
        near.append(torch.nextafter(near[-1], torch.tensor(2.0)))
    below = [points]
    for _ in range(4):
        below.append(torch.nextafter(below[-1], torch.tensor(-2.0)))
    w = torch.cat([torch.stack(near + below).flatten(), torch.ones(10), -torch.ones(160)])[: 5 * 64].view(5, 64).clone()
    w[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    for scale in (1.0, 0.1, 3.3e-5, 7e11, 1e-37, 3e38):
        expected = nf4.quantize_blocks(w * scale, "nf4", 64)
        actual = cpu.quantize(Case(1, 1, 1, 1, torch.float32, "dense", 0, torch.float32).problem, w * scale, "nf4", 64)
        assert torch.equal(actual[0], expected[0]), scale
