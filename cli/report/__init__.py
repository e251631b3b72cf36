"""`lit-lipschitz report`: the curves of runs."""
