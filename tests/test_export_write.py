"""The pass over the tensors: what several files share is computed once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
from tiny_models import write_model

# Exports as the worker does, and prints how many weights were quantized to each type.
COUNT = """
import collections, json, sys
from pathlib import Path
from olpack.export.converter import use_converter
from olpack.llamacpp import library
from olpack.llamacpp.source import converter_source
use_converter(converter_source())
from olpack.export import run
counted, quantize_rows = collections.Counter(), library.quantize_rows
def count(type_, rows, *rest, **options):
    counted[type_] += rows.size
    return quantize_rows(type_, rows, *rest, **options)
library.quantize_rows = count
source, out, *quants = sys.argv[1:]
targets = [(quant, str(Path(out, quant))) for quant in quants]
run.export(source, targets, {"threads": 1}, report=lambda count, total: None)
print(json.dumps(counted))
"""


def test_a_type_that_several_files_share_is_computed_once(tmp_path):
    quants = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
    model = write_model(tmp_path / "model", num_hidden_layers=4)
    child = subprocess.run(
        [sys.executable, "-c", COUNT, model, tmp_path, *quants],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    counted = {int(type_): weights for type_, weights in json.loads(child.stdout).items()}

    types: dict[str, set[int]] = {}
    wanted: dict[int, int] = {}
    shared = 0
    for quant in quants:
        for tensor in gguf.GGUFReader(tmp_path / quant).tensors:
            type_, weights = int(tensor.tensor_type), int(tensor.n_elements)
            if type_ == gguf.GGMLQuantizationType.F32:
                continue  # the values as they were loaded
            if type_ in types.setdefault(tensor.name, set()):
                shared += weights
            else:
                wanted[type_] = wanted.get(type_, 0) + weights
            types[tensor.name].add(type_)
    assert counted == wanted
    assert shared > 0
