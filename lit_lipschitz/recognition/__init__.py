"""Recognises the loss and the output layer in the autograd graph of a loss."""
