"""Evaluation: replay of full KV's traces, its records, and what they add up to."""
