"""Statistics of activations, gradients and optimizer updates, kept on the device without a host synchronisation."""
