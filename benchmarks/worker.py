"""The process that touches the device: measures cases and prints one JSON event a line, each behind `MARK`.

It runs apart from the report because a broken kernel can take its process along (a lost context, a crash, a hang).
Events: {"event": "case" | "at" | "row" | "roof" | "roof failed" | "lost" | "end", ...}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import measure, roofline
from benchmarks.cases import Case, grid
from benchmarks.contenders import Contender, failures, reason
from benchmarks.ours import ours
from benchmarks.peers import peers

MARK = "@@report "
LOST = 3  # exit status: the device does not answer any more
_ROOF_SHARE = 0.15  # of the time left


def all_contenders(only: list[str] | None = None) -> list[Contender]:
    """Floor, peers, ours; optionally only those named.

    Raises:
        ValueError: an unknown name.
    """
    contenders = [*peers(), *ours()]
    known = {contender.name for contender in contenders}
    if unknown := sorted(set(only or ()) - known):
        raise ValueError(f"unknown contender {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return [one for one in contenders if not only or one.name in only]


def run(cases: list[Case], contenders: list[Contender], plan: measure.Plan, emit: measure.Emit, roof: bool) -> None:
    """Measure the roof (if asked) and the cases in order until the plan's deadline.

    Raises:
        measure.DeviceLost: see `measure.run_case`.
    """
    if roof and not plan.late:
        now = time.monotonic()
        share = now + _ROOF_SHARE * (plan.deadline - now)
        try:
            emit({"event": "roof", "roof": roofline.measure(cases, plan.device, plan.dry, share)})
        except failures() as error:
            measure.check_alive(plan.device)
            emit({"event": "roof failed", "reason": reason(error)})
    for case in cases:
        if plan.late:
            break
        emit({"event": "case", "case": case.name})
        measure.run_case(case, contenders, plan, emit)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    emit({"event": "end"})


@contextlib.contextmanager
def one_thread(active: bool) -> Iterator[None]:
    """Tiny products on several threads of a busy machine time the scheduler; a dry run takes one."""
    before = torch.get_num_threads()
    if active:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(event: dict[str, Any]) -> None:
    sys.stdout.write(MARK + json.dumps(event, allow_nan=False) + "\n")
    sys.stdout.flush()


def main(argument: str) -> int:
    """Run what the JSON argument asks for: dry, device, cases (names), contenders, seed, until, barred, roof."""
    asked = json.loads(argument)
    wanted = set(asked["cases"])
    cases = [case for case in grid(asked["dry"]) if case.name in wanted]
    plan = measure.Plan(
        device=torch.device(asked["device"]),
        dry=asked["dry"],
        seed=asked["seed"],
        deadline=time.monotonic() + asked["until"] - time.time(),  # starting up counts
        case_seconds=0.05 if asked["dry"] else 1.0,
        barred={(case, name, stage): why for case, name, stage, why in asked["barred"]},
    )
    try:
        with one_thread(asked["dry"]):
            run(cases, all_contenders(asked["contenders"]), plan, _print, asked["roof"])
    except measure.DeviceLost as error:
        _print({"event": "lost", "reason": str(error)})
        return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
