import os
import sys
import time

import torch, torch.nn.functional as F

torch.manual_seed(0)
x = torch.randn(64, 320)
W = [torch.randn(320, 320) * 0.05 for _ in range(20)] + [torch.randn(960, 320) * 0.05]
t = time.perf_counter()
c = time.process_time()
n = int(sys.argv[1])
for _ in range(n):
    for w in W[:-1]:
        y = F.silu(x @ w.T)
        y = y + x
        y = y / y.pow(2).mean(-1, keepdim=True).sqrt()
    z = (y @ W[-1].T).softmax(-1)
print(os.environ.get("GOMP_SPINCOUNT", "default"), f"wall {time.perf_counter() - t:.2f} cpu {time.process_time() - c:.2f}")
