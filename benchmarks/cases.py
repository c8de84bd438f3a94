"""What is measured, most important first: x[m,k] w[n,k] a[r,k] b[n,r] -> y[m,n]."""

from __future__ import annotations

import dataclasses
import fnmatch

import torch

# Which way each metric of a target must go.
METRICS = {"ratio_to_floor": "below", "speedup": "above", "share_of_copy": "above", "microseconds": "below"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number our own row has to reach.

    Attributes:
        metric: a key of `METRICS`.
        bound: the number.
        graph: judged on CUDA-graph replay instead of eager calls.
    """

    metric: str
    bound: float
    graph: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; every contender that applies is measured on it.

    Attributes:
        name: unique, also what `--only` matches.
        op: "linear", "quantize", "dequantize", "dora_norm" or "dropout_mask".
        n, k, m, r: out_features, in_features, tokens, rank.
        dtype: of x, y and a dense weight.
        quant: "nf4" or "" for a dense base.
        p: dropout probability.
        dora: with a magnitude vector.
        dora_dropout: with p > 0, what the base product sees: "peft" the dropped x, "shared" x itself.
        nested: the absmax values are quantized too.
        train: forward and backward; otherwise an eval forward without gradients.
        target: what our row should reach, if something was promised.
    """

    name: str
    op: str
    n: int
    k: int
    m: int = 0
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    quant: str = "nf4"
    p: float = 0.0
    dora: bool = False
    dora_dropout: str = "peft"
    nested: bool = True
    train: bool = True
    target: Target | None = None

    @property
    def alpha(self) -> int:
        """lora_alpha, chosen so that the scale is 1.5: no power of two, so a lost factor shows."""
        return 3 * self.r // 2

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.r

    @property
    def base_products(self) -> int:
        """How many floor forwards (or floor steps) the function itself asks for.

        DoRA with dropout by PEFT's rule multiplies the frozen weight twice in each direction, so it is judged
        against twice the floor.
        """
        return 2 if self.dora and self.p > 0 and self.dora_dropout == "peft" else 1

    @property
    def weight_bytes(self) -> float:
        """One read of the frozen weight: packed nibbles with fp32 absmax or 8-bit codes of them, or dense."""
        if self.quant:
            return self.n * self.k * (0.5 + (1 + 4 / 256 if self.nested else 4) / 64)
        return float(self.n * self.k * self.dtype.itemsize)

    @property
    def call_bytes(self) -> float:
        """Least traffic of one forward, for choosing how many input sets outgrow the cache."""
        if self.op == "dropout_mask":
            return self.m * self.k / 8
        if self.op in ("quantize", "dequantize"):
            return self.weight_bytes + self.n * self.k * self.dtype.itemsize
        if self.op == "dora_norm":
            return self.weight_bytes + 4 * self.r * (self.n + self.k)
        return self.weight_bytes + 4 * self.r * (self.n + self.k) + self.m * (self.n + self.k) * self.dtype.itemsize

    def describe(self) -> dict[str, object]:
        """The case as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        fields["target"] = dataclasses.asdict(self.target) if self.target else None
        fields["scale"] = self.scale
        fields["base_products"] = self.base_products
        return fields


SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = 8192
_GOALS = {
    ("qlora", 0.0): (1.14, 1.09, 1.09),
    ("qlora", 0.05): (1.20, 1.15, 1.17),
    ("qdora", 0.0): (1.17, 1.13, 1.12),
}


def _training(kind: str, shape: tuple[int, int], p: float, bound: float | None, m: int = TOKENS) -> Case:
    n, k = shape
    return Case(
        name=f"{kind}-p{p:g}-{n}x{k}",
        op="linear",
        n=n,
        k=k,
        m=m,
        quant="nf4" if kind.startswith("q") else "",
        p=p,
        dora=kind.endswith("dora"),
        target=Target("ratio_to_floor", bound) if bound else None,
    )


def _decode(shape: tuple[int, int], m: int, bound: float | None, quant: str = "nf4") -> Case:
    n, k = shape
    return Case(
        name=f"decode{'' if quant else '-dense'}-m{m}-{n}x{k}",
        op="linear",
        n=n,
        k=k,
        m=m,
        quant=quant,
        train=False,
        target=Target("speedup", bound, graph=True) if bound else None,
    )


def _gpu_grid() -> list[Case]:
    square, tall, wide = SHAPES
    cases = [
        _training(kind, shape, p, bounds[column])
        for column, shape in enumerate(SHAPES)
        for (kind, p), bounds in _GOALS.items()
    ]
    cases[3:3] = [
        _training("lora", square, 0.0, 1.17),
        _training("lora", square, 0.05, 1.18),
        _decode(square, 1, 2.0),
        _decode(tall, 1, 3.0),
        _decode(tall, 16, 2.5),
        Case("dequantize-4096x4096", "dequantize", *square, target=Target("share_of_copy", 0.85, graph=True)),
        Case("dora-norm-4096x4096", "dora_norm", *square, dora=True, target=Target("microseconds", 12.0, graph=True)),
    ]
    square_case = _training("qlora", square, 0.0, None)
    return [
        *cases,
        Case("dequantize-14336x4096", "dequantize", *tall, target=Target("share_of_copy", 0.85, graph=True)),
        _decode(square, 16, None),
        _training("qdora", square, 0.05, None),
        dataclasses.replace(square_case, name="qlora-p0-r64-4096x4096", r=64),
        dataclasses.replace(square_case, name="qlora-p0-m2048-4096x4096", m=2048),
        dataclasses.replace(square_case, name="qlora-p0-m512-4096x4096", m=512),
        _training("dora", square, 0.0, None),
        _training("lora", tall, 0.0, None),
        _training("lora", wide, 0.0, None),
        _decode(wide, 1, None),
        _decode(tall, 4, None),
        _decode(square, 1, None, quant=""),
        dataclasses.replace(square_case, name="qlora-p0-fp16-4096x4096", dtype=torch.float16),
        dataclasses.replace(square_case, name="lora-p0-fp32-4096x4096", dtype=torch.float32, quant="", m=2048),
        Case("dora-norm-14336x4096", "dora_norm", *tall, dora=True),
        Case("quantize-4096x4096", "quantize", *square),
        Case("dropout-mask-8192x4096", "dropout_mask", *square, m=TOKENS, p=0.05),
    ]


def _dry_grid() -> list[Case]:
    shape = (192, 128)
    return [
        dataclasses.replace(_training("qlora", shape, 0.0, 1.14, m=48), r=4),
        dataclasses.replace(_training("qdora", shape, 0.05, None, m=48), r=4),
        dataclasses.replace(_training("lora", shape, 0.05, 1.18, m=48), r=4),
        Case("lora-p0-fp32-192x128", "linear", *shape, m=48, r=4, quant="", dtype=torch.float32),
        dataclasses.replace(_decode(shape, 1, 2.0), r=4),
        Case("dequantize-192x128", "dequantize", *shape, target=Target("share_of_copy", 0.85, graph=True)),
        Case("dora-norm-192x128", "dora_norm", *shape, r=4, dora=True, target=Target("microseconds", 12.0, graph=True)),
        Case("quantize-192x128", "quantize", *shape),
        Case("dropout-mask-48x128", "dropout_mask", *shape, m=48, p=0.05),
    ]


def grid(dry: bool, only: list[str] | None = None) -> list[Case]:
    """The cases in order of importance.

    Args:
        dry: the tiny CPU grid that walks the same code.
        only: names or shell patterns; a bare word matches anywhere in the name.

    Raises:
        ValueError: a pattern matches nothing; lists the names.
    """
    cases = _dry_grid() if dry else _gpu_grid()
    if not only:
        return cases
    patterns = [word if any(sign in word for sign in "*?[") else f"*{word}*" for word in only]
    for word, pattern in zip(only, patterns, strict=True):
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case matches {word!r}; known: {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
