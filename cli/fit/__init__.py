"""`lit-lipschitz fit`, `validate`, `test` and `predict`."""
