"""libllama in a process of its own, driven by lines of JSON. Run as a script: it imports nothing of fastplug.

A process, because a failed assertion in the C++ code ends the process that it runs in, and that must not be the one
that holds a trained model. The binding is ctypes over the C API of ``llama.h`` and reaches into its parameter structs
as little as it can: each struct is what ``llama_*_default_params()`` returned, in a buffer larger than any version of
it, with a few leading fields set whose default values are checked first. Larger is harmless: the structs are the last
argument of their functions, and the callee reads its own size of them.

A request is ``{"call": name, ...}``, an answer ``{"result": ...}`` or ``{"error": text}``; arrays travel as ``.npy``
files.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

_F16, _F32 = 1, 0  # ggml_type
_TYPE_K = 26  # the index of type_k among the 32-bit words of llama_context_params


class Params(ctypes.Structure):
    _fields_ = [("words", c_int32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


class Importance(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t)]


class QuantizeParams(ctypes.Structure):
    """The head of ``llama_model_quantize_params``; the rest stays as the defaults are."""

    _fields_ = [
        ("nthread", c_int32), ("ftype", c_int32), ("output_type", c_int32), ("embedding_type", c_int32),
        ("flags", c_uint8 * 8), ("imatrix", POINTER(Importance)), ("rest", c_uint8 * 992),
    ]  # fmt: skip


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
# name: (result, arguments)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_model_default_params": (Params, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Params]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_context_default_params": (Params, []),
    "llama_init_from_model": (c_void_p, [c_void_p, Params]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_print_system_info": (c_char_p, []),
}
_QUANTIZER: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_quantize_default_params": (Params, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, c_void_p]),
}


class Failure(Exception):
    """Told to the other side."""


class Worker:
    def __init__(self) -> None:
        self.lib: Any = None
        self.model: Any = None
        self.context: Any = None
        self.vocab: Any = None
        self.length = 0
        self.messages: deque[str] = deque(maxlen=40)
        self._log = _LOG(self._remember)

    def _remember(self, level: int, text: bytes | None, _: Any) -> None:
        if level in (3, 4) and text:  # warnings and errors
            self.messages.append(text.decode("utf-8", "replace").strip())

    def open(self, candidates: list[str], quantizer: bool) -> dict[str, str]:
        """Load the first of ``candidates`` (paths of shared libraries) that has all functions."""
        reasons = []
        for path in candidates:
            try:
                self.lib = _load(Path(path), quantizer)
            except (OSError, AttributeError, Failure) as error:
                reasons.append(f"{path}: {error}")
                continue
            self.lib.llama_log_set(self._log, None)
            self.lib.llama_backend_init()
            info = (self.lib.llama_print_system_info() or b"").decode("utf-8", "replace")
            return {"path": path, "system": info}
        raise Failure("; ".join(reasons))

    def quantize(
        self, source: str, target: str, ftype: int, threads: int, importance: str | None, names: list[str] | None
    ) -> None:
        defaults = self.lib.llama_model_quantize_default_params()
        params = QuantizeParams.from_buffer_copy(defaults)
        params.nthread, params.ftype = threads, ftype
        held = []
        if importance is not None:
            with np.load(importance) as arrays:
                for index, name in enumerate(names or []):
                    held.append((name.encode(), np.ascontiguousarray(arrays[f"a{index}"], dtype=np.float32)))
            rows = (Importance * (len(held) + 1))()  # the last one has no name, which ends the list
            for row, (encoded, values) in zip(rows, held):
                row.name, row.size = encoded, values.size
                row.data = values.ctypes.data_as(POINTER(c_float))
            params.imatrix = rows
        if self.lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
            raise Failure(self._why("libllama could not quantize the file"))

    def load(self, path: str, length: int, threads: int, lora: str | None, exact: bool) -> dict[str, int]:
        """Load a GGUF file, and an adapter onto it; ``exact`` keeps keys and values in fp32."""
        self.unload()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), self.lib.llama_model_default_params())
        if not self.model:
            raise Failure(self._why("libllama could not load the file"))
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        params = self.lib.llama_context_default_params()
        if list(params.words[:3]) != [512, 2048, 512]:
            raise Failure("this libllama has another llama_context_params than the versions known here")
        params.words[0] = params.words[1] = params.words[2] = self.length = length
        if exact and list(params.words[_TYPE_K : _TYPE_K + 2]) == [_F16, _F16]:
            params.words[_TYPE_K] = params.words[_TYPE_K + 1] = _F32
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise Failure(self._why("libllama could not make a context for the file"))
        self.lib.llama_set_n_threads(self.context, threads, threads)
        if lora is not None:
            self._adapt(lora)
        return {"vocabulary": int(self.lib.llama_vocab_n_tokens(self.vocab))}

    def _adapt(self, lora: str) -> None:
        adapter = self.lib.llama_adapter_lora_init(self.model, os.fsencode(lora))
        if not adapter:
            raise Failure(self._why("libllama could not load the adapter"))
        if hasattr(self.lib, "llama_set_adapters_lora"):
            self.lib.llama_set_adapters_lora.argtypes = [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]
            adapters, scales = (c_void_p * 1)(adapter), (c_float * 1)(1.0)
            failed = self.lib.llama_set_adapters_lora(self.context, adapters, 1, scales)
        else:  # before 2026
            self.lib.llama_set_adapter_lora.argtypes = [c_void_p, c_void_p, c_float]
            failed = self.lib.llama_set_adapter_lora(self.context, adapter, 1.0)
        if failed:
            raise Failure(self._why("libllama could not use the adapter"))

    def unload(self) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.context = self.model = self.vocab = None

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of ``text``; the names of special tokens in it count as those tokens, nothing else is added
        unless ``special``."""
        encoded = text.encode("utf-8")
        size = len(encoded) + 8
        ids = (c_int32 * size)()
        count = self.lib.llama_tokenize(self.vocab, encoded, len(encoded), ids, size, special, True)
        if count < 0:
            raise Failure(self._why("libllama could not tokenize a text"))
        return list(ids[:count])

    def detokenize(self, ids: list[int], special: bool) -> str:
        array, size = (c_int32 * len(ids))(*ids), 64 * len(ids) + 64
        text = ctypes.create_string_buffer(size)
        count = self.lib.llama_detokenize(self.vocab, array, len(ids), text, size, False, special)
        return text.raw[: max(count, 0)].decode("utf-8", "replace")

    def logits(self, ids: list[int], file: str) -> None:
        """Write fp32 ``[len(ids), vocabulary]`` to ``file``."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        np.save(file, self._decode(ids, 0, every=True))

    def generate(self, ids: list[int], limit: int) -> dict[str, Any]:
        """Greedy: the most likely token, until one that ends the turn."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        step, position = ids, 0
        made: list[int] = []
        while len(made) < min(limit, self.length - len(ids)):
            token = int(self._decode(step, position, every=False)[-1].argmax())
            if self.lib.llama_vocab_is_eog(self.vocab, token):
                break
            position += len(step)
            step = [token]
            made.append(token)
        return {"ids": made, "text": self.detokenize(made, False) if made else ""}

    def _decode(self, ids: list[int], position: int, every: bool) -> Any:
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index] = token, position + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = every or index == len(ids) - 1
            if code := self.lib.llama_decode(self.context, batch):
                raise Failure(self._why(f"libllama could not run {len(ids)} tokens (code {code})"))
            rows = len(ids) if every else 1
            width = int(self.lib.llama_vocab_n_tokens(self.vocab))
            return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows, width)).copy()
        finally:
            self.lib.llama_batch_free(batch)

    def _why(self, what: str) -> str:
        errors = [line for line in self.messages if line]
        self.messages.clear()
        return f"{what}: {errors[-1]}" if errors else what


def _load(path: Path, quantizer: bool) -> Any:
    folder = path.parent
    parts = []
    # Before libllama, which wants them under these names wherever they lie.
    for pattern in ("*ggml-base*", "*ggml.*"):
        parts += [item for item in sorted(folder.glob(pattern)) if item.suffix in (".so", ".dylib", ".dll")][:1]
    loaded = [ctypes.CDLL(str(part), mode=getattr(ctypes, "RTLD_GLOBAL", 0)) for part in parts]
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in {**_FUNCTIONS, **(_QUANTIZER if quantizer else {})}.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    for part in (*loaded, lib):
        if hasattr(part, "ggml_backend_load_all_from_path"):  # CPU code for several processors, one file each
            part.ggml_backend_load_all_from_path.argtypes = [c_char_p]
            part.ggml_backend_load_all_from_path(os.fsencode(folder))
            break
    if quantizer:
        defaults = QuantizeParams.from_buffer_copy(lib.llama_model_quantize_default_params())
        if (defaults.nthread, defaults.output_type, bool(defaults.imatrix)) != (0, defaults.embedding_type, False):
            raise Failure("it has another llama_model_quantize_params than the versions known here")
    return lib


def main() -> None:
    # What C++ code prints must not land between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("call"))(**request)}
        except Failure as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "no memory left"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
