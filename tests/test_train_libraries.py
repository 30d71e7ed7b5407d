"""What training imports: not the packages that transformers would import and olpack never calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def run(code: str) -> None:
    child = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_packages_are_left_out_and_can_be_imported_later():
    run("""
import sys
from olpack.model.libraries import import_libraries
import_libraries()
from transformers import LlamaForCausalLM
assert not {"sklearn", "scipy", "torchvision"} & sys.modules.keys()  # where they were hidden, they would be None
""")


def test_where_transformers_was_imported_before_all_packages_are_found():
    run("""
import sys
import transformers
from olpack.model.libraries import fewer_packages, import_libraries
with fewer_packages():
    assert None not in sys.modules.values()
import_libraries()
from transformers import LlamaForCausalLM
""")
