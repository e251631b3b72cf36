"""From the loss and the size of the output layer's inputs to a Lipschitz constant; pure functions of numbers."""
