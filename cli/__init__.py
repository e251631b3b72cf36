"""The command `lit-lipschitz`."""
