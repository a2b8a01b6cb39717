"""Lets a small language model write prompts out: any causal one that transformers loads, picked by the user.

It is loaded at the first use and lives on a thread of its own and on the CPU. It takes nothing of a GPU's memory, but 4
bytes of main memory for each of its parameters, and cores: a video model that runs on the CPU shares both with it.
Nothing of it is imported, fetched or asked before somebody wants a suggestion.

    enhancer = LanguageEnhancer("models/SmolLM2-360M-Instruct")
    print(enhancer.enhance("a red balloon").text)
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import MAX_PROMPT_CHARS, checked_prompt, checked_variant
from pipeline.container import limit_threads
from pipeline.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    SelfForcingError,
)
from pipeline.failures import is_out_of_memory
from prompting.enhancer import Suggestion
from prompting.source import checked_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ENHANCER_HELP = (
    "a language model that writes prompts out when asked to: its folder, or its name on the Hugging Face Hub with the "
    "40 digits of a revision (default: none)"
)
MAX_NEW_TOKENS = 160
MAX_SECONDS = 60.0
MAX_WAITING = 4
"""Questions that wait for their turn; more are refused at once."""
TEMPERATURE, TOP_P = 0.7, 0.9
INSTRUCTION = (
    "Rewrite this idea for a video as one detailed prompt of 60 to 90 words for a text-to-video model. Keep everything "
    "that the idea says. Add what things look like, where they are, the light, how they move and how the camera does. "
    "Write plain sentences in English and nothing else.\n\nIdea: {prompt}"
)
CONTINUATION = "{instruction}\n\nPrompt:"
"""For models that only go on with a text, without a form for questions and answers."""
_POLL_SECONDS = 0.1
_THINKING = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


class LanguageEnhancer:
    """Suggestions by a language model. Any thread may ask; the answers are made one after the other.

    Args:
        source: a folder of a model, or `name@revision` on the Hugging Face Hub, with all 40 digits of the revision.
        max_new_tokens: longest answer.
        max_seconds: longest time that whoever asks waits for an answer, the wait for others included.

    Raises:
        InvalidRequest: `source` is neither.
        WeightsError: the folder is no model, or not in safetensors files.
    """

    def __init__(self, source: str, *, max_new_tokens: int = MAX_NEW_TOKENS, max_seconds: float = MAX_SECONDS) -> None:
        self._place = checked_source(source)
        self.name = Path(source).name if self._place.revision is None else source.partition("@")[0]
        self._max_new_tokens = max_new_tokens
        self._max_seconds = max_seconds
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._waiting: deque[_Question] = deque()
        self._current: _Question | None = None
        self._thread: threading.Thread | None = None
        self._capped: threading.Thread | None = None
        self._lock = threading.Condition()
        self._closed = False

    @property
    def loaded(self) -> bool:
        return self._model is not None

    def enhance(self, prompt: str, variant: int = 0, cancel: threading.Event | None = None) -> Suggestion:
        """See `Enhancer.enhance`. Blocks the caller, for `max_seconds` at most.

        Args:
            cancel: Ends the question when it is set.

        Raises:
            Cancelled: `cancel` was set, or the program ends.
            DeadlineExceeded: it took too long. A model that was being loaded goes on loading.
            WeightsError, DownloadError: the model cannot be loaded. The next question tries again.
        """
        question = _Question(checked_prompt(prompt), checked_variant(variant), self._max_seconds, cancel)
        self._put(question)
        try:
            while not question.done.wait(_POLL_SECONDS):
                if self._closed:
                    raise Cancelled("The language model was shut down.")
                if question.over:
                    raise question.why_over(loading=not self.loaded)
        finally:
            question.left.set()
            with self._lock:
                if question in self._waiting:  # its place is free at once, though another one is being answered
                    self._waiting.remove(question)
        if question.error is not None:
            raise question.error
        assert question.answer is not None
        return question.answer

    def close(self, timeout: float | None = 2.0) -> bool:
        """End the thread after the token that is being made. Returns whether it ended within `timeout`."""
        with self._lock:
            self._closed = True
            thread = self._thread
            if self._current is not None:
                self._current.left.set()
            self._lock.notify_all()
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _put(self, question: _Question) -> None:
        """Give it a place, and see to it that there is a thread to answer it."""
        with self._lock:
            if self._closed:
                raise Cancelled("The language model was shut down.")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.over)
            if len(self._waiting) >= MAX_WAITING:
                raise SelfForcingError("The language model has too many questions to answer. Ask again later.")
            self._waiting.append(question)
            self._lock.notify_all()
            if self._thread is None or not self._thread.is_alive():
                # A daemon: a program that wants to end must not wait for a download.
                self._thread = threading.Thread(target=self._work, name="language model", daemon=True)
                self._thread.start()

    # ---- on its own thread

    def _work(self) -> None:
        while (question := self._next()) is not None:
            try:
                if not question.over:
                    question.answer = self._answer(question)
            except SelfForcingError as error:
                question.error = error
            except BaseException as error:  # a tokenizer's panic, or SystemExit, is no Exception
                told: SelfForcingError
                if is_out_of_memory(error):
                    told = OutOfMemory("There is not enough memory for the language model.")
                else:
                    logger.exception("The language model failed")
                    told = SelfForcingError("The language model failed. Ask again, or write the prompt yourself.")
                question.error = _caused(told, error)
            finally:
                self._current = None
                if question.answer is not None or question.error is not None:
                    question.done.set()

    def _next(self) -> _Question | None:
        """Wait for a question; None: the program ends."""
        with self._lock:
            self._lock.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, question: _Question) -> Suggestion:
        if self._capped is not threading.current_thread():
            _leave_a_core()
            self._capped = threading.current_thread()
        if self._model is None:
            self._model, self._tokenizer = self._place.load()
        assert self._tokenizer is not None
        text, unfinished = self._ask(self._model, self._tokenizer, question)
        return Suggestion(cleaned(text, unfinished), (f"Written by {self.name}.",))

    def _ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: _Question) -> tuple[str, bool]:
        """What the model writes, and whether it would have gone on."""
        import torch
        from transformers import (
            GenerationConfig,
            LogitsProcessor,
            LogitsProcessorList,
            StoppingCriteria,
            StoppingCriteriaList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        class Drawn(LogitsProcessor):
            """Adds Gumbel noise: the best token is then one drawn from the distribution.

            The library's own sampling draws from torch's generator, which belongs to everybody in the program.
            """

            def __init__(self, seed: int) -> None:
                self._generator = torch.Generator().manual_seed(seed)

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                noise = torch.empty_like(scores).exponential_(generator=self._generator).log_()
                return scores - noise

        class Over(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), question.over)

        tokens = self._tokens(tokenizer, question.prompt)
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and tokens.shape[1] + self._max_new_tokens > room:
            raise InvalidRequest(
                f"The prompt is too long for {self.name}, which reads and writes {room} tokens. Ask with a shorter one."
            )
        ends = model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P), Drawn(question.variant)]
            ),
            stopping_criteria=StoppingCriteriaList([Over()]),
        )
        if question.over:
            raise question.why_over(loading=False)
        written = whole[0, tokens.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        ended = config.eos_token_id is not None and int(written[-1]) in _as_list(config.eos_token_id)
        return text, not ended

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
        """[1, T] token numbers of the question, in the form that the model was trained on."""
        instruction = INSTRUCTION.format(prompt=prompt)
        if tokenizer.chat_template is None:
            return tokenizer(CONTINUATION.format(instruction=instruction), return_tensors="pt").input_ids
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            enable_thinking=False,  # templates that know no thinking ignore it
        )["input_ids"]


class _Question:
    """One prompt, and the answer to it when it is `done`."""

    def __init__(self, prompt: str, variant: int, max_seconds: float, cancel: threading.Event | None) -> None:
        self.prompt = prompt
        self.variant = variant
        self.done = threading.Event()
        self.left = threading.Event()
        """Set when nobody waits for the answer any more."""
        self._cancel = cancel or threading.Event()
        self.answer: Suggestion | None = None
        self.error: SelfForcingError | None = None
        self._max_seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds

    @property
    def over(self) -> bool:
        return self.left.is_set() or self._cancel.is_set() or time.monotonic() > self._deadline

    def why_over(self, *, loading: bool) -> SelfForcingError:
        if self.left.is_set() or self._cancel.is_set():
            return Cancelled("The question was dropped.")
        if loading:
            return DeadlineExceeded("The language model is still being loaded. Ask again in a moment.")
        return DeadlineExceeded(
            f"The language model took longer than {self._max_seconds:g} s. Ask again later, or write the prompt "
            "yourself."
        )


def cleaned(text: str, unfinished: bool = False) -> str:
    """What a language model wrote, as a prompt: one paragraph without thoughts and quotes, within the limits.

    Args:
        unfinished: It may end in the middle of a sentence, which is then left away, if there are whole ones.

    Raises:
        SelfForcingError: nothing is left.
    """
    text = _THINKING.sub("", text).rpartition("</think>")[2]
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text.strip()))
    text = next((part for part in paragraphs if part), "")
    text = re.sub(r"^\**prompt\**\s*:\**\s*", "", text, flags=re.IGNORECASE).strip("\"'“”` \n")
    if len(text) > MAX_PROMPT_CHARS:
        unfinished = True
        text = text[:MAX_PROMPT_CHARS].rpartition(" ")[0] or text[:MAX_PROMPT_CHARS]
    if unfinished and (ends := [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]):
        text = text[: ends[-1]]
    try:
        return checked_prompt(text)
    except InvalidRequest as error:
        raise SelfForcingError(
            "The language model wrote nothing that can be used. Ask again, or write the prompt yourself."
        ) from error


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


def _leave_a_core() -> None:
    """Let torch use one core less on this thread, and on no other one."""
    import torch

    limit_threads()
    usual = torch.get_num_threads()  # also makes this thread take over the usual number, which it would do later
    if usual < 2:
        return
    torch.set_num_threads(usual - 1)
    # That was this thread's own number and the one that new threads begin with. The latter is put back elsewhere.
    restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restoring.start()
    restoring.join()


def _caused(error: SelfForcingError, cause: BaseException) -> SelfForcingError:
    error.__cause__ = cause
    return error
