"""Train the bundled testbed model: `python -m tools.testbed --out testbed-run`."""
