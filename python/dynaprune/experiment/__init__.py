"""The experiment: tasks, both arms of a comparison, their tables, reports and pictures."""
