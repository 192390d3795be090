"""These tests need a process of their own: triton chooses the interpreter when the kernels are imported."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
