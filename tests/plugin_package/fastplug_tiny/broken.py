"""An entry point that cannot be loaded."""

raise RuntimeError("this plugin was built for another version")
