"""`evaluate --endpoint URL`: a task answered by a server, by full KV first and then as the server compresses.

Requests are sent at once, up to `concurrency`, so that the server runs its largest batch; a record is written the
moment its answer comes. What a request held follows from lengths alone, so it is computed here and not measured.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, cast

from reasonkv.budget import Budget
from reasonkv.evaluate.cells import RunConfig, job_arguments
from reasonkv.evaluate.endpoint import Endpoint, EndpointError
from reasonkv.evaluate.generate import row_seed
from reasonkv.evaluate.job import GenerateJob
from reasonkv.evaluate.manifest import Manifest, Weights
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.records import AnswerItem, AnswerRecord
from reasonkv.evaluate.run import AnswerTask, Session
from reasonkv.evaluate.traces import TraceError
from reasonkv.methods import Method, layer_budgets
from reasonkv.schedule import attended_slots, row_budget, walk
from reasonkv.tasks import Problem, TaskError, get_task
from reasonkv.tasks.needle import NeedleTask
from reasonkv.tasks.options import THINK


def run_remote(
    job: GenerateJob, endpoint: Endpoint, folder: Path, progress: Progress = silent, *, command: str | None = None
) -> list[AnswerRecord]:
    """Run a job on a server into a results folder, or finish one that was stopped.

    Args:
        job: what to run; its methods and budget are the server's (`Endpoint.fitted`).

    Returns:
        Every record of the folder.

    Raises:
        EndpointError: the server is away, or refused requests; what it answered is in the folder.
        JobError, TaskError, TraceError: arguments that cannot be carried out.
        ResultsError, RecordError: the folder belongs to something else, or is damaged.
    """
    job = endpoint.fitted(job)
    about: dict[str, Any] = {
        "endpoint": "reasonkv" if endpoint.served else "vllm" if endpoint.is_vllm else "openai",
        **job_arguments(job),
    }
    del about["mean_slots"]  # a server has one budget
    if endpoint.served is not None:
        about["server_seed"] = endpoint.served.seed
    # weights cannot be seen from here; a replica at another URL may go on with a folder
    weights = Weights(name=endpoint.name, hash=hashlib.sha256(endpoint.name.encode()).hexdigest()[:16])
    manifest = Manifest(command=command or "evaluate", arguments=about, model=weights, device=endpoint.url)
    return Session(job, endpoint, folder, progress, manifest).run(RemoteTask)


class RemoteTask(AnswerTask):
    """The problems of one task, answered by a server, all of them in one batch."""

    def __init__(self, session: Session, spec: str) -> None:
        self.endpoint = cast(Endpoint, session.model)
        if self.endpoint.tokenizer is None and isinstance(get_task(spec, session.job.options), NeedleTask):
            raise TaskError(f"{spec} counts in tokens; give the folder of the server's tokenizer as --model.")
        super().__init__(session, spec)
        self.rows = None  # the server has its budget already

    def make_batches(self, problems: Sequence[Problem]) -> list[list[AnswerItem]]:
        """Return the answers to ask for."""
        with ThreadPool(self.job.concurrency) as pool:
            asked = pool.map(self._prompt, problems)
        return [[replace(one, sample=sample) for one in asked for sample in range(self.job.samples)]]

    def execute(self, config: RunConfig, batch: Sequence[AnswerItem]) -> Iterator[AnswerRecord]:
        """Ask for what is missing of a batch, all at once, and yield records as answers come."""
        there = self.session.file.records
        missing = [one for one in batch if self.key(config, one) not in there or not self.is_whole(config, one)]
        refused, failed = list[EndpointError](), list[EndpointError]()

        def ask(item: AnswerItem) -> tuple[AnswerItem, Answer | EndpointError]:
            try:
                return item, failed[0] if failed else self._ask(config, item)
            except EndpointError as error:
                return item, error

        with ThreadPool(max(1, min(self.job.concurrency, len(missing)))) as pool:
            for item, answer in pool.imap_unordered(ask, missing):
                if isinstance(answer, EndpointError):  # what is on its way is waited for, and nothing else is sent
                    (refused if answer.refused else failed).append(answer)
                    continue
                self.meter.add(len(answer.tokens))
                slot_bytes = 0 if self.endpoint.served is None else self.endpoint.served.slot_bytes
                fed = answer.prompt_tokens + answer.output_tokens - 1
                yield self.answer(
                    config, item, answer.prompt_tokens, answer.tokens, answer.text, output_tokens=answer.output_tokens,
                    seconds=round(answer.seconds, 4), truncated=answer.truncated,
                    thinking_tokens=answer.thinking_tokens,
                    **held(
                        config.method, config.budget, answer.prompt_tokens, fed, slot_bytes,
                        row_seed(item.example, item.sample),
                    ),
                )  # fmt: skip
        if failed:
            raise failed[0]
        if refused:
            raise EndpointError(
                f"The server refused {len(refused)} of {len(missing)} requests, the first one so: {refused[0]}"
            )

    def _prompt(self, problem: Problem) -> AnswerItem:
        """Return a prompt as the server takes it; vLLM makes its token ids."""
        options, ask = self.task.prompt_options(self.job.options), self.endpoint.ask
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        chat: dict[str, Any] = {"messages": [*system, {"role": "user", "content": problem.prompt}]}
        if options.thinking is not None:
            chat["chat_template_kwargs"] = {"enable_thinking": options.thinking == "on"}
        chats = options.chat == "on" or (options.chat == "auto" and self.task.chat)
        if not self.endpoint.is_vllm:
            if chats:
                return AnswerItem(problem, chat)
            return AnswerItem(problem, {"prompt": problem.prompt})
        named: dict[str, Any] = {"model": self.endpoint.name}
        plain: dict[str, Any] = {"prompt": problem.prompt, "add_special_tokens": self.task.chat}
        try:
            found = ask("/tokenize", named | (chat if chats else plain), root=True)
        except EndpointError as error:
            if not (error.refused and chats and options.chat == "auto"):
                raise
            found = ask("/tokenize", named | plain, root=True)  # the tokenizer has no chat template
        context = self.endpoint.context
        if context is not None and found["count"] >= context:
            raise TraceError(
                f"A prompt of {self.task.name} has {found['count']} tokens, but the server takes {context} in all; "
                "choose easier dials for the task, or start the server with a larger --max-model-len."
            )
        whole = str(ask("/detokenize", named | {"tokens": found["tokens"]}, root=True)["prompt"])
        opened = whole.rfind(THINK) > whole.rfind(options.think_end)
        return AnswerItem(problem, {"prompt": found["tokens"]}, opened)

    def _ask(self, config: RunConfig, item: AnswerItem) -> Answer:
        """Send one request."""
        sampling, endpoint, began = self.job.sampling, self.endpoint, time.perf_counter()
        ids = item.prompt_P.get("prompt")
        counted = len(ids) if isinstance(ids, list) else None
        room = None if endpoint.context is None or counted is None else endpoint.context - counted
        # what a server takes unless told otherwise may come from the model's generation_config.json
        usual = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} if endpoint.is_vllm else {}
        given = {name: getattr(sampling, name) for name in ("top_k", "min_p", "repetition_penalty")}
        body: dict[str, Any] = {
            "model": endpoint.name,
            **item.prompt_P,
            "max_tokens": self.limit if room is None else min(self.limit, room),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.draws else 1.0,
            **usual,
            **{name: value for name, value in given.items() if value is not None},
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        own = row_seed(item.example, item.sample)
        if sampling.draws:
            body["seed"] = zlib.crc32(f"{self.job.seed} {own}".encode())
        if endpoint.is_vllm:
            body["return_token_ids"] = True
        if endpoint.served is not None:
            wish = {"seed": own} if config.budget is not None else {"enabled": False}
            body["vllm_xargs"] = {"reasonkv": json.dumps(wish)}
        path = "/chat/completions" if "messages" in item.prompt_P else "/completions"
        found = Answer.of(endpoint.ask(path, body), self.job.options.think_end, counted)
        found = replace(found, seconds=time.perf_counter() - began)
        if not endpoint.is_vllm:
            return found
        # marks of thinking may be special tokens, which the text of an answer leaves out
        named = {"model": endpoint.name}
        whole = str(endpoint.ask("/detokenize", named | {"tokens": found.tokens}, root=True)["prompt"])
        head, mark, _ = whole.rpartition(self.job.options.think_end)
        if not mark:
            return replace(found, thinking_tokens=found.output_tokens if item.opened or THINK in whole else 0)
        words = {"prompt": head + mark, "add_special_tokens": False}
        counted = int(endpoint.ask("/tokenize", named | words, root=True)["count"])
        return replace(found, thinking_tokens=min(found.output_tokens, counted))


@dataclass(frozen=True)
class Answer:
    """One answer of a server."""

    text: str  # with its thinking
    # ids, or where the server gives none, a hash of every word, which tells loops and differences as well
    tokens: list[int]
    prompt_tokens: int  # as the server counts them
    output_tokens: int  # likewise
    truncated: bool  # whether the limit ended it
    thinking_tokens: int | None  # None where the server does not tell
    seconds: float = 0.0  # from the request to the answer

    @classmethod
    def of(cls, response: Mapping[str, Any], think_end: str, prompt_tokens: int | None) -> Answer:
        """Read a response of either kind.

        Raises:
            EndpointError: it is none.
        """
        try:
            choice, usage = response["choices"][0], response.get("usage") or {}
            message = choice.get("message")
            text = str(choice["text"] if message is None else message.get("content") or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError("The server's answer has no text; see that its URL is of the OpenAI API.") from None
        thought = (message or {}).get("reasoning_content") or (message or {}).get("reasoning")
        if thought:  # which some servers take out of the text
            text = f"{THINK}{thought}{think_end}{text}"
        tokens = choice.get("token_ids") or [zlib.crc32(word.encode()) for word in text.split()]
        output_tokens = int(usage.get("completion_tokens") or max(1, len(tokens)))
        thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or None
        if thinking is None and think_end not in text:
            thinking = output_tokens if THINK in text else 0
        prompt_tokens = int(prompt_tokens or usage.get("prompt_tokens") or 1)
        return cls(text, tokens, prompt_tokens, output_tokens, choice.get("finish_reason") == "length", thinking)


def held(
    method: Method, budget: Budget | None, prompt: int, fed: int, slot_bytes: int, seed: int = 0
) -> dict[str, Any]:
    """Return what a sequence held, as `Measured` records have it; a policy of lengths alone decides all of it.

    Args:
        method: the one that evicts.
        budget: None for full KV.
        fed: tokens fed in all, prompt included.
        slot_bytes: of one slot in all layers; 0 where it is not known.
        seed: the request's own, which with `stagger` decides its turn.
    """
    own = None if budget is None else row_budget(budget, prompt, seed)  # requests take turns on a server, not layers
    shares = "" if own is None else str(own.layer_shares)
    budgets = layer_budgets(method, own, len(shares.split("/")), prompt) if shares else [own]
    walks = [list(walk(one, prompt, fed)) for one in budgets]  # of every layer
    peak = sum(max(before.physical + n for before, n, _, _ in one) for one in walks) / len(walks)
    slots = sum(one[-1][2].physical for one in walks) / len(walks)
    after = fed - prompt
    attended = sum(attended_slots(one, prompt, fed) for one in budgets) / len(budgets)
    return {
        "physical_mean": attended / after if after else 0.0,
        "physical_peak": peak,
        "physical_terminal": slots,
        "saved_ratio_terminal": 1 - slots / fed,
        "bytes_held": round(slots * slot_bytes),
        "bytes_peak": round(peak * slot_bytes),
        "bytes_full": fed * slot_bytes,
        "events": max(sum(compacted for *_, compacted in one) for one in walks),
        "tokens_dropped": round(fed - slots),
    }
