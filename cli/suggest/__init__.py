"""`lit-lipschitz suggest`."""
