"""Llama 2, 3 and 3.x, and the models that are Llamas under another name. Arcee: a Llama whose MLP has no gate."""

from fastplug.families.row import Family

LLAMA = Family("llama", "transformers.models.llama.modeling_llama", "Llama")
ARCEE = Family("arcee", "transformers.models.arcee.modeling_arcee", "Arcee", gate=None)
FAMILIES = (LLAMA, ARCEE)
