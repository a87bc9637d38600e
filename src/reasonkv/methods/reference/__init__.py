"""Public code of methods as it is, quirks included, for tests against recorded vectors."""
