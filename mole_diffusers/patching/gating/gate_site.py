"""A site: one gate, and the layers that take its weights.

Every site keeps its gate's last weights, evaluates the gate again when these no longer hold (`evaluate`), and gives each
of its layers the factor for its ranks (`factor`). Sites differ in when they evaluate it:

    BlockSite    when its block begins, for all its layers there
    LayerSite    when its only layer runs
    ModelSite    once in a call of the model; in a denoiser, when the first of its layers asks
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.functional import onto
from mole_diffusers.gates import Context, Gate, Layer
from mole_diffusers.gates.seen import Seen, version
from mole_diffusers.patching.gating.runtime import ActiveExperts, Decision, Present, Runtime

if TYPE_CHECKING:
    from mole_diffusers.patching.gating.gated_experts import GatedExperts


class GateSite(ABC):
    """One gate, the layers that take its weights, and its last weights for each set of experts.

    Args:
        name: the module name of the site, component first.
        presents: the sets of experts that the site's layers have, the largest first.
        timed: whether the site knows the noise level; a text encoder does not.
        scope: the experts that the gate shares among, if these are more than the layers' own. A gate that weighs
            its layers apart shares among all experts that one of them has.
        probe: hidden state [B, T, C] -> what the gate reads instead, [B, T, D].
    """

    shares_factors = True  # whether all layers of the same ranks have the same factor
    spans_blocks = False  # whether each layer multiplies its own block's strength from a schedule

    def __init__(
        self,
        name: str,
        gate: Gate,
        runtime: Runtime,
        *,
        presents: Sequence[Present],
        timed: bool,
        scope: Present | None,
        probe: Callable[[torch.Tensor], torch.Tensor] | None,
    ):
        self.name, self.gate, self.runtime = name, gate, runtime
        self.presents, self.timed, self.scope, self.probe = tuple(presents), timed, scope, probe
        self._decisions: list[Decision] = []
        self._factors: dict[tuple, torch.Tensor] = {}  # of these decisions, by what layers have in common, see `factor`
        self._kept: dict[tuple, tuple[list[Decision], dict[tuple, torch.Tensor]]] = {}  # both, as long as `_kept_for` holds
        self._kept_for: tuple = ()

    # ---- evaluating

    def evaluate(self, hidden: torch.Tensor, layer: Layer | None = None, *, tokens: torch.Tensor | None = None) -> None:
        """Evaluate the gate on `hidden` [B, T, C].

        Args:
            layer: given if the gate sits at one layer.
            tokens: [B, T] bool, the tokens of a text that count.
        """
        valid_for, of = self._validity(hidden) or (None, ())
        if valid_for is None or valid_for != self._kept_for:
            self._kept, self._kept_for = {}, valid_for or ()
        if of not in self._kept:
            self._kept[of] = self._decide(hidden, layer, tokens), {}
        self._decisions, self._factors = self._kept[of]
        for listener in self.runtime.listeners:
            for decision in self._decisions:
                listener(decision)

    def _validity(self, hidden: torch.Tensor) -> tuple[tuple, tuple] | None:
        """Two keys: decisions are kept as long as the first stays equal, and hold whenever the second is as it was.

        None: they hold for this call only.
        """
        runtime = self.runtime
        if not self._may_keep():
            return None
        of = runtime.alone, hidden.device, hidden.shape[0]
        if self.gate.input_free:
            return (*self._settings(), self._gate_version()), of
        if self.timed and runtime.every > 1:
            times = runtime.texts, runtime.calls_of_text // runtime.every
            return (*self._settings(), *times), (*of, hidden.shape[1])
        return None

    def _may_keep(self) -> bool:
        """Whether decisions may hold beyond this call at all."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self.runtime.control is None

    def _settings(self) -> tuple[Any, ...]:
        """What the decisions depend on besides the gate and its input."""
        runtime = self.runtime
        if (plan := runtime.plan) is None:
            return (runtime.changes,)
        return runtime.changes, tuple(self._strengths()), None if (own := plan.gates(self.name)) is None else tuple(own)

    def _gate_version(self) -> int:
        return sum(version(p) for p in self.gate.parameters())

    def _decide(self, hidden: torch.Tensor, layer: Layer | None, tokens: torch.Tensor | None) -> list[Decision]:
        """One decision for each set of experts among the site's layers."""
        fixed: Sequence[float] | None = self.runtime.fixed  # weights by hand for all gates, or a schedule's for this one
        if fixed is None and self.runtime.plan is not None:
            fixed = self.runtime.plan.gates(self.name)
        segment = layer.segment if layer is not None and self.gate.ranked else None
        if fixed is not None:
            return [self._by_hand(present, fixed, hidden, segment) for present in self.presents]
        if torch.is_autocast_enabled(hidden.device.type):  # entering the context costs as much as a small gate
            with torch.autocast(hidden.device.type, enabled=False):
                return self._by_gate(hidden, layer, tokens, segment)
        return self._by_gate(hidden, layer, tokens, segment)

    def _by_gate(
        self, hidden: torch.Tensor, layer: Layer | None, tokens: torch.Tensor | None, segment: torch.Tensor | None
    ) -> list[Decision]:
        runtime = self.runtime
        time = runtime.time.to(hidden.device) if self.timed else torch.zeros(1, device=hidden.device)
        # PAG passes single layers a part of the batch, videos pass their frames.
        time = functional.resample_rows(time, len(hidden))
        features = hidden if self.probe is None else self.probe(hidden.float())
        decisions = []
        for present in self.presents:
            active = self._active_experts(present, hidden)
            among = active if self.scope is None else self._active_experts(self.scope, hidden)
            all_active = not torch.compiler.is_compiling() and among.all_active  # a flag would be part of compiled code
            gates = self.gate(features, Context(among.mask, time, layer, tokens, all_active))
            if runtime.control is not None:
                gates = runtime.control(self.name, gates, active.mask if segment is None else active.mask[..., segment])
            decisions.append(self._decision(present, gates, active, segment))
        return decisions

    def _decision(
        self, present: Present, gates: torch.Tensor, active: ActiveExperts, segment: torch.Tensor | None
    ) -> Decision:
        """Gates times the users' strengths; with `segment` [R] the gates are per rank."""
        applied = gates
        if torch.compiler.is_compiling() or not active.unit_strengths:
            strengths = active.strengths if segment is None else active.strengths[..., segment]
            applied = gates * functional.over_tokens(strengths, gates)
        return Decision(self, present, gates, applied, active.mask, segment)

    def _by_hand(
        self, present: Present, fixed: Sequence[float], hidden: torch.Tensor, segment: torch.Tensor | None
    ) -> Decision:
        gates = onto(torch.tensor([w * p for w, p in zip(fixed, present, strict=True)]), hidden.device)
        active = self._active_experts(present, hidden)
        if self.runtime.fixed is None:  # weights by hand for one gate; an expert may be absent
            gates = gates * active.mask
        return self._decision(present, gates if segment is None else gates[..., segment], active, segment)

    def _active_experts(self, present: Present, hidden: torch.Tensor) -> ActiveExperts:
        """The experts that the gate weighs at this step: first those of the whole batch, then what differs by row."""
        runtime, batch = self.runtime, len(hidden)
        if runtime.fixed is None and runtime.plan is None:
            active = runtime.active_experts(present, hidden.device)
        else:
            active = runtime.compute_active(present, self._strengths(), hidden.device)
        silent = None if runtime.masks is None else runtime.masks.row_silent
        if silent is None and runtime.rows is None:
            return active
        mask, strengths = active.mask, active.strengths
        if silent is not None:
            mask = mask & ~functional.rows_for_layer(silent, batch)  # [B, N]
        if runtime.rows is not None:
            images = runtime.images if self.timed else 1  # a text encoder sees a prompt once for all its pictures
            factors = functional.rows_per_prompt(onto(runtime.rows, hidden.device), batch, images)  # [B, N]
            mask, strengths = mask & (factors != 0), strengths * factors
        return ActiveExperts(mask, strengths, all_active=False, unit_strengths=False)

    def _strengths(self) -> Sequence[float]:
        """[N]: the user's strengths, or 1 each beside weights by hand; times the schedule's."""
        runtime, plan = self.runtime, self.runtime.plan
        strengths = runtime.strength if runtime.fixed is None else [1.0] * len(runtime.strength)
        if plan is None:
            return strengths
        part = plan.part(self.name.partition(".")[0])
        block = [1.0] * len(strengths) if self.spans_blocks else plan.block(self.name)
        return [math.prod(factors) for factors in zip(strengths, part, block, strict=True)]

    # ---- reading

    def factor(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The factor for A x of a layer, rank by rank.

        Until the gate is evaluated again, it is kept for layers of the same ranks and, if bound, of the same tokens.

        Args:
            x: the layer's input, [B, Cin], [B, T, Cin] or [B, Cin, H, W].
            low: A x, [B, R], [B, T, R] or [B, R, H, W]; or for x [B, T, Cin] its rows, [B T, R].

        Returns:
            A tensor in its dtype that broadcasts over `low`; for rows [R], [B T, R] or [B, 1, R].
        """
        self._make_ready(layer, x, low)
        if x.dim() != 3 or not self.shares_factors:
            return self._new_factor(layer, x, low)
        masks = self.runtime.masks
        tokens = (layer.stream, x.shape[:2]) if masks is not None and masks.binds else ()  # PAG passes a part of the rows
        in_common = layer.ranks, low.dim(), low.dtype, *tokens
        if (factor := self._factors.get(in_common)) is None:
            factor = self._new_factor(layer, x, low)
            if not factor.requires_grad:  # a checkpointed block that is computed again must save the same tensors
                self._factors[in_common] = factor
        return factor

    def _new_factor(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The weights of a layer's experts over their ranks, times the masks of its tokens if experts are bound."""
        segment, low_of_tokens = layer.segment, _of_tokens(low, x)
        weights = self._weights_of(layer, len(x))
        factor = functional.over_ranks(weights, None if self.gate.ranked else segment, low_of_tokens)
        if (masks := self.runtime.masks) is not None and masks.binds:
            mask = masks.over_ranks(layer.stream, low_of_tokens, segment, layer.ranks)
            factor = factor if mask is None else factor * mask
        differs_by_token = factor.dim() == 3 and factor.shape[1] > 1
        return factor.flatten(0, 1) if differs_by_token and low.dim() < x.dim() else factor

    @abstractmethod
    def _make_ready(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> None:
        """Evaluate the gate if its weights are not those of this call, or of this layer."""

    def _weights_of(self, layer: GatedExperts, rows: int) -> torch.Tensor:
        """The weights of a layer's experts, [N] or [R], [B, ...] or [B, T, ...]; `rows` of the batch reach it."""
        return next(d.applied for d in self._decisions if d.present == layer.present)


class BlockSite(GateSite):
    """A gate that is evaluated when its block begins.

    If it was not evaluated then on as many rows as a layer has, the layer's own input is read instead. This happens if
    another processor replaced ours (IP-Adapter, PAG), or splits the batch.

    Args:
        reads_text: the gate reads only the text, as its layers do. It is evaluated once per text.
    """

    def __init__(self, *args: Any, reads_text: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reads_text = reads_text
        self._text, self._texts = Seen(), 0  # the gate's last text, and the number of texts so far
        self._batch = 0  # rows that the gate was evaluated on since the block began

    def begin_block(self) -> None:
        """The gate must be evaluated again, except for decisions that hold beyond a call (`_validity`)."""
        self._batch = 0

    def evaluate(self, hidden: torch.Tensor, layer: Layer | None = None, *, tokens: torch.Tensor | None = None) -> None:
        super().evaluate(hidden, layer, tokens=tokens)
        self._batch = hidden.shape[0]

    def _validity(self, hidden: torch.Tensor) -> tuple[tuple, tuple] | None:
        found = super()._validity(hidden)
        if found is None and self.reads_text and self._may_keep():
            self._texts += not self._text.again(hidden)
            found = (*self._settings(), self._texts, self._gate_version()), (self.runtime.alone,)
        return found

    def _make_ready(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> None:
        if self._batch != x.shape[0]:
            self.evaluate(_as_input(x, low))


class LayerSite(GateSite):
    """A gate that is evaluated on its layer's input whenever that layer runs."""

    def _make_ready(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> None:
        low = _of_tokens(low, x)
        self.evaluate(_as_input(x, low), layer.described(low))


class ModelSite(GateSite):
    """A gate for layers outside of blocks, or one that reads the prompt.

    In a denoiser it reads the model's inputs, and is evaluated when the first layer asks. When the model is entered, the
    gate may still be on another device, since offloading moves it when the model's forward begins. In a text encoder it
    reads the input of the first block.
    """

    shares_factors = False

    def __init__(self, *args: Any, spans_blocks: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spans_blocks = spans_blocks
        self._deferred: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def defer(self, hidden: torch.Tensor, *, tokens: torch.Tensor | None = None) -> None:
        """Keep what the gate is to read, [B, T, C], until the first layer asks.

        With gradients it is evaluated here: inside a checkpointed block it would be evaluated only the first time.
        """
        self._deferred = hidden, tokens
        if torch.is_grad_enabled():
            self.evaluate_deferred()

    def evaluate_deferred(self) -> None:
        """Evaluate the gate on what was deferred, if anything was."""
        if self._deferred is not None:
            (hidden, tokens), self._deferred = self._deferred, None
            self.evaluate(hidden, tokens=tokens)

    def _make_ready(self, layer: GatedExperts, x: torch.Tensor, low: torch.Tensor) -> None:
        self.evaluate_deferred()

    def _weights_of(self, layer: GatedExperts, rows: int) -> torch.Tensor:
        weights = super()._weights_of(layer, rows)
        if weights.dim() > 1:
            weights = functional.rows_for_layer(weights, rows)
        if self.spans_blocks and self.runtime.plan is not None:
            # The name is read here alone: torch.compile would compile every block anew.
            weights = weights * onto(torch.tensor(self.runtime.plan.block(layer.name)), weights.device)  # [N]
        return weights


def _as_input(x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """A layer's input as a gate reads it, [B, T, C], with the tokens of A x."""
    if x.dim() == 4 and x.shape[2:] != low.shape[2:]:  # a strided convolution
        x = F.interpolate(x, low.shape[2:])  # nearest, so that every token keeps its own weights
    return functional.as_tokens(x)


def _of_tokens(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows [B T, R] of an x [B, T, Cin] as [B, T, R]; anything else as it is."""
    return low.view(*x.shape[:2], -1) if low.dim() < x.dim() else low
