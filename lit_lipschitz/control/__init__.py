"""Controls the learning rate of one optimizer: measure, reduce over the ranks, decide, write."""
