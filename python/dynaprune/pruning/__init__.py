"""What is pruned and when: score, trial, pace, allocation, regrowth, neurons, and the pruner that joins
them."""
