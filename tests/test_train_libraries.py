"""What training imports: without torch's compiler and its distributed tensors, which are there for whoever asks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

IMPORT = """
import os, sys, traceback
from olpack.model.libraries import import_libraries
import_libraries()
import torch, transformers, peft, bitsandbytes
from transformers import Qwen3ForCausalLM, LlamaForCausalLM
weight = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([weight])
weight.grad = torch.ones(2)
optimizer.step()
optimizer.zero_grad()
assert not {"torch._dynamo.convert_frame", "torch.distributed.tensor", "sklearn"} & sys.modules.keys()

def attempt(name, use):
    if not os.fork():
        try:
            exec(use)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.wait()[1] == 0, name

"""

USES = {
    "a module of the compiler": "import torch._dynamo.config as config; assert torch._dynamo.config is config is sys.modules['torch._dynamo.config']",
    "a name of a module": "from torch._dynamo.utils import counters; assert sys.modules['torch._dynamo.utils'].counters is counters",
    "a name of the compiler": "import torch._dynamo; assert callable(torch._dynamo.explain) and torch._dynamo.__file__",
    "torch.compile": "assert torch.compile(lambda x: x + 1)(torch.zeros(1)) == 1",
    "masks by vmap": "from transformers.masking_utils import TransformGetItemToIndex as of\nwith of(): pass",
    "distributed tensors": "import torch.distributed.tensor; assert torch.distributed.is_available() and torch.distributed.tensor.DTensor",
}


def test_training_imports_neither_compiler_nor_distributed_tensors_and_both_are_there_when_asked_for():
    attempts = "".join(f"attempt({name!r}, {use!r})\n" for name, use in USES.items())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run([sys.executable, "-c", IMPORT + attempts], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_processes_that_train_together_have_distributed_tensors():
    code = "import sys; from olpack.model.libraries import import_libraries; import_libraries(distributed=True); import torch.distributed.tensor"
    code += (
        "; from transformers.utils import is_torch_distributed_available as known; assert known() and hasattr(sys.modules['torch._dynamo'], 'config')"
    )
    child = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
