"""`lit-lipschitz fit`, `validate`, `test` and `predict`, which LightningCLI runs."""
