"""A model of its own, made fast by fastplug through an entry point."""
