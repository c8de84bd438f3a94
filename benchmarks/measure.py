"""One case, every contender: build, parity, then times, memory and launches of those that passed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.contenders import Built, Contender, Missing, failures, reason
from benchmarks.oracle import OUTPUTS, Inputs, Oracle, make_inputs

Emit = Callable[[dict[str, Any]], None]
_POISON_BYTES = 1 << 30


class DeviceLost(RuntimeError):
    """The device no longer answers (a kernel left it in error); only a fresh process can go on."""


@dataclasses.dataclass
class Plan:
    """How long to measure, and where.

    Attributes:
        device: of all tensors.
        dry: tiny shapes, few samples.
        seed: of the inputs.
        deadline: `time.monotonic` by which to stop.
        case_seconds: timing time a case's mode (forward, step, graph of each) gets.
        barred: (case, contender, stage) that must not run again, with the reason; stages: "eager", "graph".
    """

    device: torch.device
    dry: bool
    seed: int
    deadline: float
    case_seconds: float = 1.0
    barred: dict[tuple[str, str, str], str] = dataclasses.field(default_factory=dict)

    @property
    def late(self) -> bool:
        """Whether the budget is used up."""
        return time.monotonic() >= self.deadline


def blank_row(case: Case, contender: Contender, status: str, why: str | None = None) -> dict[str, Any]:
    """A row with nothing measured; every row of the report has exactly these keys."""
    return {
        "case": case.name,
        "contender": contender.name,
        "role": contender.role,
        "status": status,
        "reason": why,
        "parity": None,
        "forward_ms": None,
        "step_ms": None,
        "graph_forward_ms": None,
        "graph_step_ms": None,
        "graph_reason": None,
        "peak_bytes": None,
        "saved_bytes": None,
        "launches": None,
        "note": "",
    }


@dataclasses.dataclass
class Entry:
    """One contender in the race for a case: its row, and what it built while it stays in."""

    contender: Contender
    row: dict[str, Any]
    built: Built | None = None

    def drop(self, status: str, why: str) -> None:
        """Out of the race: no time of it is ever reported."""
        fresh = {key: None for key in self.row if key.endswith("_ms")}
        self.row |= fresh | {"status": status, "reason": why}
        self.built = None


class Sets:
    """Rotating inputs: copy i of x and dy, the same values in other memory, in the case's dtype or another."""

    def __init__(self, case: Case, inputs: Inputs, copies: int, dtype: torch.dtype | None = None) -> None:
        x, dy = inputs.x.to(dtype or case.dtype), inputs.dy.to(dtype or case.dtype)
        self.x = [x.clone().requires_grad_(case.train) for _ in range(copies)]
        self.dy = [dy.clone() if case.train else dy for _ in range(copies)]


def check_alive(device: torch.device) -> None:
    """Raises DeviceLost when the device stays in error after a failure."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.rand(1, device=device).item()  # a failed capture can leave the generator unusable
    except RuntimeError as error:
        raise DeviceLost(reason(error)) from error
    torch.cuda.empty_cache()


def run_case(case: Case, contenders: list[Contender], plan: Plan, emit: Emit) -> None:
    """Measure one case and emit one row per contender that applies.

    Raises:
        DeviceLost: the process cannot go on; rows of this case have not been emitted.
    """
    entries = [Entry(one, blank_row(case, one, "ok")) for one in contenders if one.applies(case)]
    for entry in entries:
        if (why := plan.barred.get((case.name, entry.contender.name, "eager"))) is not None:
            entry.drop("failed", why)
        entry.row["graph_reason"] = plan.barred.get((case.name, entry.contender.name, "graph"))
    copies = timing.copies_for(case.call_bytes, plan.device, plan.dry)
    try:
        inputs = make_inputs(case, plan.device, plan.seed)
        oracle = Oracle(case, inputs)
        sets = Sets(case, inputs, copies)
    except failures() as error:
        check_alive(plan.device)
        why = f"inputs or reference: {reason(error)}"
        for entry in entries:
            emit({"event": "row", "row": entry.row | {"status": "failed", "reason": why}})
        return
    for entry in entries:
        if entry.row["status"] == "ok":
            _announce(emit, case, entry)
            admit(case, entry, oracle, inputs, copies, plan)
    del oracle
    inputs.kept.clear()
    live = [entry for entry in entries if entry.built is not None]
    _times(case, live, sets, copies, plan, emit)
    for entry in live:
        if entry.built is not None and not plan.late:
            _announce(emit, case, entry)
            _cost(case, entry, sets, plan)
    if plan.device.type == "cuda" and not plan.late:
        _graphs(case, [entry for entry in live if entry.built is not None], sets, copies, plan, emit)
    elif live:
        why = timing.LATE if plan.device.type == "cuda" else "CUDA graphs need a GPU"
        for entry in live:
            entry.row["graph_reason"] = entry.row["graph_reason"] or why
    for entry in entries:
        emit({"event": "row", "row": entry.row})


def _announce(emit: Emit, case: Case, entry: Entry, stage: str = "eager") -> None:
    """Say who is about to run, so that whoever ends this process is known."""
    emit({"event": "at", "case": case.name, "contender": entry.contender.name, "stage": stage})


# --- parity -----------------------------------------------------------------------------------------------------------


def check(case: Case, contender: Contender, device: torch.device, seed: int = 1) -> dict[str, Any]:
    """Build and parity alone: the row with its verdict, nothing timed."""
    inputs = make_inputs(case, device, seed)
    entry = Entry(contender, blank_row(case, contender, "ok"))
    plan = Plan(device, dry=True, seed=seed, deadline=time.monotonic())
    admit(case, entry, Oracle(case, inputs), inputs, 1, plan)
    return entry.row


def admit(case: Case, entry: Entry, oracle: Oracle, inputs: Inputs, copies: int, plan: Plan) -> None:
    """Build, then compare with the truth; only a contender that passes both stays in the race."""
    try:
        built = entry.contender.build(case, inputs, copies)
        entry.row["note"] = built.note
        _poison(plan.device)
        verdict = _compare(case, entry.contender, built, oracle, inputs)
        timing.synchronize(plan.device)
    except Missing as error:
        entry.drop("missing", reason(error))
        return
    except failures() as error:
        entry.drop("failed", reason(error))
        gc.collect()
        check_alive(plan.device)
        return
    wrong = [name for name, value in verdict.items() if not value["ok"]]
    entry.row["parity"] = {"ok": not wrong, "entries": verdict}
    if wrong:
        entry.drop("parity failed", f"outside the error budget: {', '.join(wrong)}")
        return
    entry.built = built


def _poison(device: torch.device) -> None:
    """Leave NaN in the allocator's cache, so that an output nobody wrote shows."""
    if device.type == "cuda":
        size = min(_POISON_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        torch.full((size // 4,), float("nan"), device=device)


def _compare(case: Case, contender: Contender, built: Built, oracle: Oracle, inputs: Inputs) -> dict[str, Any]:
    strict = contender.role in ("ours", "plan")
    if case.op != "linear":
        with torch.no_grad():
            out = built.parity(inputs.x).y
        if case.op == "dropout_mask":
            _check_rate(case, out)
        return oracle.judge({OUTPUTS[case.op]: out}, contender.function, strict=strict)
    given, dy = (t.to(built.dtype or case.dtype) for t in (inputs.x, inputs.dy))
    x = given.detach().clone().requires_grad_(case.train)
    with torch.set_grad_enabled(case.train):
        y, drop = built.parity(x)
    if drop is not None and drop.mask.shape != x.shape:
        raise ValueError(f"expected a mask of shape {tuple(x.shape)}, got {tuple(drop.mask.shape)}")
    if drop is not None:
        _check_rate(case, drop.mask)
    outputs = {"y": y.detach()}
    if case.train:
        grads = torch.autograd.grad(y, [x, *built.leaves[0].values()], dy)
        outputs |= dict(zip(["dx", *built.leaves[0]], grads, strict=True))
    if not torch.equal(x, given):
        raise ValueError("the contender changed its input")
    return oracle.judge(outputs, contender.function, drop, strict=strict)


def _check_rate(case: Case, mask: Tensor) -> None:
    """The kept share must be 1 - p within six standard deviations (plus the 2^-16 a threshold may be off by)."""
    kept, count = float(mask.double().mean()), mask.numel()
    if abs(kept - (1 - case.p)) > 6 * (case.p * (1 - case.p) / count) ** 0.5 + 2**-16:
        raise ValueError(f"kept {kept:.5f} of x at p={case.p}, expected {1 - case.p:.5f}")


# --- times ------------------------------------------------------------------------------------------------------------


def timed_calls(case: Case, built: Built, sets: Sets) -> dict[str, Callable[[int], Tensor]]:
    """What is timed: a forward as training runs it (with its graph), the whole step; or an eval forward."""

    def step(index: int) -> Tensor:
        return built.step(index, sets.x[index], sets.dy[index])[0]

    def forward(index: int) -> Tensor:
        with torch.set_grad_enabled(case.train):
            return built.forward(index, sets.x[index])

    calls: dict[str, Callable[[int], Tensor]] = {"forward": forward}
    if case.train and case.op == "linear":
        calls["step"] = step
    return calls


def _times(case: Case, live: list[Entry], sets: Sets, copies: int, plan: Plan, emit: Emit) -> None:
    """Eager times, interleaved, into the rows."""
    rounds = (2, 4) if plan.dry else (5, 60)
    for mode in ("forward", "step"):
        jobs: dict[str, timing.Job] = {}
        entries = {entry.contender.name: entry for entry in live if entry.built is not None}
        for name, entry in entries.items():
            calls = timed_calls(case, entry.built, sets) if entry.built is not None else {}
            if mode not in calls:
                continue
            _announce(emit, case, entry)
            try:
                jobs[name] = timing.lengthen(calls[mode], copies, plan.device, 0.5 if plan.dry else 4.0)
            except failures() as error:
                entry.drop("failed", f"{mode}: {reason(error)}")
                check_alive(plan.device)
        emit({"event": "case", "case": case.name})  # from here on nobody in particular is to blame
        stats, failed = timing.interleaved(jobs, plan.device, plan.case_seconds, rounds, plan.deadline)
        for name, value in stats.items():
            entries[name].row[f"{mode}_ms"] = value._asdict()
        for name, why in failed.items():
            if why == timing.LATE:  # parity holds and what was timed stays; say what is missing
                entries[name].row["reason"] = f"{mode}: {why}"
                if mode == "forward":
                    entries[name].drop("skipped", why)
            else:
                entries[name].drop("failed", f"{mode}: {why}")
                check_alive(plan.device)


def _graphs(case: Case, live: list[Entry], sets: Sets, copies: int, plan: Plan, emit: Emit) -> None:
    """Graph replay times into the rows; what cannot be captured, or replays other numbers, gets a reason."""
    for mode in ("forward", "step"):
        jobs: dict[str, timing.Job] = {}
        keep: list[Any] = []
        for entry in live:
            assert entry.built is not None
            calls = timed_calls(case, entry.built, sets)
            if mode not in calls or entry.row["graph_reason"]:
                continue
            _announce(emit, case, entry, "graph")
            try:
                job, first, graph = timing.capture(calls[mode], copies)
                _same_replay(case, job, first, calls[mode](0).detach())
                jobs[entry.contender.name] = job
                keep += [first, graph]
            except failures() as error:
                entry.row["graph_reason"] = f"{mode}: {reason(error)}"
                gc.collect()
                check_alive(plan.device)
        stats, failed = timing.interleaved(jobs, plan.device, plan.case_seconds / 2, (5, 60), plan.deadline)
        for entry in live:
            name = entry.contender.name
            if name in stats:
                entry.row[f"graph_{mode}_ms"] = stats[name]._asdict()
            elif name in failed:
                entry.row["graph_reason"] = f"{mode}: {failed[name]}"
        del jobs, keep


def _same_replay(case: Case, job: timing.Job, first: Tensor, eager: Tensor) -> None:
    """A replay must give the eager result; with dropout (another mask) it must at least be finite."""
    first.detach().fill_(float("nan"))
    job.run()
    torch.cuda.synchronize()
    got, expected = first.detach().float(), eager.float()
    if case.p > 0:
        if not bool(torch.isfinite(got).all()):
            raise ValueError("the replayed graph left values that are not finite")
        return
    difference = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    # Not to the bit: under capture the matrix library may take another algorithm.
    if not difference <= max(2 * torch.finfo(eager.dtype).eps, 1e-5):
        raise ValueError(f"the replayed graph differs from the eager call by {difference:.1e}")


# --- memory and launches ----------------------------------------------------------------------------------------------


def _cost(case: Case, entry: Entry, sets: Sets, plan: Plan) -> None:
    built = entry.built
    assert built is not None
    calls = timed_calls(case, built, sets)
    try:
        if plan.device.type == "cuda":
            entry.row |= _memory(case, built, sets, plan.device)
        entry.row["launches"] = {
            "unit": "kernels" if plan.device.type == "cuda" else "operators",
            "forward": None,
            "step": None,
        } | {mode: _launches(functools.partial(call, 0), plan.device) for mode, call in calls.items()}
    except failures() as error:  # the times stand; only this part is missing
        entry.row["reason"] = f"memory or launches: {reason(error)}"
        check_alive(plan.device)


def _memory(case: Case, built: Built, sets: Sets, device: torch.device) -> dict[str, int | None]:
    """Bytes beyond what was there: the most at any time, and what the forward keeps for the backward (without y)."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.set_grad_enabled(case.train):
        y = built.forward(0, sets.x[0])
    saved = None
    if case.train and case.op == "linear":
        saved = torch.cuda.memory_allocated(device) - before - y.numel() * y.element_size()
        grads = torch.autograd.grad(y, [sets.x[0], *built.leaves[0].values()], sets.dy[0])
        del grads
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before, "saved_bytes": saved}


def _launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels one call launches (copies and fills included); on a CPU, outermost operators."""
    from torch.profiler import ProfilerActivity, profile

    call()
    timing.synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        timing.synchronize(device)
    events = profiler.events() or []
    if cuda:
        return sum(event.device_type.name == "CUDA" for event in events) or None

    def operator(event: Any) -> bool:
        return "::" in event.name and not event.name.startswith(("autograd::", "profiler::"))

    def outermost(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and not operator(parent):
            parent = parent.cpu_parent
        return operator(event) and parent is None

    return sum(map(outermost, events)) or None
