"""What a pruner sees of a training step: hooks, gradients, and the scores that are made of them."""
