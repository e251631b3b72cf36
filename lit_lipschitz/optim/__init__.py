"""Learning-rate schedules, and writing a learning rate into an optimizer."""
