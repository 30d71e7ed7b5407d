"""Many short texts on one model: several contexts on the same weights compute side by side, each on its share of the CPU's cores.

llama.cpp's threads wait for each other after every product. For one token of a small model that takes longer than the products themselves, and the
more cores a machine has the longer. Contexts do not wait for each other. What each computes is what it computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TypeVar

import psutil

from olpack.llamacpp.engine import Engine, llama_cpp

_SHARE = 4  # one part in so many of the free memory is for further contexts

Result = TypeVar("Result")


def side_by_side(engine: Engine, works: Sequence[Callable[[Engine], Result]], most: int, threads: int) -> Iterator[Result]:
    """Do each work on the engine, or on another context of it in a thread of its own; the results in the order of the works.

    There are as many contexts as fit into a quarter of the free memory, by what the second one took. With a GPU there is one.

    Args:
        most: contexts.
        threads: CPU threads of all contexts together, if that is more than one each.

    Raises:
        what a work raises.
    """
    if most == 1 or len(works) < 3 or llama_cpp.llama_supports_gpu_offload():
        yield from (work(engine) for work in works)
        return
    first, second, *rest = works
    yield first(engine)  # from now on the weights are in memory
    with ExitStack() as opened:
        before = psutil.Process().memory_info().rss
        engines = [engine, opened.enter_context(engine.beside(threads))]
        yield second(engines[1])
        each = max(1, psutil.Process().memory_info().rss - before)
        count = min(most, len(rest), 2 + psutil.virtual_memory().available // _SHARE // each)
        while len(engines) < count:
            engines.append(opened.enter_context(engine.beside(1)))
        free: SimpleQueue[Engine] = SimpleQueue()
        for one in engines[:count]:
            one.use_threads(max(1, threads // count))
            free.put(one)

        def do(work: Callable[[Engine], Result]) -> Result:
            one = free.get()
            try:
                return work(one)
            finally:
                free.put(one)

        pool = ThreadPoolExecutor(count)
        try:
            yield from pool.map(do, rest)
        finally:
            pool.shutdown(cancel_futures=True)
