"""What is pruned and when: score, trial, pace, allocation, regrowth, neurons, and the pruner of them all."""
