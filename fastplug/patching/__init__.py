"""The engine: walk (model -> sites), choose (site -> implementation or reason), bind, report, undo."""
