"""TriAttention: options are checked, and written back in their shortest form."""

from __future__ import annotations

import pytest

from reasonkv import MethodError, get_method


def test_options_are_checked_and_written_back() -> None:
    for spec in (
        "triattention",
        "triattention:variant=paper",
        "triattention:variant=paper,mode=global,normalize=False",
        "triattention:norm=rms2,norm_lambda=0.5,pin_prompt=True",
    ):
        assert get_method(spec).spec() == spec
    assert get_method("triattention:variant=paper").pin_prompt
    for bad, sentence in {
        "mode=local": "mode must be per_head, global or per_layer_per_head",
        "mode=global,group=mean": "needs group=max",
        "aggregation=sum": "aggregation must be mean or max",
        "aggregation=max,horizon=adaptive": "needs aggregation=mean",
        "norm=rms2,mlr=false": "needs norm=tri",
        "horizon=far": "horizon must be fixed, adaptive or variational",
    }.items():
        with pytest.raises(MethodError, match=sentence):
            get_method(f"triattention:{bad}")
