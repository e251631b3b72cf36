"""The controllers of a run, one for each optimizer, driven by the events of its training loop."""

from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.recognition.autograd_nodes import beginning_of
from lit_lipschitz.recognition.loss_graph import LossGraph


class Controllers(dict[int, Controller]):
    """Controllers by the position of their optimizer; what a training loop does, each of them is told.

    The optimizers themselves call ``before_step`` of their controllers, from which the loop calls
    :meth:`.Controller.on_step`.
    """

    def close(self) -> None:
        """Removes all hooks."""
        for controller in self.values():
            controller.close()

    def begin_epoch(self) -> None:
        """An epoch begins."""
        for controller in self.values():
            controller.begin_epoch()

    def begin_batch(self, loop: LoopFacts) -> None:
        """A batch begins."""
        for controller in self.values():
            controller.begin_batch(loop)

    def before_backward(self, loss: Tensor, loop: LoopFacts) -> None:
        """The backward of a loss is about to begin; shape ().

        Its graph is read if a step is due that it may be part of, or if it begins otherwise than all losses so far.
        """
        kind, controllers = beginning_of(loss.grad_fn), list(self.values())
        new = [controller for controller in controllers if controller.is_new(kind)]
        for controller in controllers:
            controller.begin_backward()
        if not new and len(controllers) == 1:
            controllers[0].pass_over_loss(loss, loop)
            return
        graph = LossGraph(loss, controllers[0].options.loss_name)
        for controller in self._owners(graph):
            controller.losses.add(loss, loop)
        for controller in new:
            controller.on_loss(graph, loop)

    def _owners(self, graph: LossGraph) -> list[Controller]:
        """The controllers whose heads a loss goes through; all of them if its graph does not show any."""
        controllers = list(self.values())
        if len(controllers) == 1:
            return controllers
        heads = graph.first_affine_maps
        return [one for one in controllers if any(one.hooks.owns(head) for head in heads)] or controllers

    def after_backward(self, loop: LoopFacts) -> None:
        """A backward has ended; the gradients may be clipped before the step."""
        for controller in self.values():
            controller.losses.after_backward(loop)

    def before_step_of(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, which may be none of these."""
        for controller in self.values():
            if controller.optimizer is not optimizer:
                controller.on_other_optimizer_step()

    def end_batch(self, loop: LoopFacts) -> None:
        """A batch has ended."""
        for controller in self.values():
            controller.end_batch(loop)

    def measures_batch(self, loop: LoopFacts) -> bool:
        """Whether one has more to do at the end of a batch than to count it; ``loop`` is at the batch's beginning."""
        return any(one.measures_batch(loop) for one in self.values())

    def metrics(self, position: int) -> dict[str, float]:
        """Metrics of a controller, for loggers; of several, their names contain its position."""
        prefix = "lipschitz" if len(self) == 1 else f"lipschitz/{position}"
        return {f"{prefix}/{name}": value for name, value in self[position].metrics().items()}
