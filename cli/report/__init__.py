"""`lit-lipschitz report`."""
