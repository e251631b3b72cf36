"""From a Lipschitz constant to a learning rate: pure functions of numbers, whose type is ``rules.base.Rule``."""
