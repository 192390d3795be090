"""What attach refuses, what the first batch shows, and what is said once because it hinders pruning."""
