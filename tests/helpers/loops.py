"""A plain training loop with ``attach``, in pieces that a test can replace."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from helpers.task import CLASSES, EXAMPLES, WIDTH, loader
from lit_lipschitz import attach

BATCH, EPOCHS = 8, 3
BATCHES = EXAMPLES // BATCH


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
}


class Loop:
    """A plain loop with ``attach``; ``save`` and ``load`` at an optimizer step."""

    def __init__(self, make, scheduler=None, loss=F.cross_entropy, k=1, clip=None, settings=None, scaler=None):
        self.net, self.loss, self.k, self.clip, self.scaler = network(), loss, k, clip, scaler
        self.optimizer = make(self.net.parameters())
        self.scheduler = scheduler and scheduler(self.optimizer)
        self.control = attach(
            self.net,
            self.optimizer,
            total_steps=EPOCHS * BATCHES // k,
            epoch_steps=BATCHES // k,
            accumulate_grad_batches=k,
            grad_scaler=scaler,
            notify=lambda message: None,
            **settings or {},
        )
        self.rates, self.metrics = [], []
        handle = self.optimizer.register_step_post_hook(self.record)
        self.optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    def record(self, optimizer, *_):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def backward(self, batch):
        with torch.autocast("cpu", torch.half, enabled=self.scaler is not None and self.scaler.is_enabled()):
            loss = self.loss(self.net(batch[0]), batch[1]) / self.k
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self):
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.metrics.append(self.control.metrics())

    def run(self, first=0, last=EPOCHS * BATCHES):
        batches = [batch for _ in range(EPOCHS) for batch in loader(BATCH)]
        for i in range(first, last):
            self.backward(batches[i])
            if (i + 1) % self.k == 0:
                self.step()
            with torch.no_grad():  # validation
                self.net(100 * batches[i][0])
        return self.rates, self.metrics, [p.detach().clone() for p in self.net.parameters()]

    def state(self):
        parts = [self.net, self.optimizer, self.control, *([self.scheduler] if self.scheduler else [])]
        return [part.state_dict() for part in parts]

    def load(self, state):
        for part, saved in zip(
            [self.net, self.optimizer, self.control, *([self.scheduler] if self.scheduler else [])], state, strict=True
        ):
            part.load_state_dict(saved)
