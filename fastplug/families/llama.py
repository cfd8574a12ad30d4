"""Llama 2, 3 and 3.x."""

from fastplug.families.row import Family

LLAMA = Family("llama", "transformers.models.llama.modeling_llama", "Llama")
