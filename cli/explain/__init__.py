"""`lit-lipschitz explain`."""
