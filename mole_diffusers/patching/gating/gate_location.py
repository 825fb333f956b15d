"""A gate location: one gate, and the layers that take its weights.

Every gate location keeps its gate's last weights, evaluates the gate again when these no longer hold (`evaluate`), and
gives each of its layers the factor for its ranks (`factor`). Sites differ in when they evaluate it:

    BlockSite    when its block begins, for all its layers there
    OutputSite   when its block has run with each expert
    LayerSite    when its only layer runs
    ModelSite    once in a call of the model; in a denoiser, when the first of its layers asks

Three subjects say whether weights still hold. Each layer compares its batch with `ready_for_rows`: has the block's gate been
evaluated on so many rows since the block began? If not, `evaluate` is called. A `Validity` then says what decisions on its
input depend on, and `KeptDecisions` has those that were made, as long as that stays the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.functional import onto
from mole_diffusers.gates import Context, Gate, Layer
from mole_diffusers.gates.unchanged import LastTensor, version
from mole_diffusers.patching.gating.decision import Decision, Present
from mole_diffusers.patching.gating.shared_state import SharedState, WeighedExperts
from mole_diffusers.patching.undo import Undo, restore_point

NEVER = -1  # no batch has so many rows


@dataclass(frozen=True)
class WeighedLayer:
    """A layer whose experts take the weights of a gate location."""

    name: str  # component first
    present: Present
    held: str  # whose ranks it holds, and how many of each; as text, since it is hashed and compared in every layer
    token_type: str | None  # which tokens it reads, see `placement.token_type_of`
    down: Any  # the module that holds A [R, Cin]
    up: Any  # and B [Cout, R]

    @property
    def expert_index(self) -> torch.Tensor:
        """[R] -> index of the expert that each rank belongs to."""
        return self.down._buffers["expert_index"]


class Validity(NamedTuple):
    """How long decisions hold."""

    until: tuple | None  # one of these values changes; None: for this call alone
    call: tuple = ()  # tells apart the calls until then that are decided separately, such as those for tiles


THIS_CALL = Validity(None)


class KeptFactor(NamedTuple):
    """A factor of the layers that have something in common."""

    rows: int  # of the layer's input [rows, tokens, Cin]
    tokens: int
    factor: torch.Tensor


@dataclass(eq=False)
class Decided:
    """Decisions of a gate, and the factors that were made of them, by what layers have in common."""

    decisions: list[Decision] = field(default_factory=list)
    factors: dict[tuple, tuple[KeptFactor, ...]] = field(default_factory=dict)


class KeptDecisions:
    """What a gate has decided, as long as it holds.

    Attributes:
        now: what layers take.
    """

    def __init__(self) -> None:
        self.now = Decided()
        self._until: tuple | None = None
        self._by_call: dict[tuple, Decided] = {}  # see `Validity.call`

    def recall(self, validity: Validity) -> bool:
        """Take what was decided before, if that still holds; drop what no longer does. Returns whether there is anything."""
        if validity.until is None or validity.until != self._until:
            self._until, self._by_call = validity.until, {}
        found = self._by_call.get(validity.call)
        self.now = self.now if found is None else found
        return found is not None

    def keep(self, validity: Validity, decisions: list[Decision]) -> None:
        """Keep new decisions, of a validity that `recall` has seen."""
        self.now = self._by_call[validity.call] = Decided(decisions)

    def end(self) -> bool:
        """Let go of what was decided for a single call. Returns whether it was."""
        if self._until is None:
            self.now, self._by_call = Decided(), {}
        return self._until is None


class GateLocation(ABC):
    """One gate, the layers that take its weights, and its last weights for each set of experts.

    Args:
        name: the module name of the gate location, component first.
        layer_adapters: the sets of experts that the gate location's layers have, the largest first.
        timed: whether the gate location knows the noise level; a text encoder does not.
        index: of the gate location's layer among those of a gate that weighs its layers apart, [B, M, N]; else None.
        scope: the experts that such a gate shares among: all that one of its layers has.
        probe: hidden state [B, T, C] -> what the gate reads instead, [B, T, D].
    """

    shares_factors = True  # whether all layers of the same ranks have the same factor
    # a layer whose input has so many rows takes the last weights as they are; only of a `BlockLocation`
    ready_for_rows = NEVER
    spans_blocks = False  # whether each layer multiplies its own block's strength from a schedule
    text: LastTensor | None = None  # what the gate reads, if it reads only the text, as its layers do

    def __init__(
        self,
        name: str,
        gate: Gate,
        shared: SharedState,
        *,
        layer_adapters: Sequence[Present],
        timed: bool,
        index: int | None,
        scope: Present | None,
        probe: Callable[[torch.Tensor], torch.Tensor] | None,
    ):
        self.name, self.gate, self.shared = name, gate, shared
        self.layer_adapters, self.timed, self.probe = tuple(layer_adapters), timed, probe
        self.index, self.scope = index, scope
        self.decided = KeptDecisions()

    # ---- evaluating

    def evaluate(self, hidden: torch.Tensor, layer: Layer | None = None, *, tokens: torch.Tensor | None = None) -> None:
        """Evaluate the gate on `hidden` [B, T, C].

        Args:
            layer: given if the gate sits at one layer.
            tokens: [B, T] bool, the tokens of a text that count.
        """
        validity = self._validity(hidden)
        if not self.decided.recall(validity):
            self.decided.keep(validity, self._decide(hidden, layer, tokens))
        for listener in self.shared.listeners.decisions.now:
            for decision in self.decided.now.decisions:
                listener(decision)

    def _validity(self, hidden: torch.Tensor) -> Validity:
        """How long decisions on `hidden` [B, T, C] hold."""
        if torch.compiler.is_compiling():  # asked first: whatever is read before would be checked in each compiled call
            return THIS_CALL
        step, settings = self.shared.step, self.shared.settings
        adapter_subset, every = step.adapter_subset.now, settings.every.now
        if torch.is_grad_enabled() or settings.control.now is not None:
            return THIS_CALL
        if self.gate.input_free:  # for each size of the batch, whatever it reads
            return Validity((*self._settings(), self._gate_version()), (adapter_subset, hidden.device, hidden.shape[0]))
        if self.timed and every > 1:  # for some calls with one text, see `Mixture.every`
            turn = step.texts, step.calls_of_text // every
            return Validity((*self._settings(), *turn), (adapter_subset, hidden.device, *hidden.shape[:2]))
        if self.text is not None:  # for one text
            self.text.is_again(hidden)
            return Validity((*self._settings(), self._gate_version(), self.text.number), (adapter_subset,))
        return THIS_CALL

    def _settings(self) -> tuple[Any, ...]:
        """What the decisions depend on besides the gate and its input."""
        changes, plan = self.shared.effective.changes, self.shared.settings.plan.now
        if plan is None:
            return (changes,)
        return changes, tuple(self._strengths()), None if (own := plan.gates(self.name)) is None else tuple(own)

    def _gate_version(self) -> int:
        return sum(version(p) for p in self.gate.parameters())

    def _decide(self, hidden: torch.Tensor, layer: Layer | None, tokens: torch.Tensor | None) -> list[Decision]:
        """One decision for each set of experts among the gate location's layers."""
        expert_index = layer.expert_index if layer is not None and self.gate.ranked else None
        if (fixed := self._fixed()) is not None:
            return [self._by_hand(present, fixed, hidden, expert_index) for present in self.layer_adapters]
        if torch.is_autocast_enabled(hidden.device.type):  # entering the context costs as much as a small gate
            with torch.autocast(hidden.device.type, enabled=False):
                return self._by_gate(hidden, layer, tokens, expert_index)
        return self._by_gate(hidden, layer, tokens, expert_index)

    def _fixed(self) -> Sequence[float] | None:
        """Weights by hand, for all gates or from a schedule for this one."""
        fixed, plan = self.shared.settings.fixed.now, self.shared.settings.plan.now
        return plan.gates(self.name) if fixed is None and plan is not None else fixed

    def _by_gate(
        self, hidden: torch.Tensor, layer: Layer | None, tokens: torch.Tensor | None, expert_index: torch.Tensor | None
    ) -> list[Decision]:
        control = self.shared.settings.control.now
        time = self.shared.step.time.to(hidden.device) if self.timed else torch.zeros(1, device=hidden.device)
        # PAG passes single layers a part of the batch, videos pass their frames.
        time = functional.resample_rows(time, len(hidden))
        features = hidden if self.probe is None else self.probe(hidden.float())
        decisions = []
        for present in self.layer_adapters:
            weighed = self._weighed_experts(present, hidden)
            among = weighed if self.scope is None else self._weighed_experts(self.scope, hidden)
            all_weighed = not torch.compiler.is_compiling() and among.all_weighed  # a flag would be part of compiled code
            gates = self.gate(features, Context(among.there, time, layer, tokens, all_weighed))
            gates = gates if self.index is None else gates[:, self.index]
            if control is not None:
                gates = control(
                    self.name, gates, weighed.there if expert_index is None else weighed.there[..., expert_index]
                )
            decisions.append(self._decision(present, gates, weighed, expert_index))
        return decisions

    def _decision(
        self, present: Present, gates: torch.Tensor, weighed: WeighedExperts, expert_index: torch.Tensor | None
    ) -> Decision:
        """Gates times the users' strengths; with `expert_index` [R] the gates are per rank."""
        applied = gates
        if torch.compiler.is_compiling() or not weighed.unit_strengths:
            strengths = weighed.strengths if expert_index is None else weighed.strengths[..., expert_index]
            applied = gates * functional.over_tokens(strengths, gates)
        return Decision(self, present, gates, applied, weighed.there, expert_index)

    def _by_hand(
        self, present: Present, fixed: Sequence[float], hidden: torch.Tensor, expert_index: torch.Tensor | None
    ) -> Decision:
        gates = onto(torch.tensor([w * p for w, p in zip(fixed, present, strict=True)]), hidden.device)
        weighed = self._weighed_experts(present, hidden)
        if self.shared.settings.fixed.now is None:  # weights by hand for one gate; an expert may be absent
            gates = gates * weighed.there
        return self._decision(present, gates if expert_index is None else gates[..., expert_index], weighed, expert_index)

    def _weighed_experts(self, present: Present, hidden: torch.Tensor) -> WeighedExperts:
        """The experts that the gate weighs at this step: first those of the whole batch, then what differs by row."""
        settings, effective, batch = self.shared.settings, self.shared.effective, len(hidden)
        if settings.fixed.now is None and settings.plan.now is None:
            weighed = effective.experts(present, hidden.device)
        else:
            weighed = effective.of_strengths(present, self._strengths(), hidden.device)
        inactive = None if effective.binding is None else effective.binding.inactive.rows
        if inactive is None and settings.rows.now is None:
            return weighed
        mask, strengths = weighed.there, weighed.strengths
        if inactive is not None:
            mask = mask & ~functional.rows_for_layer(inactive, batch)  # [B, N]
        if (rows := settings.rows.now) is not None:
            images = rows.images if self.timed else 1  # a text encoder sees a prompt once for all its pictures
            factors = functional.rows_per_prompt(onto(rows.factors, hidden.device), batch, images)  # [B, N]
            mask, strengths = mask & (factors != 0), strengths * factors
        return WeighedExperts(mask, strengths, all_weighed=False, unit_strengths=False)

    def _strengths(self) -> Sequence[float]:
        """[N]: the user's strengths, or 1 each beside weights by hand; times the schedule's."""
        settings, plan = self.shared.settings, self.shared.settings.plan.now
        strengths = settings.strengths.now if settings.fixed.now is None else [1.0] * len(settings.strengths.now)
        if plan is None:
            return strengths
        part = plan.part(self.name.partition(".")[0])
        block = [1.0] * len(strengths) if self.spans_blocks else plan.block(self.name)
        return [math.prod(factors) for factors in zip(strengths, part, block, strict=True)]

    # ---- reading

    def factor(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The factor for A x of a layer, rank by rank.

        Until the gate is evaluated again, it is kept for layers of the same ranks that read the same tokens.

        Args:
            x: the layer's input, [B, Cin], [B, T, Cin] or [B, Cin, H, W].
            low: A x, [B, R], [B, T, R] or [B, R, H, W]; or for x [B, T, Cin] its rows, [B T, R].

        Returns:
            A tensor in its dtype that broadcasts over `low`; for rows also [B, 1, R] or [B, T, R], if gradients are kept.
        """
        if self.ready_for_rows != x.shape[0]:
            self._make_ready(layer, x, low)
        if x.dim() != 3 or not self.shares_factors:
            return self._new_factor(layer, x, low)
        masks = self.shared.effective.binding
        binds = masks is not None and masks.binds
        in_common = layer.held, low.dim(), low.dtype, binds and layer.token_type
        all_kept = self.decided.now.factors.get(in_common, ())
        # With the number of tokens in the key, a compiled block would be for it alone. PAG passes a part of the rows.
        for kept in all_kept:
            if kept.tokens == x.shape[1] and kept.rows == x.shape[0]:
                return kept.factor
        factor = self._new_factor(layer, x, low)
        if not factor.requires_grad:  # a checkpointed block that is computed again must save the same tensors
            self.decided.now.factors[in_common] = (*all_kept, KeptFactor(x.shape[0], x.shape[1], factor))
        return factor

    def _new_factor(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The weights of a layer's experts over their ranks, times the masks of its tokens if experts are bound."""
        weights, expert_index = self._weights_of(layer, len(x)), None if self.gate.ranked else layer.expert_index
        rows_of = len(x) if low.dim() < x.dim() else None
        if rows_of is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            low, rows_of = _of_tokens(low, x), None
            factor = functional.over_ranks(weights, expert_index, low)
        else:
            factor = functional.over_rows(weights, expert_index, low, rows_of)
        mask = self._mask(layer, low, rows_of)
        return factor if mask is None else factor * mask

    def _mask(self, layer: WeighedLayer, low: torch.Tensor, rows_of: int | None) -> torch.Tensor | None:
        """Where a layer's experts act, in the shape of its A x; None if every expert acts on every token.

        Args:
            low: [B, R], [B, T, R] or [B, R, H, W]; or rows [B T, R].
            rows_of: B if `low` is rows, else None.
        """
        masks, token_type = self.shared.effective.binding, layer.token_type
        if masks is None or not masks.binds or token_type is None or (text := masks.text_of(token_type)) is None:
            return None
        if low.dim() == 2 and rows_of is None and (rows_of := text.rows_among(len(low))) is None:
            return None  # no tokens, or those of all rows one after the other
        key = token_type, layer.held, rows_of, low.shape, low.dtype, low.device
        if key not in text.cache:
            tokens = low if rows_of is None else low.view(rows_of, -1, low.shape[1])
            found = text.mask(token_type, tokens)
            if found is not None and tokens.dim() == 3 and found.shape[1] != tokens.shape[1]:
                found = None
            if found is not None:
                found = functional.rows_for_layer(found, len(tokens)).to(tokens.device)
                found = functional.over_ranks(found, layer.expert_index, tokens)
                found = found if tokens is low else found.flatten(0, 1)
            text.cache[key] = found
        return text.cache[key]

    @abstractmethod
    def _make_ready(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
        """Evaluate the gate, unless its weights are those of this call and this layer. If not `ready_for_rows`."""

    def _weights_of(self, layer: WeighedLayer, rows: int) -> torch.Tensor:
        """The weights of a layer's experts, [N] or [R], [B, ...] or [B, T, ...]; `rows` of the batch reach it."""
        return next(d.applied for d in self.decided.now.decisions if d.present == layer.present)


class BlockLocation(GateLocation):
    """A gate that is evaluated when its block begins.

    If it was not evaluated then on as many rows as a layer has, the layer's own input is read instead. This happens if
    another processor replaced ours (IP-Adapter, PAG), or splits the batch.

    Args:
        reads_text: the gate reads only the text, as its layers do. It is evaluated once per text.
    """

    def __init__(self, *args: Any, reads_text: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.text = LastTensor() if reads_text else None

    def begin_block(self) -> None:
        """The gate must be evaluated again, except for decisions that hold beyond a call (`_validity`)."""
        self.ready_for_rows = NEVER

    def end_block(self) -> None:
        """Let go of what was decided for this call alone: in large pictures, factors of each token take much memory."""
        if self.decided.end():
            self.ready_for_rows = NEVER

    def evaluate(self, hidden: torch.Tensor, layer: Layer | None = None, *, tokens: torch.Tensor | None = None) -> None:
        super().evaluate(hidden, layer, tokens=tokens)
        self.ready_for_rows = hidden.shape[0]

    def _make_ready(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
        self.evaluate(_as_input(x, low))


class OutputLocation(GateLocation):
    """A gate that weighs what each expert alone adds to the output of its block, see `OutputMixing`.

    Its layers take no expert, then one at a time. Weights by hand hold in the layers instead, and the block runs once.
    """

    shares_factors = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._acting = self._taken = torch.zeros(len(self.layer_adapters[0]))  # strengths [N] or [B, N], and those of a run

    @property
    def mixes(self) -> bool:
        """Whether outputs are mixed, since there are no weights by hand."""
        return self._fixed() is None

    def begin(self, hidden: torch.Tensor) -> None:
        """The block is entered with `hidden` [B, T, C]. Its layers take weights by hand if there are any, or no expert."""
        if not self.mixes:
            self.evaluate(hidden)
            self._taken = self.decided.now.decisions[0].applied
            return
        weighed = self._weighed_experts(self.layer_adapters[0], hidden)
        self._acting = weighed.strengths * weighed.there
        self._taken = torch.zeros_like(self._acting)

    @property
    def experts(self) -> list[int]:
        """The indices of the experts that may add anything."""
        on = self.shared.step.adapter_subset.now or self.shared.settings.active.now
        return [i for i, there in enumerate(self.layer_adapters[0]) if there and on[i]]

    def take(self, expert: int) -> None:
        """From now on the layers take this expert alone, at the user's strength."""
        adapter_subset = torch.arange(self._acting.shape[-1], device=self._acting.device) == expert
        self._taken = self._acting * adapter_subset

    def mixed(self, changes: torch.Tensor) -> torch.Tensor:
        """What each expert adds to the output, [N, B, T, C], times its gate, summed: [B, T, C]."""
        self.evaluate(torch.cat(list(changes), -1))
        gates = self.decided.now.decisions[0].output.expand(changes.shape[1], -1)  # [B, N]
        return torch.einsum("bn,nbtc->btc", gates.to(changes.dtype), changes)

    def _make_ready(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
        """Nothing is decided until the block has run."""

    def _weights_of(self, layer: WeighedLayer, rows: int) -> torch.Tensor:
        return self._taken if self._taken.dim() == 1 else functional.rows_for_layer(self._taken, rows)


class LayerLocation(GateLocation):
    """A gate that is evaluated on its layer's input whenever that layer runs."""

    def _make_ready(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
        if not self.gate.input_free:
            low = _of_tokens(low, x)
        self.evaluate(_as_input(x, low), Layer(low, layer.up._parameters["weight"], layer.expert_index))


class ModelLocation(GateLocation):
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

    def restore_point(self) -> Callable[[Undo], None]:
        """A function that sets the weights back to those of now, until it is undone."""
        return restore_point(self.decided, "now")

    def _make_ready(self, layer: WeighedLayer, x: torch.Tensor, low: torch.Tensor) -> None:
        self.evaluate_deferred()

    def _weights_of(self, layer: WeighedLayer, rows: int) -> torch.Tensor:
        weights = super()._weights_of(layer, rows)
        if weights.dim() > 1:
            weights = functional.rows_for_layer(weights, rows)
        if self.spans_blocks and (plan := self.shared.settings.plan.now) is not None:
            # The name is read here alone: torch.compile would compile every block anew.
            weights = weights * onto(torch.tensor(plan.block(layer.name)), weights.device)  # [N]
        return weights


def _as_input(x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """A layer's input as a gate reads it, [B, T, C], with the tokens of A x."""
    if x.dim() == 4 and x.shape[2:] != low.shape[2:]:  # a strided convolution
        x = F.interpolate(x, low.shape[2:])  # nearest, so that every token keeps its own weights
    return functional.as_tokens(x)


def _of_tokens(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows [B T, R] of an x [B, T, Cin] as [B, T, R]; anything else as it is."""
    return low.view(*x.shape[:2], -1) if low.dim() < x.dim() else low
