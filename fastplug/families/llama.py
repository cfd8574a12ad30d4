"""Llama 2, 3 and 3.x, and the models that are Llamas under another name."""

from fastplug.families.row import Family

LLAMA = Family("llama", "transformers.models.llama.modeling_llama", "Llama")
FAMILIES = (LLAMA,)
