"""``fastplug demo --export FORMAT``: the trained model in a format of its own, answering there if that is a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastplug.demo.config import Exported


def check_format(format: str) -> None:
    """Raise before minutes are spent on training: an unknown format or type, or something that is not installed."""
    from fastplug.exporting import find_format

    exporter, implied = find_format(format)
    if exporter.format in ("gguf", "ollama", "gguf_lora"):
        from fastplug.exporters.gguf import converter
        from fastplug.exporters.gguf.types import parse_types
        from fastplug.exporters.libllama import LibLlama

        converter.find()
        if "types" in implied:
            parse_types(implied["types"])
        LibLlama().close()


def export_and_ask(model: Any, tokenizer: Any, folder: Path, format: str, prompt: str, limit: int) -> Exported:
    """Write ``model`` in ``format``; a GGUF file then continues ``prompt`` in libllama by up to ``limit`` tokens."""
    import fastplug

    result = fastplug.export(model, folder, format=format, tokenizer=tokenizer, overwrite=True)
    files = [folder / name for name in result.files if name.endswith(".gguf") and "-lora-" not in name]
    if not files:
        return Exported(result.format, Path(result.path), result.notes, None)
    from fastplug.exporters.libllama import LibLlama

    with LibLlama(quantizer=False) as llama:
        llama.load(files[-1], length=1024)
        answer = llama.generate(llama.tokenize(prompt), limit).strip()
    return Exported(result.format, files[-1], result.notes, answer)


__all__ = ["check_format", "export_and_ask"]
