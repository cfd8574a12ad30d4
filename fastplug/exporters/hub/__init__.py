"""``hub``: any folder format, pushed to a Hugging Face hub with a model card that says what was measured."""

from __future__ import annotations

from fastplug.exporters.hub.push import hub

__all__ = ["hub"]
