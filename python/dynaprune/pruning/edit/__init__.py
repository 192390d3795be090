"""The changes of a structure as values, and the one place that carries them out."""
