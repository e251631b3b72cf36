"""`lit-lipschitz compare`."""
