"""The rank allocator: scores every triplet as training goes, and zeroes the E of those that fall out of the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adalora.triplets import find
from fastlora.config import AdaLoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.nn.sharded import refuse_sharded

# The fields that the schedule and the statistics are made from.
_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")


class RankAllocator:
    """Spends a shrinking budget of ranks on the triplets that matter (AdaLoRA, 2303.10512, section 3).

    For every entry w of A, E and B, with g its gradient, at each step up to T' = total_step - tfinal:

        I = |w g|,  S <- beta1 S + (1 - beta1) I,  U <- beta2 U + (1 - beta2) |I - S|,  score = S U

    A triplet scores score(E_i) + mean_c score(A_ic) + mean_o score(B_oi). At an allocation the E of the lowest are set
    to 0, over all layers at once, so many that the budget is left (more, where several tie at the threshold). Their A,
    B and gradients stay: a triplet may come back until the pattern freezes at T'. What PEFT's allocator computes, equal
    to the bit for fp32 adapters on one device.

    The statistics (twice the adapter's size, in at least fp32) live where the parameters do; no value is read back.

    Args:
        model: with an adapter made with an AdaLoraConfig in some layers.
        config: that config.
        adapter_name: which adapter.

    Raises:
        ConfigError: no layer has the adapter, its layers were made with another schedule, were pruned already, or are
            cut over processes. TypeError: not an AdaLoraConfig.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default") -> None:
        self.config = AdaLoraConfig.of(config)
        self.adapter_name, self._layers = find(model, adapter_name)
        for entry in self._layers:
            if entry.config.r != entry.config.init_r:
                raise ConfigError(
                    f"{entry.name} was loaded with {entry.config.r} of {entry.config.init_r} ranks: its allocation is "
                    "over, train it without an allocator"
                )
            for field in _SCHEDULE:
                have, want = getattr(entry.config, field), getattr(self.config, field)
                if have != want:
                    raise ConfigError(f"{entry.name} was made with {field}={have}, the config says {want}")
            refuse_sharded(entry.a, "allocating ranks")
        self._sizes = [entry.e.shape[0] for entry in self._layers]
        self._last = -1
        self._frozen = False
        self._kept: list[Tensor] | None = None  # a bool [r] for each layer
        self._sensitivity: list[Tensor] | None = None  # of A, E, B of the first layer, then of the next
        self._uncertainty: list[Tensor] | None = None

    @property
    def initial_budget(self) -> int:
        """Triplets at the start."""
        return sum(self._sizes)

    @property
    def frozen(self) -> bool:
        """Whether the pattern is final."""
        return self._frozen

    def budget(self, global_step: int) -> tuple[int, bool]:
        """The triplets that the step `global_step` leaves, and whether it allocates; a function of the schedule alone.

        b(t) = int(b_T + (b_0 - b_T) (1 - (t - tinit) / (T' - tinit))^3), b_T = target_r * layers (equation 12).
        """
        start, end, config = self.initial_budget, self.config.target_r * len(self._layers), self.config
        if global_step <= config.tinit:
            return start, False
        if global_step >= self._freeze_at:
            return end, True
        left = 1 - (global_step - config.tinit) / (self._freeze_at - config.tinit)
        return int((start - end) * left**3 + end), global_step % config.deltaT == 0

    @property
    def _freeze_at(self) -> int:
        return self.config.total_step - self.config.tfinal

    @torch.no_grad()
    def step(self, global_step: int) -> int:
        """Call once after each `optimizer.step()`, before the gradients are cleared.

        A layer whose parameters have no gradient keeps its statistics as they are.

        Args:
            global_step: the optimizer step just taken; grows from call to call. A step left out is allowed, and if
                T' itself is left out the pattern freezes at the first step after it.

        Returns:
            The budget of this step.

        Raises:
            ConfigError: a step that does not come after the last one, no gradient at all (cleared already?), or a
                freeze without statistics. Nothing has changed then.
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int) or global_step < 0:
            raise ConfigError(f"global_step must be an integer of at least 0, got {global_step!r}")
        if global_step <= self._last:
            raise ConfigError(f"expected a global_step after {self._last}, got {global_step}")
        budget, allocates = self.budget(global_step)
        if self._frozen:
            self._apply_masks()
        elif global_step < self._freeze_at:
            self._observe()
            if allocates:
                self._allocate(budget)
        else:
            if self._sensitivity is None:
                raise ConfigError(
                    f"step {global_step} freezes the ranks, but no step before {self._freeze_at} was observed: a run "
                    "that is resumed needs load_state_dict with the allocator's own state"
                )
            self._allocate(budget)
            self._frozen, self._sensitivity, self._uncertainty = True, None, None
        self._last = global_step
        return budget

    # --- scores -------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for entry in self._layers for parameter in (entry.a, entry.e, entry.b)]

    def _observe(self) -> None:
        """Take the step's sensitivities into S and U."""
        parameters = self._parameters()
        held = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
        if not held:
            raise ConfigError(
                "no parameter of the adapter has a gradient: call step after backward and optimizer.step(), and before "
                "zero_grad()"
            )
        if self._sensitivity is None or self._uncertainty is None:
            kinds = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
            self._sensitivity, self._uncertainty = (
                [torch.zeros_like(p, dtype=kind) for p, kind in zip(parameters, kinds, strict=True)] for _ in range(2)
            )
        s, u = [self._sensitivity[index] for index in held], [self._uncertainty[index] for index in held]
        weights = [parameters[index].detach().to(old.dtype) for index, old in zip(held, s, strict=True)]
        grads = [parameters[index].grad.to(old.dtype) for index, old in zip(held, s, strict=True)]  # type: ignore[union-attr]
        seen = list(torch._foreach_mul(weights, grads))
        torch._foreach_abs_(seen)
        _average(s, seen, self.config.beta1)
        torch._foreach_sub_(seen, s)
        torch._foreach_abs_(seen)
        _average(u, seen, self.config.beta2)

    def scores(self) -> list[Tensor]:
        """Every triplet's score, [r] for each layer in the model's order; fp32 (fp64 for float64 adapters).

        Raises:
            ConfigError: nothing observed yet, or the pattern is frozen and the statistics are gone.
        """
        if self._sensitivity is None or self._uncertainty is None:
            raise ConfigError(f"no statistics: {'the pattern is frozen' if self._frozen else 'no step was observed'}")
        single = torch._foreach_mul(self._sensitivity, self._uncertainty)
        groups = zip(single[0::3], single[1::3], single[2::3], strict=True)
        return [e.reshape(-1) + (a.mean(1) + b.mean(0)) for a, e, b in groups]

    # --- masks --------------------------------------------------------------------------------------------------------

    def _allocate(self, budget: int) -> None:
        """Zero the E of all but `budget` triplets; those that tie with the last one to go, go too."""
        scores = self.scores()
        over = self.initial_budget - budget
        if over <= 0:  # init_r == target_r, or no budget spent yet
            self._kept = [torch.ones_like(score, dtype=torch.bool) for score in scores]
        else:
            device = scores[0].device
            threshold = torch.cat([score.to(device) for score in scores]).kthvalue(over).values
            self._kept = [~(score <= threshold.to(score.device)) for score in scores]
        self._apply_masks()

    def _apply_masks(self) -> None:
        assert self._kept is not None
        for entry, kept in zip(self._layers, self._kept, strict=True):
            entry.e.masked_fill_(~kept[:, None], 0.0)
            entry.layer.rank_masks[self.adapter_name] = kept

    # --- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's and the optimizer's own states; tensors are copies."""

        def copies(names: list[str], values: list[Tensor] | None) -> dict[str, Tensor] | None:
            return None if values is None else {n: v.detach().clone() for n, v in zip(names, values, strict=True)}

        return {
            "step": self._last,
            "frozen": self._frozen,
            "schedule": {field: getattr(self.config, field) for field in _SCHEDULE},
            "kept": copies(self._names("E"), self._kept),
            "sensitivity": copies(self._names("AEB"), self._sensitivity),
            "uncertainty": copies(self._names("AEB"), self._uncertainty),
        }

    def _names(self, parts: str) -> list[str]:
        return [f"{entry.name}.lora_{part}".lstrip(".") for entry in self._layers for part in parts]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the steps that follow are those of an uninterrupted run, to the bit.

        Args:
            state: what `state_dict` gave.

        Raises:
            StateDictError: of other layers, shapes or another schedule; nothing has changed then.
        """
        want = {field: getattr(self.config, field) for field in _SCHEDULE}
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise StateDictError(f"expected the state of a RankAllocator, got {_outline(state)}")
        if state["schedule"] != want:
            raise StateDictError(f"the state belongs to the schedule {state['schedule']}, this run has {want}")
        if not isinstance(state["step"], int) or not isinstance(state["frozen"], bool):
            raise StateDictError(f"expected a step and a flag, got {state['step']!r} and {state['frozen']!r}")
        parameters = self._parameters()
        kept = self._checked(state, "kept", "E", [parameter[:, 0] for parameter in parameters[1::3]], torch.bool)
        sensitivity = self._checked(state, "sensitivity", "AEB", list(parameters), None)
        uncertainty = self._checked(state, "uncertainty", "AEB", list(parameters), None)
        if (sensitivity is None) != (uncertainty is None) or (state["frozen"] and kept is None):
            raise StateDictError("the state holds only half of its statistics, or no pattern though it is frozen")
        self._last, self._frozen, self._kept = state["step"], state["frozen"], kept
        self._sensitivity, self._uncertainty = sensitivity, uncertainty
        for index, entry in enumerate(self._layers):
            if kept is None:
                entry.layer.rank_masks.pop(self.adapter_name, None)
            else:
                entry.layer.rank_masks[self.adapter_name] = kept[index]

    def _checked(
        self, state: dict[str, Any], key: str, parts: str, like: list[Tensor], dtype: torch.dtype | None
    ) -> list[Tensor] | None:
        """The tensors of one entry, copied to where the parameters are."""
        values, names = state[key], self._names(parts)
        if values is None:
            return None
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise StateDictError(
                f"{key}: expected tensors of {names[0]} and {len(names) - 1} more, got {_outline(values)}"
            )
        made = []
        for name, own in zip(names, like, strict=True):
            value, kind = values[name], dtype or torch.promote_types(own.dtype, torch.float32)
            if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != kind:
                have = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise StateDictError(f"{key} of {name}: expected {kind} {tuple(own.shape)}, got {have}")
            made.append(value.detach().to(own.device, copy=True))
        return made


def _average(state: list[Tensor], new: list[Tensor], beta: float) -> None:
    """state <- beta state + (1 - beta) new, each product rounded by itself, as PEFT has it."""
    torch._foreach_mul_(state, beta)
    torch._foreach_add_(state, torch._foreach_mul(new, 1 - beta))


def _outline(value: Any) -> str:
    if isinstance(value, dict):
        keys = sorted(map(str, value))
        return f"a dict of {len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
    return type(value).__name__
