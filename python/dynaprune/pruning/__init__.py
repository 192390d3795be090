"""Pruning while a model trains: prepare, attach, and the pruner that observes, decides and applies edits."""
