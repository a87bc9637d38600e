"""Results for people: terminal tables and figures."""
