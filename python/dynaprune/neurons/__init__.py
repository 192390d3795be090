"""Whole neurons: the groups that leave a network together, and the cut that changes nothing it computes."""
