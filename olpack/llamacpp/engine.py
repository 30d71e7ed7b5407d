"""The embedded engine: a GGUF loaded by llama.cpp in this process, for measuring it and for chatting without a server.

    with Engine(path, context=4096) as engine:
        for piece in engine.generate([{"role": "user", "content": "Reverse a list."}], max_tokens=200):
            print(piece, end="")

It stands on llama_cpp's low-level API: logits are fetched for the wanted positions only, a bounded number at a time. A llama.cpp that was
built badly for this machine dies by a signal instead of raising; what must survive that runs the engine in a process of its own.
"""

from __future__ import annotations

import codecs
import copy
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_cores
from olpack.llamacpp.library import load_llama_cpp

llama_cpp = load_llama_cpp()

_BATCH = 512  # tokens in one call; llama.cpp's own default for the physical batch
_LOGITS_BYTES = 64 << 20  # of float32 logits that one call may return: 2048 positions of an 8k vocabulary, 109 of a 150k one
_GGML_ERROR = 4  # enum ggml_log_level
_SEED_ANY = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: a new seed each time


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: names and defaults are Ollama's. A temperature of 0 takes the likeliest token."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Sampling:
        """From a package's checked parameters; those that are not about sampling (num_ctx, …) are left out."""
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in parameters.items() if key in known}
        if stop := chosen.get("stop"):
            chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**chosen)


class Generation:
    """An answer under way. Iterate for its pieces of text; the attributes below are final when the iteration ends.

    Attributes:
        finish: "stop" (the model ended its turn, or a stop text came) or "length" (max_tokens or the context is used up).
        tokens: how many tokens were generated, the end-of-turn token not counted.
    """

    def __init__(self, pieces: Iterator[str]):
        self.finish: Literal["stop", "length"] = "length"
        self.tokens = 0
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self._pieces


def computes_on_gpu() -> bool:
    """Whether the installed llama.cpp was built for a GPU that is there. Once it has loaded a model, the process has a part of the GPU's memory."""
    return bool(llama_cpp.llama_supports_gpu_offload())


class Engine:
    """One GGUF, loaded, with one conversation's worth of context.

    Args:
        path: the file.
        context: most tokens that prompt and answer may have together.
        threads: CPU threads; None: the physical cores this process may use.
        adapter: a LoRA GGUF that is applied to the weights as it runs; None: there is none.
        template: a chat template in place of the file's own; None: that is used.
        max_outputs: most positions whose logits one call returns; None: as many as 64 MiB hold.
        watch: llama.cpp's evaluation callback: gets the address of a node's `ggml_tensor` and True before the node is computed; where it
            returns True, it is called again with False when the node's values are there, and ends the pass if it then returns False.
        writable: load the weights into memory of their own, so that they can be overwritten (`olpack.llamacpp.graph`); by default they
            are mapped from the file.

    Attributes:
        vocabulary_size: entries of the output layer.
        begin_token: the token that a text begins with where the model needs one; `tokenize` does not add it. None where it needs none.
        end_token: the token with which a text ends.

    Raises:
        OlpackError: no such file, or one that llama.cpp refuses; its reason is in the message.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        threads: int | None = None,
        *,
        adapter: Path | None = None,
        template: str | None = None,
        max_outputs: int | None = None,
        watch: Callable[[int, bool], bool] | None = None,
        writable: bool = False,
    ):
        self.path = Path(path)
        self._template = template
        self._model = self._context = self._adapter = None
        self._owns_model = True
        if not self.path.is_file():
            raise OlpackError(f"There is no GGUF at {self.path}.", "Make it with `olpack export`.")
        _log.start()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = -1  # all of them, where the build has a GPU
        if writable:
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), model_params)
        if not self._model:
            raise OlpackError(f"llama.cpp cannot load {self.path}: {_log.reason()}.", "Is the file whole? `olpack export` makes it again.")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        begin = llama_cpp.llama_vocab_bos(self._vocab)
        self.begin_token: int | None = begin if llama_cpp.llama_vocab_get_add_bos(self._vocab) and begin >= 0 else None
        self.end_token: int = llama_cpp.llama_vocab_eos(self._vocab)
        self.context = context
        self._outputs = max(1, min(_BATCH, max_outputs or _LOGITS_BYTES // (4 * self.vocabulary_size)))

        self._open_context(threads or usable_cores(), watch)
        if adapter is not None:
            self._load_adapter(adapter)

    def _open_context(self, threads: int, watch: Callable[[int, bool], bool] | None = None) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = _BATCH
        params.n_outputs_max = self._outputs
        params.swa_full = False  # one sequence that only grows or starts again: a sliding layer needs no more than its window
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        if watch is not None:
            self._watch = llama_cpp.ggml_backend_sched_eval_callback(lambda tensor, ask, _: watch(tensor, ask))  # must outlive the context
            params.cb_eval = self._watch
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            reason = _log.reason()
            self.close()
            raise OlpackError(f"llama.cpp cannot make a context of {self.context} tokens for {self.path}: {reason}.", "Try a smaller context.")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch: Any = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def beside(self, threads: int) -> Engine:
        """Another context on the same weights, which another thread of this process may use at the same time. It is closed before this one.

        Args:
            threads: CPU threads of the other context.
        """
        other = copy.copy(self)
        other._owns_model, other._context = False, None
        other._open_context(threads)
        if other._adapter:
            other.apply_adapter(True)
        return other

    def use_threads(self, threads: int) -> None:
        """Compute on this many CPU threads from now on."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def _load_adapter(self, adapter: Path) -> None:
        self._adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(adapter))  # freed with the model
        if not self._adapter:
            reason = _log.reason()
            self.close()
            raise OlpackError(f"llama.cpp cannot apply {adapter} to {self.path}: {reason}.", "Was it made for this base? `olpack export` makes both.")
        self.apply_adapter(True)

    def apply_adapter(self, applied: bool) -> None:
        """Apply the adapter to all that is processed from now on, or leave it out. The next call of `process` plans the computation anew."""
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter), (ctypes.c_float * 1)(1.0)
        llama_cpp.llama_set_adapters_lora(self._context, adapters, int(applied), scales)

    def close(self) -> None:
        """Free the model. May be called twice."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None
        if self._model and self._owns_model:
            llama_cpp.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- text and tokens

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are taken as such, and no beginning-of-sequence token is added."""
        raw = text.encode()
        capacity = len(raw) + 1  # a token stands for at least one byte; one more where the tokenizer puts a space in front
        ids = (llama_cpp.llama_token * capacity)()
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, capacity, False, True)
        if count < 0:  # a tokenizer that normalizes can need more
            ids = (llama_cpp.llama_token * -count)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, -count, False, True)
        return ids[:count]

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for, perhaps a part of a character; nothing for a special token, or its name where `special`."""
        piece = ctypes.create_string_buffer(64)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, special)
        if count < 0:
            piece = ctypes.create_string_buffer(-count)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, special)
        return piece.raw[:count]

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF's metadata as text, or None where it has no such key."""
        capacity = 1024
        while True:
            value = ctypes.create_string_buffer(capacity)
            length = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), value, capacity)
            if length < 0:
                return None
            if length < capacity:
                return value.raw[:length].decode(errors="replace")
            capacity = length + 1

    def chat_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """The conversation as the model's template renders it, with the opening of the assistant's turn.

        Raises:
            OlpackError: the GGUF has no template, or its template refuses the conversation.
        """
        from olpack.llamacpp.chat_template import render_chat

        template = self._template or self.metadata("tokenizer.chat_template")
        if not template:
            raise OlpackError(f"{self.path} has no chat template, so it cannot answer a conversation.", "Give plain text instead.")
        special = {
            name: self.token_bytes(token, special=True).decode(errors="replace")
            for name, token in (
                ("bos_token", llama_cpp.llama_vocab_bos(self._vocab)),
                ("eos_token", llama_cpp.llama_vocab_eos(self._vocab)),
                ("pad_token", llama_cpp.llama_vocab_pad(self._vocab)),
            )
            if token >= 0
        }
        return render_chat(template, messages, special, tools)

    # ---- the model's work

    def process(self, ids: Sequence[int]) -> None:
        """Forget what came before and run the model over `ids`; only the last position's logits are computed. Returns when it is done."""
        self._start(ids)
        llama_cpp.llama_synchronize(self._context)

    def process_whole(self, ids: Sequence[int]) -> None:
        """As `process`, with every position an output: a position that is none leaves out a part of the last layer."""
        self._forget(len(ids))
        for start, stop in _chunks([True] * len(ids), _BATCH, self._outputs):
            self._decode(ids[start:stop], start, [True] * (stop - start))
        llama_cpp.llama_synchronize(self._context)

    def extend(self, token: int) -> None:
        """Run the model over one more token. Returns when it is done."""
        self._decode([token], self._position, [True])
        llama_cpp.llama_synchronize(self._context)

    def logprobs(self, ids: Sequence[int], wanted: Sequence[bool]) -> np.ndarray:
        """Natural-log probabilities of the wanted tokens, each given all tokens before it.

        Args:
            ids: the tokens, at most `context` of them.
            wanted: one flag per token; the first token's flag is ignored, because nothing comes before it.

        Returns:
            float64, one per wanted token, in order. The softmax is taken in float64 over llama.cpp's float32 logits.
        """
        found = []
        for token, logits in self.scored(ids, wanted):
            top = logits.max()
            found.append(float(logits[token] - top - np.log(np.exp(logits - top).sum())))
        return np.array(found, dtype=np.float64)

    def scored(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[tuple[int, np.ndarray]]:
        """Each wanted token with the logits from which it would have been drawn, given all tokens before it. Arguments as for `logprobs`.

        Returns:
            (token, float64 of shape [vocabulary]) for one wanted token after the other; only one is in memory at a time.
        """
        self._forget(len(ids))
        # Position i predicts token i + 1.
        predicts = [bool(flag) for flag in wanted[1:]]
        while predicts and not predicts[-1]:  # what comes after the last wanted token is of no use
            predicts.pop()
        for start, stop in _chunks(predicts, _BATCH, self._outputs):
            self._decode(ids[start:stop], start, predicts[start:stop])
            for position in (position for position in range(start, stop) if predicts[position]):
                yield ids[position + 1], self._logits(position - start)

    def generate(
        self,
        prompt: list[dict] | Sequence[int],
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        tools: list[dict] | None = None,
    ) -> Generation:
        """Answer a conversation (messages), or go on from token ids.

        Args:
            max_tokens: most tokens of the answer; None, or negative as Ollama has it: as many as fit into the context.
            tools: JSON schemas of the functions that the model may call in a conversation.

        Raises:
            OlpackError: the prompt fills the context, or the template refuses the conversation.
        """
        messages = [turn for turn in prompt if isinstance(turn, dict)]
        ids = self.tokenize(self.chat_prompt(messages, tools)) if messages else [token for token in prompt if not isinstance(token, dict)]
        remaining = self.context - len(ids)
        if remaining < 1:
            raise OlpackError(f"The prompt has {len(ids)} tokens and the context has {self.context}.", "Set num_ctx higher, or shorten the prompt.")
        limit = remaining if max_tokens is None or max_tokens < 0 else min(max_tokens, remaining)
        generation = Generation(iter(()))
        generation._pieces = _until_stop(self._pieces(ids, limit, sampling, generation), sampling.stop, generation)
        return generation

    def _pieces(self, ids: list[int], limit: int, sampling: Sampling, generation: Generation) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character's bytes can be in several tokens
        chain = _sampler_chain(sampling, self.vocabulary_size)
        try:
            self._start(ids)
            for token in ids:  # penalties count the prompt's tokens too, as llama.cpp's server has it
                llama_cpp.llama_sampler_accept(chain, token)
            while generation.tokens < limit:
                token = llama_cpp.llama_sampler_sample(chain, self._context, -1)
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    generation.finish = "stop"
                    break
                generation.tokens += 1
                if piece := decoder.decode(self.token_bytes(token)):
                    yield piece
                if generation.tokens < limit:
                    self._decode([token], self._position, [True])
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            llama_cpp.llama_sampler_free(chain)

    def _start(self, ids: Sequence[int]) -> None:
        self._forget(len(ids))
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            self._decode(part, start, [start + index == len(ids) - 1 for index in range(len(part))])

    def _forget(self, coming: int) -> None:
        if coming > self.context:
            raise OlpackError(f"{coming} tokens do not fit into a context of {self.context}.", "Load the model with a longer context.")
        llama_cpp.llama_memory_clear(self._memory, False)
        self._position = 0

    def _decode(self, ids: Sequence[int], position: int, output: Sequence[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = output[index]
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise OlpackError(f"llama.cpp stopped with code {code} while running {self.path}: {_log.reason()}.")
        self._position = position + len(ids)

    def _logits(self, index: int) -> np.ndarray:
        """Logits after the batch's token `index`, float64, shape [vocabulary]."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary_size,)).astype(np.float64)


def _chunks(outputs: Sequence[bool], most_tokens: int, most_outputs: int) -> Iterator[tuple[int, int]]:
    """Cut positions into runs of at most `most_tokens` of which at most `most_outputs` are outputs."""
    start = count = 0
    for position, output in enumerate(outputs):
        if position - start == most_tokens or (output and count == most_outputs):
            yield start, position
            start, count = position, 0
        count += output
    if start < len(outputs):
        yield start, len(outputs)


def _until_stop(pieces: Iterator[str], stop: Sequence[str], generation: Generation) -> Iterator[str]:
    """Pass pieces on until a stop text appears. What may be the beginning of one stays in a buffer until that is known."""
    buffer = ""
    for piece in pieces:
        buffer += piece
        ends = [at for text in stop if (at := buffer.find(text)) >= 0]
        if ends:
            generation.finish = "stop"
            buffer = buffer[: min(ends)]
            break
        unsure = max((size for text in stop for size in range(1, len(text)) if buffer.endswith(text[:size])), default=0)
        if passed := buffer[: len(buffer) - unsure]:
            yield passed
        buffer = buffer[len(buffer) - unsure :]
    if buffer:
        yield buffer


def _sampler_chain(sampling: Sampling, vocabulary_size: int) -> int:
    """llama.cpp's samplers in the order that its server applies them."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    steps = []
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        steps.append(llama_cpp.llama_sampler_init_penalties(vocabulary_size, sampling.repeat_last_n, *penalties))
    if sampling.temperature <= 0:
        steps.append(llama_cpp.llama_sampler_init_greedy())
    else:
        if sampling.top_k > 0:
            steps.append(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            steps.append(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            steps.append(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            steps.append(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
        steps.append(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        steps.append(llama_cpp.llama_sampler_init_dist(_SEED_ANY if sampling.seed is None else sampling.seed & 0xFFFFFFFF))
    for step in steps:
        llama_cpp.llama_sampler_chain_add(chain, step)
    return chain


class _Log:
    """llama.cpp's log: nothing goes to the screen, and the latest errors go into our messages."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=4)
        self._callback = llama_cpp.llama_log_callback(self._take)  # must outlive every model

    def start(self) -> None:
        self._errors.clear()
        llama_cpp.llama_log_set(self._callback, None)

    def reason(self) -> str:
        """The first of the latest errors, which names the cause; the later ones report that loading failed."""
        return self._errors[0] if self._errors else "no reason given"

    def _take(self, level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace")
        if level == _GGML_ERROR and line.strip():
            # "llama_model_load: error loading model: unknown model architecture: 'x'": the function's name means nothing to a user
            self._errors.append(line.strip().split(": ", 1)[-1].removeprefix("error loading model: ").rstrip("."))


_log = _Log()
