"""A server that speaks the OpenAI API, and what it says about its KV cache.

vLLM is asked for more than others: the prompt's token ids, which are sent as they are to both methods, and those of the
output. A server that `reasonkv serve` started says in every response which method and budget it runs.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reasonkv.budget import Budget, PeriodicWindow, Window
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.cells import make_budgets
from reasonkv.evaluate.job import DEFAULT_METHODS, RULE, BudgetOptions, GenerateJob, JobError
from reasonkv.identity import TESTBED, TESTBED_FOLDER
from reasonkv.methods import Method, get_method

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT = 3600.0
"""Most seconds that a server may take for one answer."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a request that failed for no fault of its own is sent again."""
_BUSY = (408, 409, 429, 500, 502, 503, 504)


class EndpointError(ReasonKVError, RuntimeError):
    """A server that cannot be reached or refuses a request; the message is one sentence.

    Args:
        refused: the server lives and refuses this request alone.
    """

    def __init__(self, sentence: str, *, refused: bool = False) -> None:
        super().__init__(sentence)
        self.refused = refused


@dataclass(frozen=True)
class Served:
    """What a server of ours does to every request that does not opt out."""

    method: Method
    budget: Budget
    seed: int
    slot_bytes: int  # keys and values of one slot in all layers

    @classmethod
    def of(cls, response: Mapping[str, Any]) -> Served | None:
        """Read a response of our server; None of another one's."""
        found = (response.get("kv_transfer_params") or {}).get("reasonkv")
        if found is None:
            return None
        method, budget = get_method(found["method"]), Budget.from_dict(found["budget"])
        return cls(method, budget, int(found["seed"]), int(found["slot_bytes"]))

    def options(self) -> BudgetOptions:
        """Return the budget as a job has it."""
        budget = self.budget
        if isinstance(budget, Window):
            return BudgetOptions(window=budget.size, window_buffer=budget.buffer, retention=(budget.retention,))
        size: dict[str, Any] = {"keep": (budget.keep,)} if budget.tokens is None else {"tokens": (budget.tokens,)}
        return BudgetOptions(**size, **{name: getattr(budget, name) for name in RULE})


@dataclass(frozen=True)
class Endpoint:
    """One model of a server."""

    url: str  # up to and with `/v1`
    name: str
    is_vllm: bool = False  # whether it takes vLLM's own fields
    context: int | None = None  # most tokens of prompt and output together, if it says so
    served: Served | None = None  # what our server does; None of others
    tokenizer: Any = None  # for tasks whose length is counted in tokens; None where no folder was given

    @classmethod
    def connect(cls, url: str, model: str = TESTBED) -> Endpoint:
        """Return the model of a server.

        Args:
            url: http://HOST:PORT, with or without /v1.
            model: its name there, or a folder whose tokenizer is the same; where the server has one model only, the
                default stands for it.

        Raises:
            EndpointError: there is no such server or model.
        """
        url = (url if "://" in url else f"http://{url}").rstrip("/")
        if not _is_address(url):
            raise EndpointError(f"The endpoint {url[:100]!r} is no address such as http://HOST:PORT.")
        found = cls(url if url.endswith("/v1") else f"{url}/v1", model)
        listed = found.ask("/models").get("data") or [{"id": model}]
        names = [str(one.get("id")) for one in listed]
        if model not in names and (len(names) > 1 or (model != TESTBED and not Path(model).expanduser().is_dir())):
            raise EndpointError(f"{found.url} has no model {model}; give --model one of {', '.join(names)}.")
        about = listed[names.index(model) if model in names else 0]
        found = replace(
            found,
            name=str(about["id"]),
            is_vllm=about.get("owned_by") == "vllm",
            context=about.get("max_model_len"),
            tokenizer=_tokenizer(model, names),
        )
        if not found.is_vllm:
            return found
        probe = {"model": found.name, "prompt": "1", "max_tokens": 1, "temperature": 0}
        return replace(found, served=Served.of(found.ask("/completions", probe)))

    def fitted(self, job: GenerateJob) -> GenerateJob:
        """Return a job with the methods and the budget that the server runs.

        Raises:
            JobError: the job names others, or sampling that a server cannot do.
        """
        served = self.served
        methods, options = [get_method("full")], BudgetOptions()
        if served is not None:
            methods, options = [*methods, served.method], served.options()
            if isinstance(served.budget, PeriodicWindow):
                raise JobError("The server cuts by the number of its steps, so no record could say what was held.")
        budgets = make_budgets(options)
        runs = "full KV only" if served is None else f"{served.method.spec()} @ {budgets[0].label}, and full KV"
        asked = [get_method(one) for one in job.methods] if tuple(job.methods) != DEFAULT_METHODS else []  # type: ignore[arg-type]
        if any(one not in methods for one in asked) or (make_budgets(job.budget) or budgets) != budgets:
            raise JobError(f"The server at {self.url} runs {runs}; leave --methods and --budgets out.")
        if job.budget.layer_shares not in ("", options.layer_shares):
            raise JobError(f"The server at {self.url} decides the shares of its layers; leave --layer-shares out.")
        if job.sampling.think_budget is not None or job.sampling.preset is not None:
            raise JobError("A server takes no --think-budget and no --sampling published; give the numbers themselves.")
        return replace(job, methods=tuple(one.spec() for one in methods), budget=options)

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, root: bool = False) -> dict[str, Any]:
        """Return the server's answer to a request, which is sent again while the server is busy or away.

        Args:
            path: below `/v1`, or with `root` beside it.

        Raises:
            EndpointError: no answer, or a refusal.
        """
        url = (self.url.removesuffix("/v1") if root else self.url) + path
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, 'none')}",
        }
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        for pause in (*PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return dict(json.load(response))
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY or pause is None:
                    raise _refusal(url, error) from None
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:  # away, cut off, or no JSON
                if pause is None:
                    reason = getattr(error, "reason", error)
                    raise EndpointError(
                        f"{self.url} does not answer ({reason or type(error).__name__}); see that the server runs, and "
                        "repeat the command to continue."
                    ) from None
            time.sleep(pause)
        raise AssertionError


def _is_address(url: str) -> bool:
    try:
        found = urllib.parse.urlsplit(url)
        return found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:  # a bracket that is not closed, or a port that is no number
        return False


def _refusal(url: str, error: urllib.error.HTTPError) -> EndpointError:
    try:
        said = json.load(error)
        said = said.get("error", said)
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        text = str(error.reason)
    text = " ".join(text.split())[:300].rstrip(".")
    if error.code in (401, 403):
        return EndpointError(f"{url} wants a key ({text}); set {KEY_VARIABLE}.")
    hint = "see that the server runs well, and repeat the command to continue" if error.code in _BUSY else "see its log"
    return EndpointError(f"{url} answers {error.code} ({text}); {hint}.", refused=error.code not in (404, 405, *_BUSY))


def _seconds(given: str | None) -> float:
    try:
        return min(60.0, float(given or 0))
    except ValueError:  # a date
        return 0.0


def _tokenizer(model: str, names: list[str]) -> Any:
    """Return the tokenizer of a model folder, or None."""
    folder = Path(model).expanduser()
    if model == TESTBED and model in names:
        folder = TESTBED_FOLDER
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
