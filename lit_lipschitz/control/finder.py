"""Finds what an optimizer's constant is computed from: a head with a recognised loss, or else the output layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch

from lit_lipschitz.control.found_heads import FoundHeads, Hooks, Meter
from lit_lipschitz.control.head_finder import HeadFinder
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.measured_finder import MeasuredFinder, check_measured
from lit_lipschitz.control.measured_hook import is_measured_state
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.control.state import check_like, refuse_other_versions
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition.loss_graph import LossGraph
from lit_lipschitz.recognition.output_layers import HiddenLayers, OutputLayer


class Finder:
    """Uses the proven constant of a recognised loss until something is not recognised, and measures from then on.

    The constant of a loss is measured at the output layers that its graph meets first. It is measured from the start
    with ``loss="measured"`` and if ``stored``, the state in the run that is resumed, was. Arguments that measuring has
    no meaning for, such as ``bound="smooth"``, turn it off, and a loss that is not recognised is an error then.
    """

    def __init__(
        self, policy: Policy, options: Options, target: Target, loop: LoopFacts, stored: dict[str, Any] | None
    ) -> None:
        self._target = target
        self._heads: HeadFinder | None = None
        self._measured: MeasuredFinder | None = None
        # Whether a loss since the last step was another one than was recognised; None without a loss.
        self._differs: bool | None = None
        self._differed_before: bool | None = None  # the same before the last step of another optimizer
        self._stored_gradients: dict[str, Any] | None = None  # until it is known whether the loss is recognised again
        was_measured = is_measured_state(stored)
        if _may_measure(policy, options):
            state = stored if was_measured or options.measured else None
            self._measured = MeasuredFinder(target, loop.device, state)
        if options.measured or was_measured:
            return
        try:
            self._heads = HeadFinder(policy, options, target, loop.device, stored)
        except ConfigurationError:
            if self._measured is None or options.head != "auto":
                raise
        self._store_gradients(stored)

    @property
    def hooks(self) -> Hooks:
        """The hooks on what is or can be the head, or on the output layers."""
        return self._used.hooks

    @property
    def _used(self) -> HeadFinder | MeasuredFinder:
        used = self._heads or self._measured
        assert used is not None
        return used

    def find(self, graph: LossGraph, loop: LoopFacts) -> FoundHeads | None:
        """The head and the loss of a graph whose backward is about to begin, or the output layers.

        None if the loss belongs to another optimizer, or may do so in manual optimization.

        Raises:
            ConfigurationError: There is neither.
        """
        if self._heads is not None:
            self._heads.check_named_head(graph)
        if self._heads is None or self._measured is None:
            return self._used.find(graph, loop)
        try:
            found = self._heads.find(graph, loop)
            if found is None or not self._measured.hooks.contradicts(graph, found.hook.weight):
                return found and self._with_gradients(found)
        except ConfigurationError:
            if not self._layers(graph):
                raise
        self.measure_from_now()
        return self._measured.find(graph, loop)

    def find_named(self) -> FoundHeads:
        """What to use in manual optimization if a step is made before a loss was recognised.

        Raises:
            ConfigurationError: There was no loss, and the user named none.
        """
        if self._heads is not None and self._measured is not None and self._measured.hooks.statistic.watching:
            return self.measure_from_now()
        return self._with_gradients(self._used.find_named())

    def _with_gradients(self, found: FoundHeads) -> FoundHeads:
        """A recognised loss, whose bound is checked by its gradients."""
        if self._measured is None:
            return found
        statistic = self._measured.hooks.statistic
        if self._stored_gradients is not None:
            statistic.load_state_dict(self._stored_gradients)
            self._stored_gradients = None
        return replace(found, gradients=statistic)

    def _store_gradients(self, stored: dict[str, Any] | None) -> None:
        """Keeps the gradients of the run that is resumed until a loss is recognised as in that run."""
        if stored is None or stored["gradients"] is None or not self.may_measure:
            return
        assert self._measured is not None
        with refuse_other_versions():
            check_like(stored["gradients"], own := self._measured.hooks.statistic.state_dict())
            if stored["gradients"]["values"].shape != own["values"].shape:
                raise ValueError("values")
        self._stored_gradients = stored["gradients"]

    def measure_from_now(self) -> FoundHeads:
        """Measures the constant from now on; there must be no argument against it."""
        assert self._measured is not None
        if self._heads is not None:
            self._heads.hooks.remove()
            self._heads = None
            self._measured.hooks.statistic.restart()
        return self._measured.found()

    @property
    def watching(self) -> bool:
        """Whether backwards of the coming step were watched."""
        return self._measured is not None and self._measured.hooks.statistic.watching

    @property
    def may_measure(self) -> bool:
        """Whether a recognised loss is used, and measuring is possible."""
        return self._heads is not None and self._measured is not None

    def meter(self, found: FoundHeads, updater: RateUpdater, graph: LossGraph | None, loop: LoopFacts) -> Meter:
        """What measures each batch by what was found."""
        return self._used.meter(found, updater, graph, loop)

    def compare(self, graph: LossGraph, agrees: bool) -> bool:
        """Notes whether a loss is the recognised one; returns whether it has to be measured from now on.

        A loss that reaches no parameter of the optimizer is passed over. With several optimizers the loss may belong to
        another one, which is known at their steps; see :attr:`differs`.
        """
        if not self.may_measure or not (agrees or self._layers(graph)):
            return False
        self._differs = bool(self._differs) or not agrees
        return not agrees and self._target.is_only

    @property
    def differs(self) -> bool:
        """Whether a loss of the step that is about to be made is another one than was recognised."""
        return bool(self._differed_before if self._differs is None else self._differs) and self.may_measure

    def _layers(self, graph: LossGraph) -> Sequence[OutputLayer | HiddenLayers]:
        assert self._measured is not None
        return self._measured.hooks.layers(graph)

    def check(self, graph: LossGraph, loop: LoopFacts) -> None:
        """Has a backward measured, to check the bound of a recognised loss by its gradients."""
        if self._measured is None:
            return
        if self._heads is not None:
            self._measured.hooks.watch(graph, loop, self._heads.head)
        if loop.automatic:
            self.forget_inputs()

    def forget_inputs(self) -> None:
        """Forgets the inputs of the last batch in compiled code."""
        if self._measured is not None:
            self._measured.hooks.forget_inputs()

    def discard_gradients(self) -> None:
        """Forgets the backwards since the last step."""
        self._differs = self._differed_before = None
        if self._measured is not None:
            self._measured.hooks.statistic.discard()

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step: losses so far are its own if more come before the own step."""
        if self._differs is not None:
            self._differs, self._differed_before = None, self._differs
        for finder in (self._heads, self._measured):
            if finder is not None:
                finder.on_other_optimizer_step()

    def begin_step(
        self, found: FoundHeads, loop: LoopFacts, batches: int, *, due: bool, first_step: bool
    ) -> FoundHeads:
        """What to use in the step that is about to be made, of so many ``batches``: the same on all ranks.

        Raises:
            ConfigurationError: A loss of the optimizer was not recognised, and measuring is not possible.
        """
        if self._measured is None:
            assert self._heads is not None
            self._heads.begin_step(first_step)
            return found
        if first_step and not self._same_on_all_ranks(found, loop):
            found = self.measure_from_now()
        self._differs = self._differed_before = None
        if self.may_measure and not due:
            self._measured.hooks.statistic.discard()  # of a loss of another optimizer
        self._measured.end_step(batches)
        return found

    def _same_on_all_ranks(self, found: FoundHeads, loop: LoopFacts) -> bool:
        """Whether the ranks have found the same loss of the same number of outputs, and none has refused one."""
        refused = self._heads is not None and self._heads.refused_own
        if loop.world_size == 1:
            return not refused
        recognised = found.recognised
        facts = (
            refused,
            found.loss,
            found.num_outputs,
            recognised.rows_per_target,
            recognised.pooled,
            recognised.unrecognised,
        )
        high, low = divmod(crc32(repr(facts).encode()), 1 << 16)  # float32 holds each exactly
        sent = torch.tensor([high, -high, low, -low], dtype=torch.float32, device=loop.device)
        highest, lowest, *rest = loop.reduce(sent).tolist()
        return not refused and highest == -lowest and rest[0] == -rest[1]

    def close(self) -> None:
        """Removes all hooks."""
        for finder in (self._heads, self._measured):
            if finder is not None:
                finder.hooks.remove()

    def forget_interval(self) -> None:
        """Forgets what was measured in the run that is resumed: the batches of this one are others."""
        self._stored_gradients = None
        self.hooks.reset()

    def reset(self) -> None:
        """Ends an interval."""
        if self._measured is not None:
            self._measured.hooks.reset()

    def state_dict(self) -> dict[str, Any] | None:
        """The state of the hooks, for a checkpoint."""
        state = self.hooks.state_dict()
        gradients = self._stored_gradients
        if gradients is None and self.may_measure and self._measured is not None:
            gradients = self._measured.hooks.statistic.state_dict()
        return state and {**state, "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Loads the state of :meth:`state_dict`; if that run had begun to measure, this one does."""
        if is_measured_state(state) and self.may_measure:
            self.measure_from_now()
        self.hooks.load_state_dict(state)
        self._store_gradients(state)


def _may_measure(policy: Policy, options: Options) -> bool:
    if options.measured:
        return True  # its arguments were checked
    try:
        check_measured(policy, options)
    except ConfigurationError:
        return False
    return True
