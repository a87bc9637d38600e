"""Evaluation: replay of full KV's traces, answers by real generation, the search for a budget, and their records.

`job` needs no torch; `run.run` and `tune.tune` carry jobs out.
"""
