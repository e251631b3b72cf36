"""The learning rate in the training loops of other packages; each module here imports its package."""
