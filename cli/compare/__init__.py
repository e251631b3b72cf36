"""`lit-lipschitz compare`: computed against fixed learning rates, over several seeds."""
